"""gRPC messages mean what the HTTP fields mean; broken ones are refused; the generated code is
that of the proto file."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.cluster.api.errors import INTERNAL_MESSAGE
from tokenflow.cluster.api.protocol import Call, Message, Sampling, build_sampling
from tokenflow.cluster.generation import Usage
from tokenflow.cluster.limits import Limits
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.mapping import call_from, response_from, status_of
from tokenflow.cluster.rpc.servicer import (
    SERVICE,
    MalformedRequest,
    RpcFailed,
    add_inference_to_server,
    check_message,
    metadata_value,
    rpc_failure,
    tolerant,
)
from tokenflow.replicas.errors import (
    CapacityError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    KVStoreError,
    RequestCancelledError,
    TokenFlowError,
)
from tokenflow.replicas.executor.base import TokenLogprobs
from tokenflow.replicas.output import TokenEvent

LIMITS = Limits()
ROOT = Path(__file__).resolve().parents[3]
INCLUDE = ROOT / "typings-root"
PROTO = "tokenflow/cluster/rpc/inference.proto"


def convert(request: pb.GenerateRequest, rate: str | None = None, limits: Limits = LIMITS) -> Call:
    return call_from(request, model_names=["m"], limits=limits, metadata_rate=rate)


def refusal(request: pb.GenerateRequest, rate: str | None = None) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        convert(request, rate)
    assert caught.value.message
    return caught.value


def sampling(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**fields))


# -- requests -------------------------------------------------------------------------------------


def test_a_bare_text_takes_all_defaults():
    assert convert(pb.GenerateRequest(text="Once upon")) == Call(
        model="m",
        prompts=("Once upon",),
        messages=(),
        sampling=Sampling(),
        token_rate=20.0,
        stream=True,
    )


def test_token_ids_and_chats():
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 0, 7]))
    assert convert(ids).prompts == ((5, 0, 7),)
    chat = pb.ChatMessages(
        messages=[
            pb.ChatMessage(role="system", content="Be brief."),
            pb.ChatMessage(role="user", content="Hi"),
        ]
    )
    call = convert(pb.GenerateRequest(chat=chat))
    assert call.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert call.is_chat and not call.prompts


def test_every_sampling_field_reaches_the_call():
    fields = {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.05,
        "seed": -(1 << 63),
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 5,
    }
    assert set(fields) | {"logit_bias", "stop", "stop_token_ids"} == {
        field.name for field in pb.SamplingParams.DESCRIPTOR.fields
    }
    request = sampling(**fields, logit_bias={9: 1.5}, stop=["a", "b"], stop_token_ids=[1, 2])
    assert convert(request).sampling == Sampling(
        **fields, logit_bias={9: 1.5}, stop=("a", "b"), stop_token_ids=(1, 2)
    )


def test_zeros_that_are_given_are_not_defaults():
    given = convert(sampling(temperature=0, top_k=0, seed=0, skip_special_tokens=False)).sampling
    assert (given.temperature, given.seed, given.skip_special_tokens) == (0.0, 0, False)


def test_the_rate_comes_from_the_message_then_the_metadata_then_the_default():
    assert convert(pb.GenerateRequest(text="x", token_rate=5), "30").token_rate == 5.0
    assert convert(pb.GenerateRequest(text="x", token_rate=5), "fast").token_rate == 5.0
    assert convert(pb.GenerateRequest(text="x"), "30.5").token_rate == 30.5
    assert convert(pb.GenerateRequest(text="x")).token_rate == 20.0


def test_as_fast_as_possible_is_the_rate_of_a_consumer_that_is_no_reader():
    fastest = pb.GenerateRequest(text="x", as_fast_as_possible=True)
    assert convert(fastest).token_rate == math.inf
    assert convert(fastest, "30").token_rate == math.inf
    assert convert(pb.GenerateRequest(text="x"), "max").token_rate == math.inf
    assert convert(pb.GenerateRequest(text="x", token_rate=5), "max").token_rate == 5.0
    unset = pb.GenerateRequest(text="x", as_fast_as_possible=False, token_rate=5)
    assert convert(unset).token_rate == 5.0
    assert convert(pb.GenerateRequest(text="x", as_fast_as_possible=False), "7").token_rate == 7.0


@pytest.mark.parametrize("rate", [5, 0, math.inf, math.nan])
def test_a_speed_and_as_fast_as_possible_exclude_each_other(rate):
    error = refusal(pb.GenerateRequest(text="x", as_fast_as_possible=True, token_rate=rate))
    assert error.param == "as_fast_as_possible"
    code, details = status_of(error)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("as_fast_as_possible and token_rate exclude each other")


def test_the_rate_keeps_its_place_on_the_wire():
    old = b"\x12\x01x" + b"\x29" + struct.pack("<d", 5.0)
    assert convert(pb.GenerateRequest.FromString(old)).token_rate == 5.0
    assert convert(pb.GenerateRequest.FromString(b"\x12\x01x\x40\x01")).token_rate == math.inf


def test_model_and_request_id():
    call = convert(pb.GenerateRequest(model="m", text="x", request_id="mine"))
    assert (call.model, call.request_id) == ("m", "mine")
    assert convert(pb.GenerateRequest(text="x")).request_id is None


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(),
        pb.GenerateRequest(text=""),
        pb.GenerateRequest(token_ids=pb.TokenIds()),
        pb.GenerateRequest(chat=pb.ChatMessages()),
    ],
)
def test_empty_prompts_are_refused(request_):
    error = refusal(request_)
    assert error.param == "input"
    assert "empty" in error.message


def test_an_unknown_model_is_404():
    error = refusal(pb.GenerateRequest(model="gpt-9", text="x"))
    assert (error.param, error.code, error.status) == ("model", "model_not_found", 404)


@pytest.mark.parametrize("rate", [0, -1, -0.0, 1e-308, math.nan, math.inf, -math.inf, 1000.1])
def test_rates_out_of_range_are_refused(rate):
    error = refusal(pb.GenerateRequest(text="x", token_rate=rate))
    assert error.param == "token_rate"
    assert "from 0.01 to 1000" in error.message and "as_fast_as_possible" in error.message


@pytest.mark.parametrize("rate", ["", "fast", "MAX", "nan", "inf", "0", "-1", "1e9"])
def test_bad_metadata_rates_are_refused(rate):
    error = refusal(pb.GenerateRequest(text="x"), rate)
    assert error.param == "token_rate"
    assert "x-token-rate must be a number from 0.01 to 1000" in error.message
    assert 'or "max"' in error.message


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (sampling(max_tokens=0), "max_tokens"),
        (sampling(max_tokens=-5), "max_tokens"),
        (sampling(stop=[""]), "stop"),
        (sampling(stop=["a", ""]), "stop"),
        (sampling(stop=["a"] * 17), "stop"),
        (sampling(stop=["x" * 257]), "stop"),
        (sampling(logit_bias={i: 1.0 for i in range(1025)}), "logit_bias"),
    ],
)
def test_wrong_sampling_values_name_the_field(request_, param):
    assert refusal(request_).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": math.inf}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {50: 1}}, "logit_bias"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"max_tokens": 99}, "max_tokens"),
    ],
)
def test_what_the_sampler_refuses_names_the_field(fields, param):
    call = convert(sampling(**fields))
    with pytest.raises(InvalidRequestError) as caught:
        build_sampling(call, prompt_tokens=10, max_model_len=100, vocab_size=50, seed=0)
    assert caught.value.param == param


@pytest.mark.parametrize("role", ["robot", ""])
def test_unknown_roles_are_refused_as_over_http(role):
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role=role, content="x")])
    assert refusal(pb.GenerateRequest(chat=chat)).param == "messages"


def test_long_request_ids_are_refused_as_over_http():
    assert convert(pb.GenerateRequest(text="x", request_id="x" * 256)).request_id == "x" * 256
    assert refusal(pb.GenerateRequest(text="x", request_id="x" * 257)).param == "request_id"


def test_cache_salts_have_the_limit_of_http():
    assert convert(pb.GenerateRequest(text="x")).cache_salt is None
    assert convert(pb.GenerateRequest(text="x", cache_salt="é" * 256)).cache_salt == "é" * 256
    error = refusal(pb.GenerateRequest(text="x", cache_salt="x" * 257))
    assert error.param == "cache_salt"
    assert status_of(error) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "cache_salt may have at most 256 characters.",
    )


def test_what_was_added_keeps_its_place_on_the_wire():
    assert pb.GenerateRequest.FromString(b"\x4a\x01s") == pb.GenerateRequest(cache_salt="s")
    assert pb.Usage.FromString(b"\x18\x05") == pb.Usage(cached_tokens=5)


# -- responses ------------------------------------------------------------------------------------


def event(offset: int, token: int, text: str, **fields) -> TokenEvent:
    return TokenEvent("r", offset, token, text, 1e9 + offset, **fields)


def test_a_response_in_the_middle_of_a_stream():
    message = response_from(
        "mine", [event(4, 11, "It"), event(5, 12, ""), event(6, 13, " né")], None
    )
    assert message == pb.GenerateResponse(
        request_id="mine",
        offset=4,
        token_ids=[11, 12, 13],
        text="It né",
        generated_at_unix_s=[1e9 + 4, 1e9 + 5, 1e9 + 6],
    )
    assert not message.HasField("usage")
    assert message.finish_reason == ""


def test_the_last_response_has_the_finish_reason_and_the_usage():
    message = response_from("mine", [event(0, 0, "", finish_reason="stop")], Usage(7, 1, 4))
    assert message.finish_reason == "stop"
    assert list(message.token_ids) == [0]
    assert message.usage == pb.Usage(prompt_tokens=7, completion_tokens=1, cached_tokens=4)
    assert response_from("mine", [event(0, 5, "x")], Usage(0, 0, 0)).HasField("usage")


def test_an_end_without_a_token_keeps_the_offset():
    alone = response_from("mine", [event(9, -1, "tail", finish_reason="length")], Usage(1, 9, 0))
    assert (alone.offset, list(alone.token_ids), alone.text) == (9, [], "tail")
    assert list(alone.generated_at_unix_s) == []
    after = response_from("mine", [event(8, 3, "x"), event(9, -1, "", finish_reason="stop")], None)
    assert (after.offset, list(after.token_ids), after.finish_reason) == (8, [3], "stop")


def test_logprobs_come_one_per_token():
    drawn = TokenLogprobs(-0.5, [(11, -0.5), (3, -math.inf)])
    message = response_from("mine", [event(0, 11, "a", logprobs=drawn), event(1, 3, "b")], None)
    assert [entry.chosen for entry in message.logprobs] == [-0.5]
    assert [(t.token_id, t.logprob) for t in message.logprobs[0].top] == [
        (11, -0.5),
        (3, -math.inf),
    ]
    assert pb.GenerateResponse.FromString(message.SerializeToString()) == message


# -- errors ---------------------------------------------------------------------------------------

SECRET = "secret/path at 0x7f"


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (InvalidRequestError("no"), grpc.StatusCode.INVALID_ARGUMENT, "no"),
        (InvalidRequestError("no", param="n"), grpc.StatusCode.INVALID_ARGUMENT, "n: no"),
        (InvalidRequestError("no", status=404), grpc.StatusCode.NOT_FOUND, "no"),
        (InvalidRequestError("no", status=413), grpc.StatusCode.RESOURCE_EXHAUSTED, "no"),
        (
            CapacityError("full", retry_after_s=2.5),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "full (retry after 2.5 s)",
        ),
        (RequestCancelledError("ended"), grpc.StatusCode.CANCELLED, "ended"),
        (
            EngineDeadError(SECRET),
            grpc.StatusCode.UNAVAILABLE,
            "No replica can serve this request right now.",
        ),
        (ConfigError(SECRET), grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE),
        (KVStoreError(SECRET), grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE),
        (TokenFlowError(SECRET), grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE),
        (RuntimeError(SECRET), grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE),
    ],
)
def test_each_error_has_its_status(error, code, details):
    assert status_of(error) == (code, details)


def test_the_status_stays_small_enough_to_be_sent():
    code, details = status_of(refusal(pb.GenerateRequest(model="q" * 100_000, text="x")))
    assert code == grpc.StatusCode.NOT_FOUND
    assert len(details.encode()) < 8192


class Context:
    """The parts of Serve's gRPC context that are used."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self._metadata = metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None:
        return self._metadata or None


