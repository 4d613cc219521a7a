"""A node's store and its replicas' clients in one process, for the measurements here."""

from __future__ import annotations

import json
import os
import platform
import threading
import uuid
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.kvstore.segment import Segment


class Node:
    """A store over a real segment; a thread polls it, as the store's actor does."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._config = StoreConfig(slots * slot_bytes, slot_bytes, max_owner_fraction=1.0)
        self.store = NodeStore.open(f"bench-{uuid.uuid4().hex[:8]}", self._config)
        self._clients: list[HostSlots] = []
        self._segments: list[Segment] = []
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        while not self._stop.wait(self._config.poll_interval_s):
            self.store.poll()

    def attach(self, name: str) -> tuple[HostSlots, torch.Tensor]:
        """A replica's client and the segment's memory, uint8 `[slots, slot_bytes]`."""
        control = LocalStoreControl(self.store, name)
        segment = Segment.attach(control.info.path, slot_bytes=self._config.slot_bytes)
        client = HostSlots(control, segment.tables(), control.info.owner_quota)
        self._clients.append(client)
        self._segments.append(segment)
        return client, segment.tensor()

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients:
            client.close()
        for segment in self._segments:
            segment.close()
        self._stop.set()
        self._keeper.join()
        self.store.close()


def machine() -> dict[str, Any]:
    """What a result was measured with."""
    cpu = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def write(path: str | None, report: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
