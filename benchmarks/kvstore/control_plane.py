"""What the KV store costs beside the copies: lookups, commits, leases, scans and evictions.

One store in memory with four replicas, three of them idle; the client's calls are those that the
engine makes between two forward passes, the store's run in its own process. Medians over repeats.
"Calls per 64 blocks" counts the client's control calls over a long run of mixed work.

Run: python benchmarks/kvstore/control_plane.py [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np

from tokenflow.kvstore.client import EXTENT, HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.node import NodeStore
from tokenflow.kvstore.tables import SlotState
from tokenflow.replicas.transfers import Commit

SIZES = (32_768, 262_144)
CHAIN = 256
"""Blocks of one sequence: 4096 tokens in blocks of 16."""
REPEATS = 50
EVICTED = 1024


def key(i: int) -> bytes:
    return hashlib.blake2b(i.to_bytes(8, "little"), digest_size=16).digest()


class Stopwatch:
    """Seconds by name, all the times."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.taken.setdefault(name, []).append(time.perf_counter() - begun)

    def medians(self, unit: str, scale: float) -> dict[str, float]:
        return {f"{name}_{unit}": scale * median(all_) for name, all_ in self.taken.items()}


class Unhurried(LocalStoreControl):
    """Leaves it to the store when to look for commits, as between processes."""

    def poll(self) -> None:
        pass


def client_us(num_slots: int) -> dict[str, float]:
    """Microseconds per block of the calls of the engine, on a store that is half full."""
    store = NodeStore.in_memory(num_slots)
    controls = [LocalStoreControl(store, name) for name in "abcd"]
    # Big leases and a store that looks by itself later, so that only the client is timed.
    control = controls[0]
    control.poll = lambda: None  # type: ignore[method-assign]
    host = HostSlots(control, store.tables, num_slots, background=False, high_water=num_slots // 2)
    watch = Stopwatch()
    chains = num_slots // 2 // CHAIN
    for chain in range(chains):
        keys = [key(chain * CHAIN + i) for i in range(CHAIN)]
        with watch.time("acquire"):
            slots = host.acquire(CHAIN)
        assert slots is not None
        blocks = [Commit(slot, keys[i], str(chain), i, i) for i, slot in enumerate(slots)]
        with watch.time("commit"):
            host.commit(blocks)
        with watch.time("release"):
            host.release(slots)
    store.poll()
    rng = random.Random(1)
    for _ in range(REPEATS):
        chain = rng.randrange(chains)
        keys = [key(chain * CHAIN + i) for i in range(CHAIN)]
        with watch.time("match"):
            found = host.match(keys)
        assert len(found) == CHAIN
        host.release(found)
    return watch.medians("us", 1e6 / CHAIN)


def store_ms(num_slots: int) -> dict[str, float]:
    """Milliseconds of the store's own work, on a store that is full of cached blocks."""
    store = NodeStore.in_memory(num_slots)
    controls = [LocalStoreControl(store, name) for name in "abcd"]
    host = HostSlots(controls[0], store.tables, num_slots, background=False)

    def fill(first: int, blocks: int) -> None:
        for base in range(first, first + blocks, CHAIN):
            n = min(CHAIN, first + blocks - base)
            slots = host.acquire(n)
            assert slots is not None
            host.commit([Commit(s, key(base + i), "r", i, 0) for i, s in enumerate(slots)])
            host.release(slots)

    filled = num_slots
    fill(0, filled)
    table = store._slots
    watch = Stopwatch()
    for _ in range(REPEATS):
        with watch.time("scan"):
            store.poll()
        with watch.time("evict"):
            table.evict(EVICTED)
        with watch.time("lease"):
            slots = controls[1].lease(EVICTED)
        tables = store.tables
        tables.keys[slots] = np.frombuffer(
            b"".join(key(filled + i) for i in range(EVICTED)), np.uint64
        ).reshape(-1, 2)
        tables.used[slots] = time.monotonic_ns()
        tables.state[slots] = SlotState.COMMITTED
        filled += EVICTED
        with watch.time("index"):
            table.index_commits()
        with watch.time("info"):
            store.info()
    return watch.medians("ms", 1e3)


def calls_per_64(num_slots: int) -> float:
    """Control calls for every 64 blocks handed out; sequences share and outgrow the store."""
    store = NodeStore.in_memory(num_slots, max_owner_fraction=0.75)
    control = LocalStoreControl(store, "a")
    host = HostSlots(control, store.tables, control.info.owner_quota, background=False)
    rng = random.Random(1)
    running: list[list[int]] = []
    for turn in range(4000):
        chain = rng.randrange(num_slots // 16)
        keys = [key(chain << 20 | i) for i in range(rng.randrange(8, 96))]
        held = host.match(keys)
        fresh = host.acquire(len(keys) - len(held)) or []
        host.commit(
            [
                Commit(slot, keys[i], str(turn), i, 0)
                for i, slot in enumerate(fresh, start=len(held))
                if rng.random() < 0.9
            ]
        )
        running.append([*held, *fresh])
        if len(running) > 100:
            host.release(running.pop(rng.randrange(len(running))))
    stats = host.stats()
    return 64 * stats.calls / stats.acquired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    args = parser.parse_args()
    figures = {}
    for num_slots in SIZES:
        row = {
            **client_us(num_slots),
            **store_ms(num_slots),
            "calls_per_64_blocks": calls_per_64(num_slots),
        }
        figures[num_slots] = row
        print(f"{num_slots} slots")
        for name in ("match", "acquire", "commit", "release"):
            print(f"  {name:34} {row[name + '_us']:8.3f} us per block, {CHAIN} at a time")
        print(f"  {'poll with nothing new':34} {row['scan_ms']:8.3f} ms")
        print(f"  {f'index {EVICTED} commits':34} {row['index_ms']:8.3f} ms")
        print(f"  {f'evict {EVICTED} blocks, without grace':34} {row['evict_ms']:8.3f} ms")
        print(f"  {f'lease {EVICTED} free slots':34} {row['lease_ms']:8.3f} ms")
        print(f"  {'info':34} {row['info_ms']:8.3f} ms")
        print(f"  {'control calls per 64 blocks':34} {row['calls_per_64_blocks']:8.3f}", flush=True)
    if args.json:
        report = {
            "command": "python benchmarks/kvstore/control_plane.py --json FILE",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "extent": EXTENT,
            "chain": CHAIN,
            "evicted": EVICTED,
            "slots": figures,
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
