"""A plain grpc.aio client against a running cluster."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc import inference_pb2_grpc as pb_grpc

pytestmark = pytest.mark.cluster


@pytest.fixture
async def stub(server):
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        yield pb_grpc.InferenceStub(channel)


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
        (dict(text="word " * 5000), grpc.StatusCode.INVALID_ARGUMENT),
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
    total = server.metric("tokenflow_kv_total_blocks")
    server.wait_for_metric("tokenflow_kv_free_blocks", total, 10)
    call = stub.Generate(request(server, max_tokens=900, ignore_eos=True))
    async for message in call:
        if message.token_ids:
            break
    call.cancel()
    took = await asyncio.to_thread(server.wait_for_metric, "tokenflow_kv_free_blocks", total, 5)
    assert took < 1.0