def test_a_failure_sets_the_status_of_the_call():
    context = Context()
    failure = rpc_failure(context, InvalidRequestError("no", param="n"))
    assert isinstance(failure, RpcFailed)
    assert (context.code, context.details) == (grpc.StatusCode.INVALID_ARGUMENT, "n: no")
    rpc_failure(context, RuntimeError(SECRET))
    assert (context.code, context.details) == (grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE)


def test_metadata_is_found_by_key():
    context = Context(
        ("a", "1"), ("x-token-rate", "30"), ("x-token-rate", "40"), ("b-bin", b"\xff")
    )
    assert metadata_value(context, "x-token-rate") == "30"
    assert metadata_value(context, "b-bin") == "\ufffd"
    assert metadata_value(context, "c") is None
    assert metadata_value(Context(), "a") is None


# -- broken bytes ---------------------------------------------------------------------------------

deserialize = tolerant(pb.GenerateRequest)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\x12\x05ab",
        b"\x12\x02\xff\xfe",
        b"\x0a\x03\xed\xa0\x80",
        b"\x29\x00",
        b"\x1a\x02\x0a\x05",
        b"not a message at all",
    ],
)
def test_bytes_that_are_no_message_are_malformed(data):
    request = deserialize(data)
    assert isinstance(request, MalformedRequest)
    with pytest.raises(InvalidRequestError, match="not a valid message"):
        check_message(request, LIMITS)


