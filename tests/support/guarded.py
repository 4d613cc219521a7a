"""The session's cluster behind API keys, and how its clients show theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflow.cluster.api_keys import ApiKey, key_hash, new_key, save_keys
from tokenflow.cluster.quotas import KeyLimits


@dataclass
class KeyRing:
    """Keys by name, in a file."""

    path: Path

    def __post_init__(self) -> None:
        self.secrets: dict[str, str] = {}
        self._entries: dict[str, ApiKey] = {}

    def add(self, name: str, tenant: str, **limits: Any) -> None:
        secret = self.secrets[name] = new_key()
        self._entries[name] = ApiKey(
            id=name, tenant=tenant, hash=key_hash(secret), limits=KeyLimits(**limits)
        )
        self.save()

    def revoke(self, name: str) -> None:
        self._entries[name] = self._entries[name].model_copy(update={"revoked": True})
        self.save()

    def save(self) -> None:
        save_keys(self.path, list(self._entries.values()))

    def headers(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets[name]}"}

    def metadata(self, name: str) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.secrets[name]}")]
