"""A stream that moves to another node: how fast its KV travels, and when its reader goes on.

`bytes`: blocks from one store into another, the other in a process of its own, beside a plain TCP
connection over loopback between the same two processes, and memcpy; in turn, the same bytes.
`ray`: as many bytes as a Ray object between actors on two Ray nodes of this machine, into place.
`move`: a stream with a long context goes on at another replica, on a Ray node of its own, in turn
with its KV fetched and computed again; seconds from its submission there to its next token.

Run: python benchmarks/cluster/moves.py [--repeats N] [--model FOLDER] [--json FILE]
The embedded model has 1,024 tokens of context; benchmarks/peers/make_checkpoint.py makes a model
with 2,048. One machine stands for two: processors and memory are shared, there is no network.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import hashlib
import json
import multiprocessing
import os
import platform
import random
import socket
import tempfile
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import xxhash

from tokenflow.cluster.config import load_config
from tokenflow.cluster.local import LocalCluster, free_port
from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.streams import Stream, StreamManager
from tokenflow.cluster.wire import Submission
from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.exchange import Exchange
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.kvstore.peer import receive
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.transfers import Commit

SIZES = {
    "2k tokens, 12 KiB each": (128, 192 << 10),
    "2k tokens of Llama3-8B bf16": (128, 2 << 20),
}
"""(blocks, bytes of a block)."""
SO_FAR_TOKENS = 40
"""Tokens a stream has when it moves."""


# -- bytes ----------------------------------------------------------------------------------------


def start(name: str, directory: str, blocks: int, size: int) -> tuple[NodeStore, Exchange]:
    config = StoreConfig(2 * blocks * size, size, max_owner_fraction=1.0, directory=directory)
    store = NodeStore.open(name, config)
    return store, Exchange(store, "127.0.0.1")


def keys_of(blocks: int) -> list[bytes]:
    return [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(blocks)]


def lend(pipe: Connection, directory: str, blocks: int, size: int) -> None:
    """The other process: a store with all the blocks, and a plain server of as many bytes."""
    store, exchange = start("lender", directory, blocks, size)
    memory = store.memory()
    host = HostSlots(LocalStoreControl(store, "writer"), store.tables, blocks, background=False)
    slots = host.acquire(blocks)
    assert slots is not None
    commits = []
    for i, (slot, key) in enumerate(zip(slots, keys_of(blocks), strict=True)):
        block = memory[slot * size : (slot + 1) * size]
        block[:] = random.Random(i).randbytes(size)
        commits.append(Commit(slot, key, "r", i, xxhash.xxh3_64_intdigest(block)))
    host.commit(commits)
    host.close()
    listener = socket.create_server(("127.0.0.1", 0))

    def plain() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(memory[: blocks * size])

    threading.Thread(target=plain, daemon=True).start()
    pipe.send((exchange.endpoint, listener.getsockname()[1]))
    pipe.recv()
    exchange.close()
    store.close()


def move_bytes(blocks: int, size: int, repeats: int) -> dict[str, float]:
    total = blocks * size
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        child = context.Process(target=lend, args=(theirs, directory, blocks, size), daemon=True)
        child.start()
        endpoint, port = ours.recv()
        store, exchange = start("borrower", directory, blocks, size)
        memory = store.memory()
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        times: dict[str, list[float]] = {"memcpy": [], "tcp": [], "stores": []}
        for repeat in range(repeats + 1):
            begun = time.perf_counter()
            ctypes.memmove(base, base + total, total)
            copied = time.perf_counter()
            with socket.create_connection(("127.0.0.1", port)) as connection:
                receive(connection, memory[:total], time.monotonic() + 60)
            received = time.perf_counter()
            result = exchange.fetch("f", keys_of(blocks), endpoint, 60.0)
            fetched = time.perf_counter()
            assert (result.blocks, result.error) == (blocks, None), result
            store.drop_cache()
            if repeat:  # the first one touches the pages
                times["memcpy"].append(copied - begun)
                times["tcp"].append(received - copied)
                times["stores"].append(fetched - received)
        ours.send(None)
        child.join()
        exchange.close()
        store.close()
    figures = {f"{name} GB/s": total / median(t) / 1e9 for name, t in times.items()}
    for other in ("memcpy", "tcp"):
        pairs = zip(times[other], times["stores"], strict=True)
        figures[f"stores / {other}"] = median(plain / own for plain, own in pairs)
    return figures


# -- ray ------------------------------------------------------------------------------------------


class Holder:
    """An actor with bytes."""

    def __init__(self, total: int) -> None:
        self._bytes = np.ones(total, np.uint8)

    def read(self) -> Any:
        return self._bytes

    def copy_from(self, other: Any) -> float:
        import ray

        begun = time.perf_counter()
        self._bytes[:] = ray.get(other.read.remote())
        return time.perf_counter() - begun


def move_objects(nodes: list[str], total: int, repeats: int) -> float:
    """GB/s between actors of two nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor: Any = ray.remote(num_cpus=0)(Holder)
    a, b = (
        actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            total
        )
        for node in nodes[:2]
    )
    seconds = [ray.get(b.copy_from.remote(a)) for _ in range(repeats + 1)][1:]
    for one in (a, b):
        ray.kill(one)
    return total / median(seconds) / 1e9


