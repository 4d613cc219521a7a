"""Bandwidth of the store's copy path against a plain memcpy of the same bytes, in the same run.

Device pool and segment as in a CPU replica. Each repeat copies the same number of bytes by plain
memcpy (one call over one stretch), then by jobs of the copy thread, from the start of the first to
the report of the last: scattered blocks, and neighbours; without and with their checksums.

Run: python benchmarks/kvstore/copy_bandwidth.py [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import random
import time
from statistics import median

import torch
from node import Node, machine, write

from tokenflow.replicas.executor.block_copies import CopyThread

SIZES = {"embedded model, 96 KiB": 96 << 10, "Llama3-8B bf16, 2 MiB": 2 << 20}
TOTAL = 512 << 20
JOB_BLOCKS = 32
REPEATS = 15


def memcpy_s(device: torch.Tensor, host: torch.Tensor) -> float:
    begun = time.perf_counter()
    ctypes.memmove(host.data_ptr(), device.data_ptr(), TOTAL)
    return time.perf_counter() - begun


def jobs_s(
    copies: CopyThread, pairs: list[tuple[int, int]], sums: dict[int, int], way: str
) -> tuple[float, float]:
    """Seconds from the start of the first job until all blocks are copied, until all is reported.

    What goes to the host is followed by its checksums.
    """
    begun = time.perf_counter()
    waiting: dict[int, list[tuple[int, int]]] = {}
    for i in range(0, len(pairs), JOB_BLOCKS):
        chunk = pairs[i : i + JOB_BLOCKS]
        if way == "to host":
            job = copies.to_host(chunk)
        else:
            expected = [sums[slot] if way.endswith("checked") else None for _, slot in chunk]
            job = copies.to_device([(slot, block) for block, slot in chunk], expected)
        waiting[job] = chunk
    uncopied = set(waiting)
    copied = 0.0
    while waiting:
        for done in copies.poll(10.0):
            assert done.error is None and not done.corrupt, done
            uncopied.discard(done.job_id)
            if not uncopied and not copied:
                copied = time.perf_counter() - begun
            if done.checksums is not None:
                chunk = waiting.pop(done.job_id)
                sums.update(zip([slot for _, slot in chunk], done.checksums, strict=False))
    return copied, time.perf_counter() - begun


def measure(size: int) -> dict[str, float]:
    blocks = TOTAL // size
    device = torch.zeros(blocks, size, dtype=torch.uint8).random_(256)
    rng = random.Random(1)
    order, places = rng.sample(range(blocks), blocks), rng.sample(range(blocks), blocks)
    scattered = list(zip(order, places, strict=True))
    neighbours = [(i, i) for i in range(blocks)]
    times: dict[str, list[float]] = {}
    with Node(blocks + 256, size) as node:
        _, memory = node.attach("bench")
        copies = CopyThread(device, memory)
        for repeat in range(REPEATS + 1):
            got = {"memcpy": memcpy_s(device, memory)}
            for name, pairs in (("scattered", scattered), ("neighbours", neighbours)):
                sums: dict[int, int] = {}
                for way in ("to host", "to device", "to device, checked"):
                    copied, reported = jobs_s(copies, pairs, sums, way)
                    got[f"{name} {way}"] = copied
                    if way == "to host":
                        got[f"{name} {way}, with checksums"] = reported
            if repeat:  # the first one touches the pages
                for name, seconds in got.items():
                    times.setdefault(name, []).append(seconds)
        copies.close()
        del memory, copies
    figures = {f"{name} GB/s": TOTAL / median(t) / 1e9 for name, t in times.items()}
    for name, seconds in times.items():
        if name != "memcpy":
            pairs_of = zip(times["memcpy"], seconds, strict=True)
            figures[f"{name} / memcpy"] = median(plain / own for plain, own in pairs_of)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    args = parser.parse_args()
    report = {**machine(), "repeats": REPEATS, "bytes": TOTAL, "sizes": {}}
    for name, size in SIZES.items():
        figures = report["sizes"][name] = measure(size)
        print(f"{name}: memcpy {figures['memcpy GB/s']:.1f} GB/s")
        for key, ratio in figures.items():
            if key.endswith("/ memcpy"):
                print(f"  {key[:-9]:32} {ratio:5.2f} of memcpy")
    write(args.json, report)


if __name__ == "__main__":
    main()
