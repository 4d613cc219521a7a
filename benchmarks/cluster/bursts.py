"""What the cluster benchmarks share: skewed requests, sending them, where it was measured."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenflow.loadgen.description import GrpcServer
from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.targets.grpc import GrpcTarget
from tokenflow.loadgen.workload import Ask

CHANNELS = 32
"""Connections; a server takes about a hundred streams on each."""
# Never on a cluster that happens to run on the machine.
os.environ.setdefault("RAY_ADDRESS", "local")


def skewed(rng: random.Random, mean: float, sigma: float, least: int, most: int) -> int:
    """A log-normal length with that median, within bounds."""
    return min(most, max(least, round(mean * rng.lognormvariate(0.0, sigma))))


def asks(
    times: Seq[float],
    *,
    seed: int,
    token_rate: float,
    prompt: tuple[float, float, int, int] = (100.0, 1.2, 8, 800),
    output: tuple[float, float, int, int] = (40.0, 0.8, 4, 200),
) -> list[Ask]:
    """Requests at the given times; prompts and outputs as the arguments of `skewed`, in tokens."""
    rng = random.Random(seed)
    return [
        Ask(i, at, skewed(rng, *prompt), skewed(rng, *output), token_rate, rng.getrandbits(40), i)
        for i, at in enumerate(times)
    ]


async def send(address: str, requests: Seq[Ask]) -> list[StreamRecord]:
    """Send every request at its time over gRPC and wait for all answers."""
    targets = [GrpcTarget(GrpcServer(address=address), content="ids") for _ in range(CHANNELS)]
    for target in targets:
        await target.open()
    built = [targets[0].build(ask) for ask in requests]
    begun = time.monotonic() + 0.2
    records = [StreamRecord(ask.token_rate, begun + ask.at_s, index=ask.index) for ask in requests]

    async def one(ask: Ask, prompt: Any, record: StreamRecord) -> None:
        await asyncio.sleep(max(0.0, record.intended_s - time.monotonic()))
        await targets[ask.index % CHANNELS].stream(ask, prompt, (), record)

    await asyncio.gather(*map(one, requests, built, records))
    for target in targets:
        await target.close()
    return records


def warm_up(address: str, replicas: int, *, token_rate: float, seed: int) -> None:
    """Let every replica measure its speeds, with requests like those to come."""
    count = 12 * replicas
    times = [i * 0.05 for i in range(count)]
    records = asyncio.run(send(address, asks(times, seed=seed, token_rate=token_rate)))
    failed = [r.error for r in records if not r.ok]
    if failed:
        raise SystemExit(f"the warm-up failed: {failed[0]}")


def pids(role: str) -> list[int]:
    """The processes of this machine's cluster in that role: `replica` or `ingress`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_text().startswith(
                f"ray::ServeReplica:tokenflow:{role}"
            ):
                found.append(int(folder.name))
        except OSError:
            continue  # it has just ended
    return found


def report(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with what made them."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": _processor(), "cpus": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenflow-serve", "ray", "torch", "numpy")},
        },
        **figures,
    }


def _processor() -> str:
    lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write(path: str | None, figures: dict[str, Any]) -> None:
    """The report as JSON, if a path is given."""
    if path:
        text = json.dumps(report(figures), indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8")
