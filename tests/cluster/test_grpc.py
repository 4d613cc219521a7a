"""A plain grpc.aio client against a running cluster."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub

pytestmark = pytest.mark.cluster


@pytest.fixture
async def stub(server):
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        yield InferenceStub(channel)


def request(server, text="The old man", **sampling) -> pb.GenerateRequest:
    sampling.setdefault("temperature", 0.0)
    sampling.setdefault("max_tokens", 24)
    return pb.GenerateRequest(
        model=server.model, text=text, token_rate=20, sampling=pb.SamplingParams(**sampling)
    )


async def collect(call) -> tuple[list[int], str, pb.GenerateResponse]:
    tokens, text, last = [], "", None
    async for message in call:
        if message.token_ids:
            assert message.offset == len(tokens)
        tokens += message.token_ids
        text += message.text
        last = message
    return tokens, text, last


async def test_generate_streams_tokens_text_and_usage(server, stub):
    tokens, text, last = await collect(stub.Generate(request(server, ignore_eos=True)))
    assert len(tokens) == 24 and text
    assert last.usage.completion_tokens == 24
    again, same, _ = await collect(stub.Generate(request(server, ignore_eos=True)))
    assert (again, same) == (tokens, text)


async def test_concurrent_streams_agree_with_each_other(server, stub):
    results = await asyncio.gather(
        *(collect(stub.Generate(request(server, ignore_eos=True))) for _ in range(16))
    )
    assert len({tuple(tokens) for tokens, _, _ in results}) == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (dict(model="nobody"), grpc.StatusCode.NOT_FOUND),
        (dict(token_rate=-1), grpc.StatusCode.INVALID_ARGUMENT),
        (dict(token_rate=float("nan")), grpc.StatusCode.INVALID_ARGUMENT),
        (dict(text=""), grpc.StatusCode.INVALID_ARGUMENT),
        (dict(cache_salt="x" * 257), grpc.StatusCode.INVALID_ARGUMENT),
        (dict(text="word " * 5000), grpc.StatusCode.INVALID_ARGUMENT),
        (dict(text="x" * (5 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (dict(sampling=pb.SamplingParams(max_tokens=100_000)), grpc.StatusCode.INVALID_ARGUMENT),
        (dict(sampling=pb.SamplingParams(max_tokens=0)), grpc.StatusCode.INVALID_ARGUMENT),
        (dict(sampling=pb.SamplingParams(temperature=-1)), grpc.StatusCode.INVALID_ARGUMENT),
        (dict(sampling=pb.SamplingParams(stop=["x"] * 999)), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_bad_requests_get_a_status(server, stub, change, code):
    message = request(server)
    for field, value in change.items():
        if field == "sampling":
            message.sampling.CopyFrom(value)
        else:
            setattr(message, field, value)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(message))
    assert caught.value.code() == code, caught.value.details()
    assert "Traceback" not in caught.value.details()


async def test_malformed_bytes_are_an_invalid_argument(server):
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        for data in (b"\xff\xff\xff", b"\x12\x02\xff\xfe"):
            call = channel.unary_stream(
                "/tokenflow.v1.Inference/Generate",
                request_serializer=lambda b: b,
                response_deserializer=pb.GenerateResponse.FromString,
            )(data)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_cancel_frees_the_blocks(server, stub):
    server.wait_idle()
    call = stub.Generate(request(server, max_tokens=900, ignore_eos=True))
    async for message in call:
        if message.token_ids:
            break
    call.cancel()
    assert await asyncio.to_thread(server.wait_idle) < 1.0


async def test_cancel_by_request_id_ends_the_stream_with_cancelled(server, stub):
    message = request(server, max_tokens=900, ignore_eos=True)
    message.request_id = "a-request-to-cancel"
    call = stub.Generate(message)
    messages = aiter(call)
    assert (await anext(messages)).request_id == "a-request-to-cancel"
    answer = await stub.Cancel(pb.CancelRequest(request_id="a-request-to-cancel"))
    assert answer.found
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in messages:
            pass
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert await asyncio.to_thread(server.wait_idle) < 1.0
    assert not (await stub.Cancel(pb.CancelRequest(request_id="a-request-to-cancel"))).found


async def test_model_info_and_the_rate_in_the_metadata(server, stub):
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert info.model == server.model
    assert (info.max_model_len, info.vocab_size) == (1024, 4096)
    assert info.default_token_rate == 20
    message = request(server, max_tokens=2)
    message.ClearField("token_rate")
    tokens, _, _ = await collect(stub.Generate(message, metadata=(("x-token-rate", "50"),)))
    assert len(tokens) == 2
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(message, metadata=(("x-token-rate", "-1"),)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_chat_and_token_ids_work_too(server, stub):
    chat = request(server, max_tokens=4)
    chat.chat.messages.add(role="user", content="Hello")
    tokens, _, last = await collect(stub.Generate(chat))
    assert tokens and last.usage.prompt_tokens > 1
    ids = request(server, max_tokens=4, logprobs=2)
    ids.token_ids.ids.extend([300, 301, 302])
    messages = [m async for m in stub.Generate(ids)]
    logprobs = [entry for m in messages for entry in m.logprobs]
    assert messages[-1].usage.prompt_tokens == 3
    assert len(logprobs) == messages[-1].usage.completion_tokens
    assert all(len(entry.top) == 2 for entry in logprobs)
    bad = request(server)
    bad.token_ids.ids.append(4096)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(bad))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
