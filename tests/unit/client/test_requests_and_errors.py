"""Arguments become the message they mean, statuses the error that helps."""

from __future__ import annotations

import math

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration

from tokenflow.client.base import BaseClient
from tokenflow.client.errors import InvalidRequest, failure_of
from tokenflow.client.requests import checked_rate, generate_request, update_request
from tokenflow.cluster.rpc import inference_pb2 as pb


def request(prompt, **options) -> pb.GenerateRequest:
    return generate_request(prompt, **{"token_rate": None, "resumable": True, **options})


def test_text_ids_and_messages():
    assert request("Once").text == "Once"
    assert list(request([5, 6]).token_ids.ids) == [5, 6]
    chat = request([{"role": "user", "content": "Hi"}]).chat.messages
    assert [(m.role, m.content) for m in chat] == [("user", "Hi")]


def test_every_parameter_reaches_the_message():
    fields = {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.05,
        "seed": 11,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 5,
        "stop_token_ids": [1, 2],
        "logit_bias": {9: 1.5},
        "stop": ["a"],
    }
    assert set(fields) == {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    made = request("x", **{**fields, "stop": "a"}, model="m", request_id="r", cache_salt="s")
    assert made.sampling == pb.SamplingParams(**fields)
    assert (made.model, made.request_id, made.cache_salt, made.resumable) == ("m", "r", "s", True)


def test_what_is_not_given_is_absent():
    made = request("x", temperature=None)
    assert made.sampling == pb.SamplingParams() and not made.HasField("token_rate")
    assert len(made.request_id) == 32 and made.request_id != request("x").request_id


def test_rates():
    assert request("x", token_rate=5).token_rate == 5.0
    assert request("x", token_rate="max").as_fast_as_possible
    assert request("x", token_rate=math.inf).as_fast_as_possible
    assert checked_rate("max") == math.inf


@pytest.mark.parametrize("rate", [0, -1, math.nan, "fast", True, [3]])
def test_what_is_no_rate(rate):
    with pytest.raises(InvalidRequest, match="token_rate"):
        request("x", token_rate=rate)
    with pytest.raises(InvalidRequest, match="token_rate"):
        BaseClient("a:1", token_rate=rate)


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([], {}, "prompt"),
        (None, {}, "prompt"),
        ([{"role": "user"}], {}, "prompt"),
        ([{"role": "user", "content": 3}], {}, "prompt"),
        ([{"role": "user", "content": "x"}, "y"], {}, "prompt"),
        ([-1], {}, "prompt"),
        (["a", "b"], {}, "prompt"),
        ("x", {"max_token": 3}, "max_token"),
        ("x", {"max_tokens": "many"}, "wrong kind"),
        ("x", {"model": 3}, "wrong kind"),
        ("x", {"logit_bias": {"a": 1}}, "wrong kind"),
    ],
)
def test_what_cannot_be_sent_says_so(prompt, options, named):
    with pytest.raises(InvalidRequest, match=named):
        request(prompt, **options)


def test_updates_say_only_what_changes():
    assert update_request("r") == pb.UpdateStreamRequest(request_id="r")
    assert update_request("r", paused=False).HasField("paused")
    assert update_request("r", consumed=0).HasField("consumed")
    assert update_request("r", token_rate="max").as_fast_as_possible
    with pytest.raises(InvalidRequest, match="consumed"):
        update_request("r", consumed=-1)


@pytest.mark.parametrize("target", ["", [], ["a:1", ""]])
def test_a_client_needs_an_address(target):
    with pytest.raises(InvalidRequest, match="target"):
        BaseClient(target)


def rpc_error(details: str, *metadata: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*metadata),
        details,
    )


def length_delimited(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def retry_info(seconds: int, nanos: int) -> bytes:
    """A google.rpc.Status with a RetryInfo, and another detail before it."""
    delay = Duration(seconds=seconds, nanos=nanos).SerializeToString()
    url = "type.googleapis.com/google.rpc."
    other = Any(type_url=url + "DebugInfo", value=b"\x0a\x01x")
    info = Any(type_url=url + "RetryInfo", value=length_delimited(1, delay))
    head = b"\x08\x08" + length_delimited(2, b"busy")
    details = (length_delimited(3, detail.SerializeToString()) for detail in (other, info))
    return head + b"".join(details)


def test_when_to_come_back_is_read_wherever_it_stands():
    assert failure_of(rpc_error("busy (retry after 2.5 s)")).retry_after_s == 2.5
    assert failure_of(rpc_error("busy", ("retry-after", "3"))).retry_after_s == 3.0
    status = ("grpc-status-details-bin", retry_info(1, 500_000_000))
    assert failure_of(rpc_error("retry after 9 s", status)).retry_after_s == 1.5
    assert failure_of(rpc_error("too long")).retry_after_s is None
    broken = ("grpc-status-details-bin", b"\xff\xff"), ("retry-after", "soon")
    assert failure_of(rpc_error("busy", *broken)).retry_after_s is None
