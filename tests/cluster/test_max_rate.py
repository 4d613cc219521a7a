"""Consumers that are no readers ("max"), over HTTP and gRPC, next to readers."""

from __future__ import annotations

import asyncio
import json
import math

import grpc
import httpx
import pytest

from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub

pytestmark = pytest.mark.cluster

TOKENS = 96
SLOW = 2
"""tokens/s: tokens for such a reader travel together."""


def body(server, **changes):
    return {
        "model": server.model,
        "prompt": "The old man",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    } | changes


async def over_http(server, headers=None, **changes) -> tuple[str, int, int]:
    """(text, messages with tokens, tokens)"""
    asked = body(server, stream=True, stream_options={"include_usage": True}, **changes)
    text, messages, tokens = "", 0, 0
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream(
            "POST", f"{server.base_url}/completions", json=asked, headers=headers
        ) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            messages += bool(event["choices"])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return text, messages, tokens


async def over_grpc(server, metadata=None, **changes) -> tuple[str, int, int]:
    """(text, messages with tokens, tokens)"""
    sampling = pb.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    asked = pb.GenerateRequest(model=server.model, text="The old man", sampling=sampling, **changes)
    text, messages, tokens = "", 0, 0
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        async for message in InferenceStub(channel).Generate(asked, metadata=metadata):
            text += message.text
            messages += bool(message.token_ids)
            tokens += len(message.token_ids)
    return text, messages, tokens


async def watched(server, streams) -> float:
    """The highest sum of declared rates that /metrics shows meanwhile."""
    highest = 0.0
    while not all(stream.done() for stream in streams):
        now = await asyncio.to_thread(server.metric, "tokenflow_declared_rate")
        assert math.isfinite(now)
        highest = max(highest, now)
        await asyncio.sleep(0.05)
    return highest


async def test_max_streams_next_to_readers(server):
    readers = [over_http(server, token_rate=SLOW), over_grpc(server, token_rate=SLOW)]
    others = [
        over_http(server, token_rate="max"),
        over_http(server, headers={"X-Token-Rate": "max"}),
        over_grpc(server, as_fast_as_possible=True),
        over_grpc(server, metadata=(("x-token-rate", "max"),)),
    ]
    streams = [asyncio.ensure_future(stream) for stream in [*readers, *others]]
    highest = await watched(server, streams)
    results = [stream.result() for stream in streams]
    assert {tokens for _, _, tokens in results} == {TOKENS}
    assert len({text for text, _, _ in results}) == 1
    slow, fast = [[m for _, m, _ in part] for part in (results[:2], results[2:])]
    # Without a reader there is a message every 100 ms, but for what piles up in a busy ingress.
    assert min(fast) > max(slow), (slow, fast)
    assert highest > 0
    await asyncio.to_thread(server.wait_idle)


async def test_a_whole_answer_may_be_asked_for_as_fast_as_possible(server):
    async with httpx.AsyncClient(timeout=60) as client:
        asked = body(server, token_rate="max", n=2)
        answer = await client.post(f"{server.base_url}/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2 * TOKENS


@pytest.mark.parametrize(
    ("changes", "headers", "where"),
    [
        ({"token_rate": "fast"}, {}, "token_rate"),
        ({"token_rate": "MAX"}, {}, "token_rate"),
        ({"token_rate": True}, {}, "token_rate"),
        ({"token_rate": 0}, {}, "token_rate"),
        ({}, {"X-Token-Rate": "fast"}, "The header X-Token-Rate"),
        ({}, {"X-Token-Rate": "inf"}, "The header X-Token-Rate"),
        ({"token_rate": None}, {"X-Token-Rate": "nan"}, "The header X-Token-Rate"),
    ],
)
def test_a_refused_rate_says_what_is_allowed(server, changes, headers, where):
    answer = httpx.post(
        f"{server.base_url}/completions", json=body(server, **changes), headers=headers
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", "token_rate")
    assert error["message"].startswith(f"{where} must be a number from 0.01 to 1000 (tokens/s)")
    assert '"max"' in error["message"]


@pytest.mark.parametrize(
    ("changes", "metadata", "named"),
    [
        (
            {"as_fast_as_possible": True, "token_rate": 5},
            None,
            "as_fast_as_possible and token_rate",
        ),
        ({"token_rate": math.inf}, None, "token_rate must be a number from 0.01 to 1000"),
        ({}, (("x-token-rate", "fast"),), '"max"'),
    ],
)
async def test_a_refused_rate_is_an_invalid_argument(server, changes, metadata, named):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await over_grpc(server, metadata, **changes)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert named in caught.value.details()
