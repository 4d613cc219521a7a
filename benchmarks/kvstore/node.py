"""A node for the measurements here: the store in a process of its own, its replicas in this one."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import threading
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.node import NodeStore, StoreConfig, StoreInfo
from tokenflow.kvstore.segment import Segment


def _serve(pipe: Connection, name: str, config: StoreConfig) -> None:
    """What the store's actor does: answer calls, and look for commits in between."""
    store = NodeStore.open(name, config)
    while True:
        if pipe.poll(config.poll_interval_s):
            call = pipe.recv()
            if call is None:
                break
            method, arguments = call
            pipe.send(getattr(store, method)(*arguments))
        store.poll()
    store.close()


class _Control:
    """A replica's way to that process (a `StoreControl`)."""

    def __init__(self, node: Node, owner_id: str) -> None:
        self._node = node
        self._owner_id = owner_id
        self.info: StoreInfo = node.call("register", owner_id, os.getpid())
        self.owner_index = self.info.owners[owner_id].index

    def lease(self, n: int) -> list[int]:
        slots: list[int] = self._node.call("lease", self._owner_id, n)
        return slots

    def release(self, slots: Sequence[int]) -> None:
        self._node.call("release", self._owner_id, list(slots))

    def reattach(self, held: Sequence[int]) -> None:
        self._node.call("reattach", self._owner_id, list(held))

    def poll(self) -> None:
        self._node.call("poll")

    def unregister(self) -> None:
        self._node.call("unregister", self._owner_id)


class Node:
    """A context in which there is a store."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        config = StoreConfig(slots * slot_bytes, slot_bytes, max_owner_fraction=1.0)
        self._slot_bytes = slot_bytes
        self._lock = threading.Lock()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        name = f"bench-{uuid.uuid4().hex[:8]}"
        self._process = context.Process(target=_serve, args=(theirs, name, config), daemon=True)
        self._process.start()
        self._clients: list[HostSlots] = []
        self._segments: list[Segment] = []

    def call(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            self._pipe.send((method, arguments))
            return self._pipe.recv()

    def attach(self, name: str) -> tuple[HostSlots, torch.Tensor]:
        """A replica's client and the segment's memory, uint8 `[slots, slot_bytes]`."""
        control = _Control(self, name)
        segment = Segment.attach(control.info.path, slot_bytes=self._slot_bytes)
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
        self._pipe.send(None)
        self._process.join()


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
