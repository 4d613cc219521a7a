"""Who makes a request: the API key it carries, looked up among those of the file, which may change
at any time. Without a file everybody may come in, and all are one tenant.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tokenflow.cluster.api_keys import ApiKey, key_hash, load_keys
from tokenflow.cluster.quotas import KeyLimits, Quota
from tokenflow.replicas.errors import ConfigError, InvalidRequestError

logger = logging.getLogger("ray.serve")

RELOAD_S = 1.0
"""How often the file is looked at: a revoked key is refused that much later at the most."""
_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Principal:
    """In whose name a request is made."""

    tenant: str
    """Empty: everybody, where no keys are asked for."""
    quota: Quota


class Authenticator:
    """The keys as they are now, and what each has used. `share`: see `Quota`."""

    def __init__(self, keys: Iterable[ApiKey] | None, *, share: float = 1.0) -> None:
        """`keys` None: nobody is asked for one."""
        self._share = share
        self._principals: dict[str, Principal] = {}
        self._by_hash: dict[str, Principal] | None = None
        self._anybody = Principal("", Quota(KeyLimits(), 1.0, time.monotonic()))
        if keys is not None:
            self.replace(keys)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """From now on these are the keys. What one of them has used stays used."""
        now = time.monotonic()
        by_hash: dict[str, Principal] = {}
        principals: dict[str, Principal] = {}
        for key in keys:
            known = self._principals.get(key.id)
            if known is not None and known.tenant == key.tenant:
                known.quota.set_limits(key.limits, now)
                principal = known
            else:
                principal = Principal(key.tenant, Quota(key.limits, self._share, now))
            principals[key.id] = principal
            if not key.revoked:
                by_hash[key.hash] = principal
        self._principals, self._by_hash = principals, by_hash

    def identify(self, authorization: str | None) -> Principal:
        """Whose `Authorization` value that is. Raises InvalidRequestError (401), which is the same
        for keys that never were and keys that were revoked."""
        by_hash = self._by_hash
        if by_hash is None:
            return self._anybody
        if authorization is None:
            _refuse("An API key is needed: Authorization: Bearer sk-tf-...")
        if not authorization.lower().startswith(_SCHEME):
            _refuse("The authorization must be of the form: Bearer sk-tf-...")
        presented = key_hash(authorization[len(_SCHEME) :].strip())
        # Which digests begin like this one could be found out by timing, but not what has them.
        principal = by_hash.get(presented)
        if principal is None:
            _refuse("This API key is not valid.")
        return principal

    def settle(self) -> None:
        """Give back what requests did not use, so that none is kept after its end."""
        now = time.monotonic()
        for principal in self._principals.values():
            principal.quota.settle(now)


def _refuse(message: str) -> NoReturn:
    raise InvalidRequestError(message, code="invalid_api_key", status=401)


class KeyFile:
    """The file of the keys, read again whenever it has changed."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self.keys = load_keys(path)

    async def follow(self, authenticator: Authenticator) -> None:
        """Keep the authenticator up to date. Runs until it is cancelled.

        A file that is gone or wrong changes nothing: it must neither open the cluster nor close it.
        """
        while True:
            try:
                keys = await asyncio.to_thread(self._news)
            except ConfigError as error:
                logger.error("the API keys stay as they were: %s", error)
                keys = None
            if keys is not None:
                authenticator.replace(keys)
            authenticator.settle()
            await asyncio.sleep(RELOAD_S)

    def _news(self) -> list[ApiKey] | None:
        """The keys, when the file is not the one that was read last. Raises ConfigError, once."""
        signature: tuple[int, ...] = ()
        try:
            status = self._path.stat()
            signature = status.st_mtime_ns, status.st_size, status.st_ino
        except OSError:
            pass  # gone is news as well
        if signature == self._seen:
            return None
        self._seen = signature
        return load_keys(self._path)
