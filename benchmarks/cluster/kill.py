"""Kill what can be killed under load, and compare every stream with the undisturbed text.

Load over HTTP and gRPC, every request resumable and with a seed; in turn and then at random a
replica, the store's actor, an ingress, HAProxy, Serve's controller and (with --nodes 2) a whole
node are killed. Clients come back when their connection breaks. Printed, and written with --json:
the kills, the streams, tokens lost, repeated or out of order, streams whose text differs or which
found no end, and the pauses at the readers after each kind of kill. What is killed leaves a replica
and an ingress that have been there for a while: streams live on only where an ingress does.

Run: python -m benchmarks.cluster.kill --json benchmarks/results/cluster-kill.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx

from tests.support.sse import Reading, go_on, read
from tokenflow.cluster.config import ClusterConfig, load_config
from tokenflow.cluster.local import LocalCluster, free_port
from tokenflow.cluster.local_nodes import LocalNodes
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub

TITLES = {
    "replica": "ray::ServeReplica:tokenflow:replica",
    "store": "ray::KVStoreActor",
    "ingress": "ray::ServeReplica:tokenflow:ingress",
    "controller": "ray::ServeController",
}
NEEDED = ("replica", "ingress")
PROMPTS = [f"Chapter {i}. It was late in the year, and the house was quiet when" for i in range(4)]
RETRY_S = 0.1
PATIENCE_S = 90.0
"""Without anything new for so long a stream counts as ended early."""
STANDBY_S = 20.0
"""A process that has been there for so long is ready to serve."""


@dataclass
class Tally:
    """What the clients saw."""

    streams: int = 0
    reconnects: int = 0
    lost: int = 0
    repeated: int = 0
    """Or out of order."""
    different: int = 0
    unended: int = 0
    problems: list[str] = field(default_factory=list)
    arrivals: list[list[float]] = field(default_factory=list)
    """Of each stream, when something came."""


class Clients:
    """Lanes of streams, one after the other, until told to stop."""

    def __init__(self, url: str, target: str, model: str, tokens: int, rate: float) -> None:
        self.url, self.target, self.model = url, target, model
        self.tokens, self.rate = tokens, rate
        self.tally = Tally()
        self.stopping = False
        self.warm = asyncio.Event()
        """Set when the undisturbed texts are there, and the load begins."""
        self.alone: dict[tuple[str, int], Any] = {}
        self._made = 0

    def _id(self) -> str:
        self._made += 1
        return f"kill-{os.getpid()}-{self._made}"

    async def run(self, http: int, rpc: int) -> None:
        for kind in range(len(PROMPTS)):
            self.alone["http", kind] = (await self._over_http(kind, [])).text
            self.alone["grpc", kind] = await self._over_grpc(kind, [])
        self.tally = Tally()
        self.warm.set()
        lanes = [("http", i) for i in range(http)] + [("grpc", i) for i in range(rpc)]
        await asyncio.gather(*(self._lane(way, i) for way, i in lanes))

    async def _lane(self, way: str, lane: int) -> None:
        kind = lane
        while not self.stopping:
            kind = (kind + 1) % len(PROMPTS)
            arrivals: list[float] = []
            got: Any
            try:
                if way == "http":
                    got = (await self._over_http(kind, arrivals)).text
                else:
                    got = await self._over_grpc(kind, arrivals)
            except Exception as error:
                self.tally.unended += 1
                self.tally.problems.append(f"{way}: {type(error).__name__}: {error}"[:300])
                await asyncio.sleep(RETRY_S)
                continue
            self.tally.streams += 1
            self.tally.arrivals.append(arrivals)
            if got != self.alone[way, kind]:
                self.tally.different += 1
                self.tally.problems.append(
                    f"{way}: text of kind {kind} differs ({len(got)} of "
                    f"{len(self.alone[way, kind])} long)"
                )

    async def _over_http(self, kind: int, arrivals: list[float]) -> Reading:
        body = {
            "model": self.model,
            "prompt": PROMPTS[kind],
            "max_tokens": self.tokens,
            "temperature": 1.0,
            "seed": kind,
            "ignore_eos": True,
            "token_rate": self.rate,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        reading = Reading(self._id())
        reading.arrivals = arrivals
        headers = {"X-Request-Id": reading.request_id, "X-Resumable": "true"}
        heard = time.monotonic()
        while not reading.done:
            before = len(reading.ids)
            try:
                async with httpx.AsyncClient(base_url=self.url, timeout=20) as client:
                    if reading.last_id is not None:
                        self.tally.reconnects += 1
                        await go_on(client, reading)
                    else:
                        async with client.stream(
                            "POST", "/v1/completions", json=body, headers=headers
                        ) as answer:
                            if answer.status_code == 409:  # it was taken, and the answer lost
                                await go_on(client, reading)
                            else:
                                answer.raise_for_status()
                                await read(answer, reading)
            except (httpx.HTTPError, AssertionError) as error:
                _check_patience(heard, error)
                await asyncio.sleep(RETRY_S)
            if len(reading.ids) > before:
                heard = time.monotonic()
            if reading.error is not None:
                raise RuntimeError(str(reading.error))
        counts = [int(event_id.rpartition(":")[2].split(".")[0]) for event_id in reading.ids]
        self.tally.repeated += sum(b < a for a, b in itertools.pairwise(counts))
        assert reading.usage is not None
        self.tally.lost += max(0, self.tokens - reading.usage["completion_tokens"])
        return reading

    async def _over_grpc(self, kind: int, arrivals: list[float]) -> list[int]:
        request = pb.GenerateRequest(
            model=self.model,
            text=PROMPTS[kind],
            token_rate=self.rate,
            request_id=self._id(),
            resumable=True,
            sampling=pb.SamplingParams(
                max_tokens=self.tokens, temperature=1.0, seed=kind, ignore_eos=True
            ),
        )
        tokens: list[int] = []
        begun = False
        heard = time.monotonic()
        while True:
            try:
                async with grpc.aio.insecure_channel(self.target) as channel:
                    stub = InferenceStub(channel)
                    if begun:
                        self.tally.reconnects += 1
                        resume = pb.ResumeRequest(request_id=request.request_id, offset=len(tokens))
                        call = stub.Resume(resume, timeout=60)
                    else:
                        call = stub.Generate(request, timeout=60)
                    async for part in call:
                        begun = True
                        heard = time.monotonic()
                        if part.token_ids:
                            arrivals.append(heard)
                            self.tally.lost += max(0, part.offset - len(tokens))
                            self.tally.repeated += max(0, len(tokens) - part.offset)
                        tokens += part.token_ids
                        if part.finish_reason:
                            if part.finish_reason != "length":
                                raise RuntimeError(f"ended with {part.finish_reason!r}")
                            return tokens
            except grpc.aio.AioRpcError as error:
                begun |= error.code() == grpc.StatusCode.ALREADY_EXISTS
                _check_patience(heard, error)
                await asyncio.sleep(RETRY_S)


def _check_patience(heard: float, error: BaseException) -> None:
    if time.monotonic() - heard > PATIENCE_S:
        raise TimeoutError(f"nothing new for {PATIENCE_S:g} s") from error


class Killer:
    """Ends processes of the cluster that this process is connected to."""

    def __init__(self, nodes: LocalNodes | None, seed: int, kinds: list[str]) -> None:
        self._kinds = kinds
        self._nodes = nodes
        self._rng = random.Random(seed)
        self._seen: dict[int, float] = {}
        """When each replica's and ingress's process was seen first."""
        self.kills: list[tuple[float, str]] = []

    @property
    def kinds(self) -> list[str]:
        if self._kinds:
            return self._kinds
        return [*TITLES, "proxy"] + (["node"] if self._nodes is not None else [])

    def pids(self, kind: str) -> list[int]:
        import ray

        from tests.support.processes import processes_of

        session = ray._private.worker.global_worker.node.get_session_dir_path()
        found = processes_of(session)
        if kind == "proxy":
            return [pid for pid, text in found.items() if "haproxy" in text.split(" ")[0]]
        return [pid for pid, text in found.items() if text.startswith(TITLES[kind])]

    def kill(self, kind: str) -> bool:
        """False when there is nothing that may be killed now."""
        now = time.monotonic()
        known = {role: self.pids(role) for role in NEEDED}
        self._seen = {p: self._seen.get(p, now) for pids in known.values() for p in pids}
        if kind == "node":
            assert self._nodes is not None
            node_id = self._nodes.node_ids[-1]
            going = self._nodes.workers(node_id)
        else:
            pids = self.pids(kind)
            if not pids:
                return False
            going = {self._rng.choice(pids)}
        for pids in known.values():
            warm = [pid for pid in pids if now - self._seen[pid] >= STANDBY_S]
            if going.intersection(pids) and going.issuperset(warm):
                return False
        self.kills.append((now, kind))
        if kind == "node":
            assert self._nodes is not None
            self._nodes.kill(node_id)
            self._nodes.add()
        else:
            os.kill(going.pop(), signal.SIGKILL)
        return True

    async def run(self, duration_s: float, every_s: float) -> None:
        # Those that are there have served already.
        self._seen = {pid: -math.inf for role in NEEDED for pid in self.pids(role)}
        end = time.monotonic() + duration_s
        turn = 0
        while time.monotonic() < end - every_s:
            kinds = self.kinds
            kind = kinds[turn] if turn < len(kinds) else self._rng.choice(kinds)
            # Ray starts nodes in the main thread only; the clients wait while it does.
            if self.kill(kind) if kind == "node" else await asyncio.to_thread(self.kill, kind):
                print(f"killed: {kind}", flush=True)
                turn += 1
            await asyncio.sleep(every_s)


def pauses_after(kills: list[tuple[float, str]], arrivals: list[list[float]]) -> dict[str, Any]:
    """By kind of kill, over the streams that one fell into: the longest gap in which it lies or
    which begins before the next kill, seconds."""
    pauses: dict[str, list[float]] = {}
    ends = [at for at, _ in kills[1:]] + [math.inf]
    for (at, kind), end in zip(kills, ends, strict=True):
        for times in arrivals:
            if len(times) > 1 and times[0] < at < times[-1]:
                gaps = itertools.pairwise(times)
                longest = max(b - a for a, b in gaps if b > at and a < end)
                pauses.setdefault(kind, []).append(longest)
    return {
        kind: {
            "streams": len(values),
            "p50": quantile(sorted(values), 0.5),
            "p99": quantile(sorted(values), 0.99),
            "max": quantile(sorted(values), 1.0),
        }
        for kind, values in pauses.items()
    }


def quantile(values: list[float], share: float) -> float | None:
    return round(values[min(len(values) - 1, int(share * len(values)))], 3) if values else None


async def measure(server: LocalCluster, options: argparse.Namespace) -> dict:
    clients = Clients(
        server.url, server.grpc_target, server.config.model.name, options.tokens, options.rate
    )
    killer = Killer(server.nodes, options.seed, options.kinds)
    load = asyncio.create_task(clients.run(options.http, options.grpc))
    await clients.warm.wait()
    await asyncio.sleep(5)
    await killer.run(options.duration, options.every)
    clients.stopping = True
    await load
    tally = clients.tally
    return {
        "duration_s": options.duration,
        "kills": {kind: sum(k == kind for _, k in killer.kills) for kind in killer.kinds},
        "streams": tally.streams,
        "reconnects": tally.reconnects,
        "tokens_lost": tally.lost,
        "tokens_repeated_or_reordered": tally.repeated,
        "streams_that_differ": tally.different,
        "streams_without_end": tally.unended,
        "problems": tally.problems[:20],
        "pauses_after_kills_s": pauses_after(killer.kills, tally.arrivals),
    }


def configuration() -> ClusterConfig:
    return load_config(
        None,
        {
            "ingress.port": free_port(),
            "ingress.grpc_port": free_port(),
            "ingress.count": 2,
            "engine.kv_tokens": 8 * 256,
            "engine.cpu_threads": 1,
            "kvstore.host_kv_gib": 0.25,
            "replicas.count": 2,
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--duration", type=float, default=600, help="seconds of killing")
    parser.add_argument("--every", type=float, default=8, help="seconds between kills")
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=2, help="raylets")
    parser.add_argument("--http", type=int, default=6, help="streams over HTTP at once")
    parser.add_argument("--grpc", type=int, default=6, help="streams over gRPC at once")
    parser.add_argument("--tokens", type=int, default=120, help="per stream")
    parser.add_argument("--rate", type=float, default=20, help="tokens/s of each reader")
    parser.add_argument("--kinds", nargs="*", default=[], help="what to kill; default: everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    # Ray reads these when it is imported.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}
    os.environ.setdefault("RAY_ADDRESS", "local")
    with LocalCluster(configuration(), nodes=options.nodes if options.nodes > 1 else 0) as server:
        server.serve()
        result = asyncio.run(measure(server, options))
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    clean = not (
        result["tokens_lost"]
        or result["tokens_repeated_or_reordered"]
        or result["streams_that_differ"]
        or result["streams_without_end"]
    )
    return 0 if clean and result["streams"] else 1


if __name__ == "__main__":
    sys.exit(main())
