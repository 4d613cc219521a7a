"""What receiving event streams costs with httpx and with aiohttp: processor time of the same loop,
on the same streams of a stub server in another process, in turns.

Run: python benchmarks/loadgen/http_clients.py --json benchmarks/results/loadgen-http-clients.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from tokenflow.loadgen.selftest import Load, stub_process

Post = Callable[[dict[str, Any]], AbstractAsyncContextManager[AsyncIterator[bytes]]]


@asynccontextmanager
async def with_httpx(url: str) -> AsyncIterator[Post]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:

        @asynccontextmanager
        async def post(body: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
            async with client.stream("POST", url, json=body) as response:
                yield response.aiter_bytes()

        yield post


@asynccontextmanager
async def with_aiohttp(url: str) -> AsyncIterator[Post]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        @asynccontextmanager
        async def post(body: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
            async with session.post(url, json=body) as response:
                yield response.content.iter_any()

        yield post


CLIENTS = {"httpx": with_httpx, "aiohttp": with_aiohttp}


async def receive(client: str, url: str, load: Load) -> tuple[int, float]:
    """(events, processor seconds) of all streams."""
    events = 0

    async def one(post: Post, i: int) -> None:
        nonlocal events
        await asyncio.sleep(i * load.ramp_s / load.streams)
        async with post({"max_tokens": load.tokens}) as pieces:
            rest = b""
            async for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        json.loads(line[6:])
                        events += 1

    async with CLIENTS[client](f"{url}/chat/completions") as post:
        before = time.process_time()
        await asyncio.gather(*(one(post, i) for i in range(load.streams)))
        return events, time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=400, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    load = Load(streams=args.streams, ramp_s=4.0, overlap_s=6.0, token_rate=10.0, each=1)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CLIENTS}
    with stub_process(load) as url:
        for _ in range(args.repeats):
            for name in CLIENTS:
                events, seconds = asyncio.run(receive(name, url, load))
                runs[name].append({"events": events, "cpu_s": seconds})
                print(f"{name}: {events} events, {seconds * 1e6 / events:.0f} us each")
    totals = {name: sum(r["cpu_s"] for r in own) for name, own in runs.items()}
    ratio = totals["httpx"] / totals["aiohttp"]
    print(f"httpx over aiohttp: {ratio:.2f}")
    if args.json:
        report = {
            "machine": {"platform": platform.platform(), "cpus": len(os.sched_getaffinity(0))},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in CLIENTS},
            },
            "streams": load.streams,
            "runs": runs,
            "httpx_over_aiohttp": ratio,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
