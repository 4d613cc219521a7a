"""Who makes a request: the API key it carries, looked up among those of the file, which may change
at any time. Without a file everybody may come in, and all are one tenant.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, Protocol

from tokenflow.cluster.api_keys import ApiKey, key_hash, load_keys
from tokenflow.cluster.quotas import KeyLimits, Quota
from tokenflow.replicas.errors import ConfigError, InvalidRequestError

logger = logging.getLogger("ray.serve")

RELOAD_S = 1.0
"""How often the file is looked at: a revoked key is refused, and what runs in its name is ended,
that much later at the most."""
_SCHEME = "bearer "


class Running(Protocol):
    """A request that runs in somebody's name."""

    def fail(self, error: InvalidRequestError) -> None:
        """End it; its reader is told why. Without effect on what has ended."""
        ...


class Principal:
    """In whose name requests are made: a key, or (None) everybody, where no keys are asked for."""

    def __init__(self, key: ApiKey | None, quota: Quota) -> None:
        self.tenant = "" if key is None else key.tenant
        self.quota = quota
        self._key = key
        self._revoked = False
        self._running: weakref.WeakSet[Running] = weakref.WeakSet()

    def is_of(self, key: ApiKey) -> bool:
        """Whether it is the one that this entry of the file means, with the same secret."""
        return self._key is not None and self._key.hash == key.hash and not self._revoked

    def runs(self, request: Running) -> None:
        """A request runs in its name from now on; it ends at once when the key was revoked since
        it was shown."""
        if self._revoked:
            request.fail(_not_any_more())
        else:
            self._running.add(request)

    def revoke(self) -> None:
        """End all that runs in its name, now and later."""
        self._revoked = True
        requests = list(self._running)
        for request in requests:
            request.fail(_not_any_more())
        name = self._key.id if self._key is not None else "anybody"
        logger.warning("API key %s is not valid any more; requests ended: %d", name, len(requests))


class Authenticator:
    """The keys as they are now, and what each has used. `share`: see `Quota`."""

    def __init__(self, keys: Iterable[ApiKey] | None, *, share: float = 1.0) -> None:
        """`keys` None: nobody is asked for one."""
        self._share = share
        self._principals: dict[str, Principal] = {}
        self._by_hash: dict[str, Principal] | None = None
        self._anybody = Principal(None, Quota(KeyLimits(), 1.0, time.monotonic()))
        if keys is not None:
            self.replace(keys)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """From now on these are the keys. What one of them has used stays used; what runs in the
        name of one that is revoked, gone or has another secret now is ended."""
        now = time.monotonic()
        before = self._by_hash or {}
        by_hash: dict[str, Principal] = {}
        principals: dict[str, Principal] = {}
        for key in keys:
            principal = self._principals.get(key.id)
            if principal is None or principal.tenant != key.tenant:
                principal = Principal(key, Quota(key.limits, self._share, now))
            else:
                principal.quota.set_limits(key.limits, now)
                if not principal.is_of(key):
                    principal = Principal(key, principal.quota)
            principals[key.id] = principal
            if not key.revoked:
                by_hash[key.hash] = principal
        self._principals, self._by_hash = principals, by_hash
        for digest, principal in before.items():
            if by_hash.get(digest) is not principal:
                principal.revoke()

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
            raise _not_valid()
        return principal

    def settle(self) -> None:
        """Give back what requests did not use, so that none is kept after its end."""
        now = time.monotonic()
        for principal in self._principals.values():
            principal.quota.settle(now)


def _refuse(message: str) -> NoReturn:
    raise InvalidRequestError(message, code="invalid_api_key", status=401)


def _not_valid() -> InvalidRequestError:
    return InvalidRequestError("This API key is not valid.", code="invalid_api_key", status=401)


def _not_any_more() -> InvalidRequestError:
    return InvalidRequestError(
        "The API key that this request was made with is not valid any more.",
        code="invalid_api_key",
        status=401,
    )


class KeyFile:
    """The file of the keys, read again whenever it has changed."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self.keys = load_keys(path)

    async def follow(self, authenticator: Authenticator, stale: Callable[[bool], None]) -> None:
        """Keep the authenticator up to date. Runs until it is cancelled.

        A file that is gone or wrong changes nothing: it must neither open the cluster nor close it.
        But a key that is revoked meanwhile is not refused, so `stale` is told.
        """
        while True:
            try:
                keys = await asyncio.to_thread(self._news)
            except ConfigError as error:
                logger.error("the API keys stay as they were: %s", error)
                stale(True)
                keys = None
            if keys is not None:
                authenticator.replace(keys)
                stale(False)
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
