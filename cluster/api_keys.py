"""API keys and the file that holds them: who may come in, as whom, with which limits.

The file has digests only. A key is 32 random bytes, so a plain SHA-256 is enough: slow password
hashes make up for secrets that can be guessed, and these cannot. Who may use a key *when* is in
`authentication.py`, how much in `quotas.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tokenflow.cluster.quotas import KeyLimits
from tokenflow.cluster.tenancy import TENANT
from tokenflow.replicas.errors import ConfigError

_PREFIX = "sk-tf-"
_KEY_BYTES = 32


class ApiKey(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Names it; not secret.")
    tenant: str = Field(pattern=f"^{TENANT.pattern}$")
    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    revoked: bool = False
    limits: KeyLimits = KeyLimits()


_KEYS = TypeAdapter(list[ApiKey])


def new_key() -> str:
    """A key that nobody has."""
    return _PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def key_hash(key: str) -> str:
    """As the file has it."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse_keys(text: str, where: str) -> list[ApiKey]:
    """The entries of a file. Raises ConfigError naming `where` and what is wrong."""
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {str(error).splitlines()[0]}.") from None
    try:
        keys = _KEYS.validate_python([] if loaded is None else loaded)
    except ValidationError as error:
        # Without the input: somebody may have put a key where its hash belongs.
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}"
            for item in error.errors(include_input=False)
        )
        raise ConfigError(f"{where}: {problems}.") from None
    for name in ("id", "hash"):
        values = [getattr(key, name) for key in keys]
        if len(set(values)) < len(values):
            raise ConfigError(f"{where}: two keys have the same {name}; each needs its own.")
    return keys


def load_keys(path: Path) -> list[ApiKey]:
    """Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the API keys in {str(path)!r}: {reason}.") from None
    return parse_keys(text, str(path))


@contextlib.contextmanager
def editing(path: Path) -> Iterator[None]:
    """While the body reads the file and saves it, no other process does. Raises ConfigError."""
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def save_keys(path: Path, keys: list[ApiKey]) -> None:
    """Replace the file in one step, so that nobody ever reads half of it. Only its owner may read a
    new one; one that is there keeps its owner and mode, for the server that reads it may not be
    the user who writes it. Raises ConfigError."""
    tree: list[dict[str, Any]] = [key.model_dump(exclude_defaults=True) for key in keys]
    text = yaml.safe_dump(tree, sort_keys=False)
    target = path.resolve()
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                if target.exists():
                    _make_alike(descriptor, target.stat())
                file.write(text)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise _cannot_write(path, error) from None


def _make_alike(descriptor: int, present: os.stat_result) -> None:
    if (present.st_uid, present.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, present.st_uid, present.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(present.st_mode))


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write {str(path)!r}: {error.strerror}.")
