"""The clients of `cost.py`, in a process of their own and as light as can be: they count bytes and
messages, and look into the last ones only.

Run by cost.py: python benchmarks/cluster/cost_load.py {http,grpc} SETTING-JSON
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp
import grpc
from cost_servers import PROMPT, Setting

from tokenflow.cluster.rpc import inference_pb2 as pb

_TAIL_BYTES = 2048
"""Of an answer by HTTP, in which the usage stands."""


async def over_http(setting: Setting) -> dict[str, Any]:
    url = f"http://127.0.0.1:{setting.http_port}/v1/completions"
    body = {
        "model": "tokenflow-books",
        "prompt": list(PROMPT),
        "max_tokens": setting.tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "token_rate": setting.token_rate,
    }
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=_NO_TIMEOUT) as session:

        async def one(seed: int) -> tuple[float, int, int, int]:
            first = 0.0
            reads = size = 0
            tail = b""
            async with session.post(url, json={**body, "seed": seed}) as response:
                async for part in response.content.iter_any():
                    first = first or time.monotonic()
                    reads += 1
                    size += len(part)
                    tail = (tail + part)[-_TAIL_BYTES:]
            lines = tail.decode(errors="replace").splitlines()
            if "data: [DONE]" not in lines:
                raise RuntimeError(f"a stream broke off: {tail!r}")
            usage = next(
                json.loads(line[6:])["usage"]
                for line in lines
                if '"usage":{' in line or '"usage": {' in line
            )
            return first, usage["completion_tokens"], reads, size

        return await measure(setting, one)


async def over_grpc(setting: Setting) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{setting.grpc_port}") as channel:
        generate = channel.unary_stream(
            "/tokenflow.v1.Inference/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
        )

        async def one(seed: int) -> tuple[float, int, int, int]:
            message = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=PROMPT),
                sampling=pb.SamplingParams(max_tokens=setting.tokens, ignore_eos=True, seed=seed),
            )
            if setting.token_rate == "max":
                message.as_fast_as_possible = True
            else:
                message.token_rate = setting.rate
            first = 0.0
            reads = size = 0
            last = b""
            async for last in generate(message):
                first = first or time.monotonic()
                reads += 1
                size += len(last)
            tokens = pb.GenerateResponse.FromString(last).usage.completion_tokens
            return first, tokens, reads, size

        return await measure(setting, one)


_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


async def measure(setting: Setting, one: Any) -> dict[str, Any]:
    begun, cpu = time.monotonic(), time.process_time()
    results = await asyncio.gather(*(one(seed) for seed in range(setting.streams)))
    firsts, tokens, reads, sizes = zip(*results, strict=True)
    if set(tokens) != {setting.tokens}:
        raise RuntimeError(f"streams of {setting.tokens} tokens had {sorted(set(tokens))}")
    return {
        "tokens": sum(tokens),
        "seconds": time.monotonic() - begun,
        "first_token_s": sorted(first - begun for first in firsts)[len(firsts) // 2],
        "reads": sum(reads),
        "bytes": sum(sizes),
        "client_cpu_s": time.process_time() - cpu,
    }


if __name__ == "__main__":
    run = {"http": over_http, "grpc": over_grpc}[sys.argv[1]]
    print(json.dumps(asyncio.run(run(Setting(**json.loads(sys.argv[2]))))))
