"""One tenant floods the cluster: what does another one's time to first token become?

The same requests of a quiet tenant are sent alone, then while `--flood` requests of another tenant
are always under way, and, to compare, while as many of its own tenant are. The three are repeated
in turn on one cluster, each time with other words in the prompts: else all but the first would find
them in the cache.

What is asked is how the cluster shares its replica. Everything runs on one machine all the same, so
the flood also takes processor time from what is not its own to take: its clients from the servers
and from the client that measures. --flood-share bounds the process that floods to that much of a
processor, as clients on machines of their own take none. With --share the replica has that much of
one and no more, alone as well, as on a machine of its own: else it is faster alone, where it has
both. Proxy, ingress and the measuring client share the rest, as they do on a node.

Run: python benchmarks/cluster/tenants.py [--flood N] [--seconds S] [--repeats N] [--share X]
         [--flood-share X] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
from bursts import CHANNELS, asks, pids, write
from shares import processor_shares

from tokenflow.cluster.api_keys import ApiKey, key_hash, new_key, save_keys
from tokenflow.cluster.config import load_config
from tokenflow.cluster.local import LocalCluster, free_port
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub
from tokenflow.loadgen.metrics import percentile
from tokenflow.loadgen.workload import Ask

_RAMP_S = 5.0
"""Before the quiet tenant begins the flood has filled the cluster."""


class Tenant:
    """A client with a key."""

    def __init__(self, address: str, key: str, words: int = 0) -> None:
        """`words` makes its prompts other ones than those of tenants with another number."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._stubs = [
            InferenceStub(grpc.aio.insecure_channel(address, options=options))
            for _ in range(CHANNELS)
        ]
        self._metadata = [("authorization", f"Bearer {key}")]
        self._words = words

    async def ask(self, ask: Ask) -> float | None:
        """When its first token came, on the monotonic clock; None when it was refused."""
        rng = random.Random(f"{ask.seed} {self._words}")
        message = pb.GenerateRequest(token_rate=ask.token_rate)
        message.token_ids.ids.extend(rng.randrange(5, 900) for _ in range(ask.prompt_tokens))
        message.sampling.max_tokens = ask.output_tokens
        message.sampling.ignore_eos = True
        first = None
        try:
            stub = self._stubs[ask.index % CHANNELS]
            async for _ in stub.Generate(message, metadata=self._metadata):
                first = first or time.monotonic()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            await asyncio.sleep(0.2)
        return first


async def flood(address: str, key: str, width: int, rate: float, seed: int) -> None:
    """That many requests at any time, until the process is ended."""
    tenant = Tenant(address, key)

    async def loop(number: int) -> None:
        for i in range(1_000_000):
            each = seed + number * 1_000_000 + i
            await tenant.ask(asks([0.0], seed=each, token_rate=rate)[0])

    await asyncio.gather(*map(loop, range(width)))


async def measure(address: str, key: str, requests: list[Ask], words: int) -> list[float | None]:
    """Seconds to the first token of each request; None = refused."""
    tenant = Tenant(address, key, words)
    begun = time.monotonic() + 0.2

    async def one(ask: Ask) -> float | None:
        due = begun + ask.at_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        first = await tenant.ask(ask)
        return None if first is None else first - due

    return await asyncio.gather(*map(one, requests))


def phase(
    address: str,
    requests: list[Ask],
    words: int,
    quiet: str,
    flooding: str | None,
    args: argparse.Namespace,
) -> list[float | None]:
    if flooding is None:
        return asyncio.run(measure(address, quiet, requests, words))
    command = [sys.executable, __file__, "--flood", str(args.flood), "--rate", str(args.rate)]
    process = subprocess.Popen([*command, "--as", address, flooding])
    with bounded([process.pid], args.flood_share):
        try:
            time.sleep(_RAMP_S)
            return asyncio.run(measure(address, quiet, requests, words))
        finally:
            process.kill()
            process.wait()
            time.sleep(_RAMP_S)


def bounded(processes: list[int], share: float | None) -> contextlib.AbstractContextManager[None]:
    return processor_shares(processes, share) if share else contextlib.nullcontext()


def figures(times: list[float | None]) -> dict[str, float]:
    taken = [t for t in times if t is not None]
    return {
        "requests": len(times),
        "refused": len(times) - len(taken),
        "ttft_p50_s": percentile(taken or [0.0], 50),
        "ttft_p99_s": percentile(taken or [0.0], 99),
        "ttft_max_s": max(taken, default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flood", type=int, default=64, help="requests under way at any time")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each phase")
    parser.add_argument("--per-second", type=float, default=3.0, help="quiet requests")
    parser.add_argument("--rate", type=float, default=20.0, help="tokens/s of every reader")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, help="processors of the replica")
    parser.add_argument("--flood-share", type=float, help="processors of the flood's clients")
    parser.add_argument("--as", nargs=2, metavar=("ADDRESS", "KEY"), help=argparse.SUPPRESS)
    parser.add_argument("--json")
    args = parser.parse_args()
    if getattr(args, "as"):
        address, key = getattr(args, "as")
        asyncio.run(flood(address, key, args.flood, args.rate, args.seed + 1))
        return
    secrets = {name: new_key() for name in ("quiet", "flooding", "same")}
    tenants = {"quiet": "quiet", "flooding": "flooding", "same": "quiet"}
    rng = random.Random(args.seed)
    times: list[float] = []
    at = rng.expovariate(args.per_second)
    while at < args.seconds:
        times.append(at)
        at += rng.expovariate(args.per_second)
    requests = asks(times, seed=args.seed, token_rate=args.rate)
    found: dict[str, list[float | None]] = {"alone": [], "other tenant": [], "same tenant": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.yaml"
        save_keys(
            path,
            [ApiKey(id=n, tenant=tenants[n], hash=key_hash(key)) for n, key in secrets.items()],
        )
        overrides: dict[str, Any] = {
            "ingress.port": free_port(),
            "ingress.grpc_port": free_port(),
            "engine.cpu_threads": 1,
            "engine.kv_tokens": 8192,
            "engine.max_num_seqs": 32,
            "kvstore.host_kv_gib": 0.5,
            "security.api_keys_file": str(path),
        }
        with LocalCluster(load_config(None, overrides)) as cluster:
            cluster.serve()
            address = cluster.grpc_target
            with bounded(pids("replica"), args.share):
                words = itertools.count()
                quiet = secrets["quiet"]
                phase(address, requests[:24], next(words), quiet, secrets["flooding"], args)
                for _ in range(args.repeats):
                    for name, key in (
                        ("alone", None),
                        ("other tenant", secrets["flooding"]),
                        ("same tenant", secrets["same"]),
                    ):
                        found[name] += phase(address, requests, next(words), quiet, key, args)
    result = {name: figures(times) for name, times in found.items()}
    ratios = {
        name: result[name]["ttft_p99_s"] / result["alone"]["ttft_p99_s"]
        for name in ("other tenant", "same tenant")
    }
    for name, values in result.items():
        shown = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
        print(f"{name:13} {shown}  x {ratios.get(name, 1.0):.2f}", flush=True)
    arguments = {k: v for k, v in vars(args).items() if k != "as"}
    write(args.json, {"arguments": arguments, "figures": result, "p99_over_alone": ratios})


if __name__ == "__main__":
    main()