# -- move -----------------------------------------------------------------------------------------


async def gap(
    handle: Any, manager: StreamManager, prompt: tuple[int, ...], fetch: bool
) -> tuple[float, int]:
    """A stream that has run on one replica is submitted to the other: seconds to its next token,
    and the blocks that came."""
    params = SamplingParams(max_tokens=SO_FAR_TOKENS, ignore_eos=True, temperature=0.0)
    salt = os.urandom(8).hex()
    stream = Stream(manager, "r", prompt, params, 20.0, salt)
    await manager.open(stream)
    source = stream.replica_id or ""
    async for _ in stream.batches(0.0):
        pass
    target = next(name for name in REGISTRY.replicas if name != source)
    before = await _fetched(manager)
    ingress_id, request_id = os.urandom(8).hex(), os.urandom(8).hex()
    frames = handle.options(stream=True, method_name="frames").remote(ingress_id, target=target)
    await anext(frames)
    submission = Submission(
        request_id=request_id,
        ingress_id=ingress_id,
        prompt_ids=prompt,
        params=replace(params, max_tokens=SO_FAR_TOKENS + 1),
        token_rate=20.0,
        resumed_ids=tuple(stream.token_ids),
        cache_salt=salt,
        kv_source=REGISTRY.node_of(source) if fetch else None,
    )
    begun = time.perf_counter()
    await handle.submit.remote(submission, target=target)
    async for frame in frames:
        if any(item[0] == request_id for item in frame):
            break
    seconds = time.perf_counter() - begun
    REGISTRY.finish(request_id)
    frames.cancel()
    return seconds, await _fetched(manager) - before


async def _fetched(manager: StreamManager) -> int:
    return sum(stats["fetch"]["fetched_blocks"] for stats in await manager.stats())


async def move_streams(prompt_tokens: int, repeats: int) -> dict[str, Any]:
    from ray import serve

    handle = serve.get_deployment_handle("replica", "tokenflow")
    manager = StreamManager(handle, failover_timeout_s=60)
    info = await manager.info(30.0)
    prompt_tokens = min(prompt_tokens, info["max_model_len"] - SO_FAR_TOKENS - 1)
    times: dict[bool, list[float]] = {True: [], False: []}
    blocks = 0
    for repeat in range(repeats + 1):
        for fetch in (True, False) if repeat % 2 else (False, True):
            rng = random.Random(2 * repeat + fetch)
            prompt = tuple(rng.randrange(10, info["vocab_size"]) for _ in range(prompt_tokens))
            seconds, came = await gap(handle, manager, prompt, fetch)
            assert bool(came) == fetch, f"{came} blocks were fetched"
            if repeat:  # the first ones warm up both replicas and the link
                times[fetch].append(seconds)
                blocks = came or blocks
    return {
        "context tokens": prompt_tokens + SO_FAR_TOKENS,
        "blocks fetched": blocks,
        "fetched s": median(times[True]),
        "computed s": median(times[False]),
        "computed / fetched": median(
            computed / fetched for computed, fetched in zip(times[False], times[True], strict=True)
        ),
        "all fetched s": times[True],
        "all computed s": times[False],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", help="a model folder; by default the embedded model")
    parser.add_argument("--prompt-tokens", type=int, default=2000, help="or as many as fit")
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before anything imports Ray
    report: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ray")},
        "repeats": args.repeats,
        "bytes": {},
    }
    for name, (blocks, size) in SIZES.items():
        report["bytes"][name] = move_bytes(blocks, size, args.repeats)
    config = load_config(
        None,
        {
            "ingress.port": free_port(),
            "ingress.grpc_port": free_port(),
            "engine.cpu_threads": 1,
            "engine.kv_tokens": 8192,
            "engine.max_num_seqs": 8,
            "kvstore.host_kv_gib": 0.5,
            "replicas.count": 2,
            "replicas.cpus_each": 1,
            **({"model.path": args.model} if args.model else {}),
        },
    )
    # The handle that is used here must outlive the event loop it is used in.
    env = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}
    with LocalCluster(config, nodes=2, env=env) as cluster:
        cluster.serve()
        assert cluster.nodes is not None
        # The smaller size only: the larger would not fit into these nodes' object stores.
        name, (blocks, size) = next(iter(SIZES.items()))
        speed = move_objects(cluster.nodes.node_ids, blocks * size, args.repeats)
        figures = report["bytes"][name]
        figures["ray objects GB/s"] = speed
        figures["stores / ray objects"] = figures["stores GB/s"] / speed
        report["move"] = asyncio.run(move_streams(args.prompt_tokens, args.repeats))
    print(json.dumps(report, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
