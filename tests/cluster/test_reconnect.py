"""Clients that lose their connection, or their ingress, come back to exactly what they missed; and
anybody may change or end a running request by its id."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid

import grpc
import httpx
import pytest

from tests.support.cluster_fixture import Server
from tests.support.processes import ray_pids
from tests.support.sse import Reading, begin, go_on, read
from tokenflow.cluster.config import ClusterConfig
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub

pytestmark = pytest.mark.cluster

TOKENS = 90
INGRESS = "ray::ServeReplica:tokenflow:ingress"
GRACE_S = 6.0


@pytest.fixture(scope="module")
def two(server):
    """The server with two ingress processes."""
    before = server.config
    tree = before.model_dump(mode="json")
    tree["ingress"] |= {"count": 2, "reconnect_grace_s": GRACE_S}
    server.config = ClusterConfig.model_validate(tree)
    server.cluster.serve(server.config)
    yield server
    server.config = before
    server.cluster.serve(before)


@pytest.fixture
async def client(two):
    async with httpx.AsyncClient(base_url=two.url, timeout=60) as client:
        yield client


@pytest.fixture
async def stub(two):
    async with grpc.aio.insecure_channel(two.grpc) as channel:
        yield InferenceStub(channel)


def body(server, **more) -> dict:
    return {
        "model": server.model,
        "prompt": "The letter began: my dear friend, you will have heard by now that",
        "max_tokens": TOKENS,
        "temperature": 1.0,
        "seed": 7,
        "ignore_eos": True,
        "token_rate": 30,
        "stream_options": {"include_usage": True},
        **more,
    }


def message(server, request_id: str, **more) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=server.model,
        text="The letter began: my dear friend, you will have heard by now that",
        token_rate=30,
        request_id=request_id,
        resumable=True,
        sampling=pb.SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=7, ignore_eos=True),
        **more,
    )


def new_id() -> str:
    return f"r-{uuid.uuid4().hex}"


@pytest.mark.parametrize("kind", ["text", "chat", "choices"])
async def test_a_client_that_comes_back_has_the_whole_text_once(two, client, kind):
    more, path = {}, "/v1/completions"
    if kind == "chat":
        path = "/v1/chat/completions"
        more = {"messages": [{"role": "user", "content": "Tell me."}], "logprobs": True}
    elif kind == "choices":
        more = {"n": 3, "logprobs": 2, "max_tokens": 30}
    request = body(two, **more)
    whole = await begin(client, new_id(), request, path=path)
    reading = await begin(client, new_id(), request, path=path, until=3, **{"X-Resumable": "true"})
    begun = len(reading.ids)
    while not reading.done:
        # Again and again, at whatever ingress the connection ends up.
        await go_on(client, reading, until=len(reading.ids) + 6)
        assert len(reading.ids) > begun
        begun = len(reading.ids)
    if kind != "choices":
        assert reading.text == whole.text
    assert sorted(reading.text) == sorted(whole.text)
    assert reading.finish == whole.finish
    assert reading.usage["completion_tokens"] == whole.usage["completion_tokens"]
    assert len(set(reading.ids)) == len(reading.ids)
    assert len((await go_on(client, reading)).ids) == begun, "nothing is left to be said"


async def test_from_the_beginning_and_past_the_end(two, client):
    reading = await begin(client, new_id(), body(two), until=5, **{"X-Resumable": "true"})
    reading.last_id, text, reading.text = None, reading.text, ""
    await go_on(client, reading)
    assert reading.done and reading.text.startswith(text)
    path = f"/v1/streams/{reading.request_id}"
    for last, status in (
        ("nonsense", 400),
        (f"{reading.request_id}:x", 400),
        (f"other:{5}", 400),
        (f"{reading.request_id}:1.1.1", 400),
        (f"{reading.request_id}:{TOKENS + 3}", 416),
    ):
        refused = await client.get(path, headers={"Last-Event-ID": last})
        assert (refused.status_code, "error" in refused.json()) == (status, True), last


async def test_who_did_not_ask_for_it_is_cancelled_and_unknown_ids_are_404(two, client):
    reading = await begin(client, new_id(), body(two, max_tokens=900), until=3)
    await asyncio.to_thread(two.wait_idle)
    for request_id in (reading.request_id, "never-heard-of"):
        path = f"/v1/streams/{request_id}"
        for answer in (
            await client.get(path),
            await client.post(path, json={"paused": True}),
            await client.delete(path),
        ):
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "request_not_found"


async def test_who_does_not_come_back_in_time_is_forgotten(two, client):
    reading = await begin(
        client, new_id(), body(two, max_tokens=900), until=3, **{"X-Resumable": "true"}
    )
    await asyncio.to_thread(two.wait_idle, GRACE_S + 10)
    # What had ended before it was forgotten is kept for as long again.
    await asyncio.sleep(GRACE_S + 1)
    answer = await client.get(f"/v1/streams/{reading.request_id}")
    assert answer.status_code == 404


async def test_grpc_goes_on_at_an_offset(two, stub):
    alone = [t async for m in stub.Generate(message(two, new_id())) for t in m.token_ids]
    request = message(two, new_id())
    tokens: list[int] = []
    call = stub.Generate(request)
    async for part in call:
        tokens += part.token_ids
        if len(tokens) > 10:
            break
    call.cancel()
    text_after, last = "", None
    call = stub.Resume(pb.ResumeRequest(request_id=request.request_id, offset=len(tokens)))
    async for part in call:
        if part.token_ids:
            assert part.offset == len(tokens)
        tokens += part.token_ids
        text_after += part.text
        last = part
    assert tokens == alone and text_after
    assert last.finish_reason == "length" and last.usage.completion_tokens == TOKENS
    for offset, code in (
        (TOKENS + 2, grpc.StatusCode.OUT_OF_RANGE),
        (0, None),
    ):
        call = stub.Resume(pb.ResumeRequest(request_id=request.request_id, offset=offset))
        if code is None:
            assert [t async for m in call for t in m.token_ids] == alone
            continue
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(call))
        assert caught.value.code() == code
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(stub.Resume(pb.ResumeRequest(request_id="nobody"))))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_streams_outlive_their_ingress(two, client, stub):
    request = body(two, token_rate=15)
    alone = await begin(client, new_id(), request)
    alone_grpc = [t async for m in stub.Generate(message(two, new_id())) for t in m.token_ids]

    async def over_http() -> str:
        request_id, reading, sent = new_id(), None, {"X-Resumable": "true"}
        async with httpx.AsyncClient(base_url=two.url, timeout=60) as own:
            reading = Reading(request_id)
            headers = {"X-Request-Id": request_id, **sent}
            try:
                async with own.stream(
                    "POST", "/v1/completions", json={**request, "stream": True}, headers=headers
                ) as answer:
                    await read(answer, reading)
            except httpx.HTTPError:
                pass
        deadline = time.monotonic() + GRACE_S
        while not reading.done:
            try:
                async with httpx.AsyncClient(base_url=two.url, timeout=60) as own:
                    await go_on(own, reading)
            except (httpx.HTTPError, AssertionError):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
        return reading.text

    async def over_grpc() -> list[int]:
        asked = message(two, new_id())
        asked.token_rate = 15
        tokens: list[int] = []
        deadline = time.monotonic() + 30
        begun = False
        while len(tokens) < TOKENS:
            async with grpc.aio.insecure_channel(two.grpc) as channel:
                own = InferenceStub(channel)
                call = (
                    own.Resume(pb.ResumeRequest(request_id=asked.request_id, offset=len(tokens)))
                    if begun
                    else own.Generate(asked)
                )
                try:
                    async for part in call:
                        begun = True
                        tokens += part.token_ids
                except grpc.aio.AioRpcError:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.1)
        return tokens

    streams = [asyncio.create_task(over_http()) for _ in range(6)]
    calls = [asyncio.create_task(over_grpc()) for _ in range(4)]
    await asyncio.sleep(2)
    os.kill(ray_pids(INGRESS)[0], signal.SIGKILL)
    assert set(await asyncio.gather(*streams)) == {alone.text}
    for tokens in await asyncio.gather(*calls):
        assert tokens == alone_grpc
    await asyncio.to_thread(settled, two)


def settled(two: Server) -> None:
    """Wait until both ingresses are there and no connection has failed for two seconds: the proxy
    takes in a new one by restarting itself."""
    deadline = time.monotonic() + 60
    since = time.monotonic()
    while time.monotonic() - since < 2:
        assert time.monotonic() < deadline
        try:
            well = len(ray_pids(INGRESS)) == 2 and httpx.get(two.url + "/health").is_success
        except httpx.HTTPError:
            well = False
        if not well:
            since = time.monotonic()
        time.sleep(0.05)


async def test_a_running_request_is_changed_and_ended_by_its_id(two, client, stub):
    request_id = new_id()
    reading = asyncio.create_task(
        begin(client, request_id, body(two, max_tokens=900, token_rate=5))
    )
    path = f"/v1/streams/{request_id}"
    deadline = time.monotonic() + 20

    # Each call has a connection of its own, so that both ingresses get some.
    async def post(change) -> httpx.Response:
        async with httpx.AsyncClient(base_url=two.url, timeout=20) as own:
            return await own.post(path, json=change)

    while (await post({"token_rate": 40})).status_code == 404:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    for change in ({"paused": True}, {"consumed": 0, "paused": False}, {"token_rate": "max"}):
        for _ in range(3):
            answer = await post(change)
            assert (answer.status_code, answer.json()) == (200, {"id": request_id})
    for change in ({}, {"token_rate": 0}, {"paused": "yes"}, {"consumed": 100_000}, {"x": 1}):
        for _ in range(3):
            answer = await post(change)
            assert answer.status_code == 400, answer.text
    await stub.UpdateStream(pb.UpdateStreamRequest(request_id=request_id, token_rate=25))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.UpdateStream(pb.UpdateStreamRequest(request_id=request_id))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    async with httpx.AsyncClient(base_url=two.url, timeout=20) as own:
        assert (await own.delete(path)).json() == {"id": request_id, "cancelled": True}
    ended = await reading
    assert ended.error["code"] == "cancelled"
    await asyncio.to_thread(two.wait_idle)