def test_good_bytes_are_the_message():
    request = pb.GenerateRequest(text="née", token_rate=3.5, request_id="r")
    got = deserialize(request.SerializeToString())
    assert got == request
    check_message(got, LIMITS)
    assert deserialize(b"") == pb.GenerateRequest()


def test_a_message_that_is_too_large_is_413():
    request = pb.GenerateRequest(text="x" * 2000)
    check_message(request, Limits(max_body_bytes=request.ByteSize()))
    with pytest.raises(InvalidRequestError) as caught:
        check_message(request, Limits(max_body_bytes=request.ByteSize() - 1))
    assert (caught.value.code, caught.value.status) == ("request_too_large", 413)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_call_or_refused(data):
    request = deserialize(data)
    try:
        check_message(request, LIMITS)
        assert convert(request).stream
    except InvalidRequestError as error:
        assert error.message


class Server:
    def add_generic_rpc_handlers(self, handlers) -> None:
        (self.handler,) = handlers


def test_every_method_of_the_service_is_registered_tolerantly():
    servicer = SimpleNamespace(**{method.name: object() for method in SERVICE.methods})
    server = Server()
    add_inference_to_server(servicer, server)
    for method in SERVICE.methods:
        path = f"/tokenflow.v1.Inference/{method.name}"
        handler = server.handler.service(SimpleNamespace(method=path))
        assert handler.response_streaming == (method.name in ("Generate", "Resume"))
        assert not handler.request_streaming
        function = handler.unary_stream if handler.response_streaming else handler.unary_unary
        assert function is getattr(servicer, method.name)
        assert isinstance(handler.request_deserializer(b"\xff"), MalformedRequest)
    cancel = server.handler.service(SimpleNamespace(method="/tokenflow.v1.Inference/Cancel"))
    assert cancel.response_serializer(pb.CancelResponse(found=True)) == b"\x08\x01"


# -- the generated code ---------------------------------------------------------------------------


def protoc(*arguments: str) -> None:
    compiler = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    assert compiler.main(["protoc", f"-I{INCLUDE}", *arguments, str(INCLUDE / PROTO)]) == 0


def test_the_generated_code_describes_the_proto_file(tmp_path):
    out = tmp_path / "set"
    protoc(f"--descriptor_set_out={out}")
    (fresh,) = FileDescriptorSet.FromString(out.read_bytes()).file
    committed = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert without_json_names(committed) == without_json_names(fresh)


def without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    def clear(message) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            clear(nested)

    for message in file.message_type:
        clear(message)
    return file
