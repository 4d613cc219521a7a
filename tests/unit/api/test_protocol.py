"""OpenAI bodies become Calls; whatever else arrives is refused with the field that is wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenflow.cluster.api import protocol
from tokenflow.cluster.api.protocol import (
    Call,
    Given,
    Message,
    Sampling,
    build_sampling,
    parse_body,
    parse_chat,
    parse_completion,
)
from tokenflow.cluster.limits import Limits
from tokenflow.replicas.errors import InvalidRequestError
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.scheduler.playback import Playback

LIMITS = Limits()
COMPLETION = {"model": "m", "prompt": "Once upon"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def completion(header_rate=None, limits=LIMITS, **changes) -> Call:
    return parse(parse_completion, COMPLETION | changes, header_rate, limits)


def chat(header_rate=None, limits=LIMITS, **changes) -> Call:
    return parse(parse_chat, CHAT | changes, header_rate, limits)


def parse(function, body, header_rate=None, limits=LIMITS) -> Call:
    """As the ingress does it: from bytes."""
    checked = parse_body(json.dumps(body).encode(), limits)
    return function(checked, model_names=["m"], limits=limits, headers=Given(rate=header_rate))


def refusal(function, *args, **kwargs) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        function(*args, **kwargs)
    assert caught.value.message
    return caught.value


def body_refusal(raw: bytes, limits: Limits = LIMITS) -> InvalidRequestError:
    return refusal(parse_body, raw, limits)


# -- what is understood ---------------------------------------------------------------------------


def test_a_bare_completion_takes_all_defaults():
    assert completion() == Call(
        model="m", prompts=("Once upon",), messages=(), sampling=Sampling(), token_rate=20.0
    )


def test_a_bare_chat_takes_all_defaults():
    call = chat()
    assert call == Call(
        model="m",
        prompts=(),
        messages=(Message("user", "Hello"),),
        sampling=Sampling(),
        token_rate=20.0,
    )
    assert call.is_chat and not completion().is_chat


SAMPLING_FIELDS = {
    "max_tokens": 7,
    "min_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "seed": -4,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
}


@pytest.mark.parametrize("make", [completion, chat])
def test_every_sampling_field_reaches_the_call(make):
    call = make(
        **SAMPLING_FIELDS, logit_bias={"12": 5, "3": -100}, stop=["\n", "END"], stop_token_ids=[2]
    )
    assert call.sampling == Sampling(
        **SAMPLING_FIELDS,
        logit_bias={12: 5.0, 3: -100.0},
        stop=("\n", "END"),
        stop_token_ids=(2,),
    )


@pytest.mark.parametrize(("given", "wanted"), [(True, True), (False, False), (None, False)])
def test_generation_times_are_an_option_of_the_stream(given, wanted):
    options = {"include_generation_times": given}
    assert chat(stream=True, stream_options=options).generation_times is wanted
    assert chat(stream=True, stream_options={}).generation_times is False


@pytest.mark.parametrize("make", [completion, chat])
def test_delivery_fields_reach_the_call(make):
    call = make(
        n=2,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        token_rate=33,
        request_id="mine",
        cache_salt="ours",
        user="someone",
    )
    assert (call.n, call.stream, call.include_usage, call.continuous_usage) == (2, True, True, True)
    assert (call.token_rate, call.request_id, call.cache_salt) == (33.0, "mine", "ours")


@pytest.mark.parametrize(
    ("options", "include", "continuous"),
    [
        (None, False, False),
        ({}, False, False),
        ({"include_usage": True}, True, False),
        ({"include_usage": None, "continuous_usage_stats": True}, False, True),
        ({"include_usage": False, "continuous_usage_stats": False}, False, False),
        ({"include_usage": True, "unknown": 1}, True, False),
    ],
)
def test_stream_options(options, include, continuous):
    call = completion(stream=True, stream_options=options)
    assert (call.include_usage, call.continuous_usage) == (include, continuous)


@pytest.mark.parametrize("make", [completion, chat])
def test_null_means_not_given(make):
    nulls = dict.fromkeys(
        [*SAMPLING_FIELDS, "logit_bias", "stop", "stop_token_ids", "n", "stream", "token_rate"]
    )
    assert (
        make(**nulls, stream_options=None, request_id=None, cache_salt=None, logprobs=None)
        == make()
    )


def test_unknown_fields_are_ignored():
    assert completion(guided_choice=["a"], metadata={"x": 1}, tools=[{}]) == completion()
    assert chat(store=True, parallel_tool_calls=False, tool_choice="none") == chat()


def test_the_rate_comes_from_the_body_then_the_header_then_the_default():
    assert completion(token_rate=5, header_rate="30").token_rate == 5.0
    assert chat(token_rate=5, header_rate="not a number").token_rate == 5.0
    assert chat(header_rate="30.5").token_rate == 30.5
    assert completion(token_rate=None, header_rate="30").token_rate == 30.0
    assert chat().token_rate == LIMITS.default_token_rate
    assert chat(limits=Limits(default_token_rate=7)).token_rate == 7.0


def test_max_is_the_rate_of_a_consumer_that_is_no_reader():
    assert completion(token_rate="max").token_rate == math.inf
    assert chat(token_rate="max", stream=True).token_rate == math.inf
    assert completion(header_rate="max").token_rate == math.inf
    assert chat(token_rate=None, header_rate="max").token_rate == math.inf
    assert chat(token_rate=5, header_rate="max").token_rate == 5.0
    assert chat(token_rate="max", header_rate="30").token_rate == math.inf


@pytest.mark.parametrize("model", [protocol._Completion, protocol._Chat])
def test_the_schema_of_the_rate_says_what_is_taken(model):
    schema = model.model_json_schema()["properties"]["token_rate"]
    assert schema["anyOf"] == [
        {"type": "number"},
        {"type": "string", "const": "max"},
        {"type": "null"},
    ]
    assert schema["default"] is None


def test_the_highest_rate_is_still_allowed():
    assert completion(token_rate=1000).token_rate == 1000.0
    assert completion(token_rate=0.01).token_rate == 0.01


@pytest.mark.parametrize("limit", [0.001, 0.01])
def test_the_slowest_rate_that_is_taken_can_be_played_back(limit):
    playback = Playback(
        completion(token_rate=limit, limits=Limits(min_token_rate=limit)).token_rate
    )
    for step in range(3):
        playback.generate(1e9 + step, 1 << 20)
        assert playback.buffer(1e9 + step) == ((step + 1) << 20) - 1


def test_max_completion_tokens_wins_over_max_tokens():
    assert chat(max_completion_tokens=5, max_tokens=9).sampling.max_tokens == 5
    assert chat(max_completion_tokens=5).sampling.max_tokens == 5
    assert chat(max_completion_tokens=None, max_tokens=9).sampling.max_tokens == 9
    assert completion(max_completion_tokens=5).sampling.max_tokens is None


@pytest.mark.parametrize("default", [1e-308, 5000])
def test_the_default_rate_lies_within_the_limits(default):
    with pytest.raises(ValidationError):
        Limits(default_token_rate=default)


@pytest.mark.parametrize(
    ("stop", "stops"),
    [
        ("END", ("END",)),
        (["a", "b"], ("a", "b")),
        ([], ()),
        (None, ()),
        (["x" * 256], ("x" * 256,)),
    ],
)
def test_stop_is_a_string_or_a_list(stop, stops):
    assert completion(stop=stop).sampling.stop == stops


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ("text",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        ("\U0001f600 \u2028", ("\U0001f600 \u2028",)),
    ],
)
def test_prompts_are_text_or_token_ids(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


def test_echo_and_the_harmless_legacy_fields():
    assert completion(echo=True).echo
    assert not completion(echo=False).echo
    assert completion(best_of=2, n=2, suffix="").n == 2


def test_logprobs_of_a_completion_are_a_number_and_of_a_chat_a_flag():
    assert completion(logprobs=0).sampling.logprobs == 0
    assert completion(logprobs=20).sampling.logprobs == 20
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).sampling.logprobs == 20
    assert chat(logprobs=False).sampling.logprobs is None


def test_text_parts_are_joined_and_missing_content_is_empty():
    call = chat(
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "Be "}]},
            {
                "role": "user",
                "name": "ann",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None},
            {"role": "tool"},
            {"role": "developer", "content": []},
        ]
    )
    assert call.messages == (
        Message("system", "Be "),
        Message("user", "ab"),
        Message("assistant", ""),
        Message("tool", ""),
        Message("developer", ""),
    )


def test_as_many_choices_as_the_limit_allows():
    assert completion(n=16).n == 16
    assert completion(n=8, prompt=["a", "b"]).n == 8
    assert chat(response_format={"type": "text"}, tools=[], n=16).n == 16


def test_an_empty_request_id_is_none():
    assert chat(request_id="").request_id is None
    assert chat(request_id="x" * 256).request_id == "x" * 256


def test_cache_salts_are_taken_up_to_their_limit():
    assert chat().cache_salt is None
    assert chat(cache_salt="s" * 256).cache_salt == "s" * 256
    assert completion(cache_salt="é" * 256).cache_salt == "é" * 256


# -- what is refused ------------------------------------------------------------------------------

WRONG_TYPES = [
    *[(name, value) for name in ("max_tokens", "min_tokens", "n") for value in ("1", 1.5, True)],
    *[(name, value) for name in ("temperature", "top_p") for value in ("1", [1], False, {})],
    *[(name, value) for name in ("top_k", "seed") for value in ("1", 1.0, 2.5, [1])],
    ("min_p", "0.1"),
    ("repetition_penalty", "x"),
    ("presence_penalty", []),
    ("frequency_penalty", {}),
    ("stream", 1),
    ("stream", "true"),
    ("logit_bias", [1]),
    ("logit_bias", {"1": "high"}),
    ("logit_bias", {"1": None}),
    ("stop", 3),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop", ["a", None]),
    ("stop_token_ids", 3),
    ("stop_token_ids", ["2"]),
    ("ignore_eos", "yes"),
    ("skip_special_tokens", 0),
    ("include_stop_str_in_output", 1),
    ("token_rate", "fast"),
    ("token_rate", ""),
    ("token_rate", "MAX"),
    ("token_rate", "inf"),
    ("token_rate", "20"),
    ("token_rate", True),
    ("token_rate", False),
    ("token_rate", {"max": 1}),
    ("token_rate", 10**400),
    ("token_rate", [20]),
    ("request_id", 5),
    ("request_id", "x" * 257),
    ("cache_salt", ""),
    ("cache_salt", "x" * 257),
    ("cache_salt", 5),
    ("cache_salt", ["x"]),
    ("user", 5),
    ("model", None),
    ("model", 5),
    ("model", ["m"]),
]


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_types_name_the_field(make, name, value):
    error = refusal(make, **{name: value})
    assert (error.param, error.code, error.status) == (name, "invalid_type", 400)
    assert error.message.startswith(name)


WRONG_VALUES = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("token_rate", 0),
    ("token_rate", -1),
    ("token_rate", -0.0),
    ("token_rate", 0.0099),
    ("token_rate", 1e-308),
    ("token_rate", 5e-324),
    ("token_rate", 1000.001),
    ("token_rate", 1e300),
    ("n", 0),
    ("n", -3),
    ("n", 17),
    ("n", 10**100),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 17),
    ("stop", "x" * 257),
    ("stop", ["a", "x" * 257]),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"": 1}),
    ("logit_bias", {"1.5": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
]


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_wrong_values_name_the_field(make, name, value):
    error = refusal(make, **{name: value})
    assert (error.param, error.code, error.status) == (name, "invalid_value", 400)


def test_a_wrong_max_completion_tokens_is_named():
    assert refusal(chat, max_completion_tokens=0).param == "max_completion_tokens"


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(
    "options",
    [{}, {"include_usage": True}, {"include_usage": False, "continuous_usage_stats": True}],
)
@pytest.mark.parametrize("stream", [False, None])
def test_stream_options_need_a_stream(make, options, stream):
    error = refusal(make, stream=stream, stream_options=options)
    assert (error.param, error.code) == ("stream_options", "invalid_value")


@pytest.mark.parametrize(
    "options", [3, "usage", [], {"include_usage": 1}, {"continuous_usage_stats": "yes"}]
)
def test_malformed_stream_options(options):
    error = refusal(completion, stream=True, stream_options=options)
    assert (error.param, error.code) == ("stream_options", "invalid_type")


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("rate", ["fast", "MAX", True, [20], 0, -1, 1e9, 10**400])
def test_a_refused_rate_lists_what_is_allowed(make, rate):
    message = refusal(make, token_rate=rate).message
    assert message.startswith(
        'token_rate must be a number from 0.01 to 1000 (tokens/s), "max" (no reader) or null'
    )


@pytest.mark.parametrize("rate", ["fast", "MAX", '"max"', "nan", "inf", "0", "null", "x" * 5000])
def test_a_refused_header_lists_what_is_allowed(rate):
    message = refusal(chat, header_rate=rate).message
    assert message.startswith(
        'The header X-Token-Rate must be a number from 0.01 to 1000 (tokens/s) or "max"'
    )
    assert repr(rate[:100]) in message and len(message) < 300


@pytest.mark.parametrize("rate", ["", "fast", "20 tokens", "0x10"])
def test_a_header_that_is_no_number(rate):
    error = refusal(completion, header_rate=rate)
    assert (error.param, error.code) == ("token_rate", "invalid_value")
    assert "X-Token-Rate" in error.message


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "-inf", "1e9", "1e999"])
def test_a_header_out_of_range(rate):
    error = refusal(chat, header_rate=rate)
    assert (error.param, error.code) == ("token_rate", "invalid_value")
    assert "1000" in error.message


@pytest.mark.parametrize("make", [completion, chat])
def test_an_unknown_model_is_404_and_names_the_known_one(make):
    error = refusal(make, model="gpt-9")
    assert (error.param, error.code, error.status) == ("model", "model_not_found", 404)
    assert "'gpt-9'" in error.message and "served here: m" in error.message
    assert len(refusal(make, model="q" * 10_000).message) < 300


@pytest.mark.parametrize(
    ("function", "body", "param"),
    [
        (parse_completion, {"prompt": "x"}, "model"),
        (parse_completion, {"model": "m"}, "prompt"),
        (parse_completion, CHAT, "prompt"),
        (parse_chat, {"messages": CHAT["messages"]}, "model"),
        (parse_chat, {"model": "m"}, "messages"),
        (parse_chat, COMPLETION, "messages"),
        (parse_chat, {"model": "m", "messages": [{"content": "x"}]}, "messages"),
        (parse_completion, {}, "model"),
    ],
)
def test_missing_fields(function, body, param):
    error = refusal(parse, function, body)
    assert (error.param, error.code, error.status) == (param, "missing_required_parameter", 400)


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["a", ""], [[1], []]])
def test_empty_prompts(prompt):
    error = refusal(completion, prompt=prompt)
    assert (error.param, error.code) == ("prompt", "invalid_value")
    assert "empty" in error.message


@pytest.mark.parametrize(
    "prompt", [None, 3, {"a": 1}, [1.5], [True], ["a", 1], [[1], "a"], [[1.0]], [["a"]], [None]]
)
def test_malformed_prompts(prompt):
    error = refusal(completion, prompt=prompt)
    assert (error.param, error.code) == ("prompt", "invalid_type")


def test_prompts_times_n_is_limited():
    error = refusal(completion, prompt=["a", "b"], n=9)
    assert (error.param, error.code) == ("n", "invalid_value")
    assert "16" in error.message
    assert refusal(completion, prompt=["a"] * 17).param == "n"


def test_numbers_of_any_length_are_refused_like_any_other():
    most = 10**4300 - 1
    assert refusal(completion, prompt=["a", "b"], n=most).param == "n"
    assert refusal(completion, n=-most).param == "n"
    assert refusal(chat, max_tokens=-most).param == "max_tokens"
    for name, value in (("max_tokens", most), ("min_tokens", most), ("top_k", -most)):
        assert refusal(sampling_of, completion(**{name: value})).param == name
    assert refusal(sampling_of, chat(stop_token_ids=[most])).param == "stop_token_ids"


@pytest.mark.parametrize("logprobs", [-1, 21, 10**30])
def test_logprobs_out_of_range(logprobs):
    error = refusal(completion, logprobs=logprobs)
    assert (error.param, error.code) == ("logprobs", "invalid_value")
    error = refusal(chat, logprobs=True, top_logprobs=logprobs)
    assert (error.param, error.code) == ("top_logprobs", "invalid_value")


@pytest.mark.parametrize("logprobs", [None, False])
def test_top_logprobs_need_logprobs(logprobs):
    error = refusal(chat, logprobs=logprobs, top_logprobs=3)
    assert (error.param, error.code) == ("top_logprobs", "invalid_value")


def test_logprobs_of_the_other_endpoint_are_refused():
    assert refusal(completion, logprobs=True).code == "invalid_type"
    assert refusal(chat, logprobs=3).code == "invalid_type"


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (chat, "tools", [{"type": "function"}]),
        (chat, "functions", [{"name": "f"}]),
        (chat, "audio", {"voice": "x"}),
        (chat, "response_format", {"type": "json_object"}),
        (chat, "response_format", {"type": "json_schema", "json_schema": {}}),
        (chat, "response_format", "text"),
        (completion, "best_of", 3),
        (completion, "suffix", "the end"),
    ],
)
def test_unsupported_features_say_so(make, name, value):
    error = refusal(make, **{name: value})
    assert (error.param, error.code, error.status) == (name, "unsupported_parameter", 400)
    assert error.message == f"{name} is not supported."


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], "invalid_value"),
        (None, "invalid_type"),
        ({}, "invalid_type"),
        ("Hello", "invalid_type"),
        (["Hello"], "invalid_type"),
        ([{"role": "robot", "content": "x"}], "invalid_value"),
        ([{"role": "", "content": "x"}], "invalid_value"),
        ([{"role": 3, "content": "x"}], "invalid_type"),
        ([{"role": "user", "content": 3}], "invalid_type"),
        ([{"role": "user", "content": ["x"]}], "invalid_type"),
        ([{"role": "user", "content": [{"text": "x"}]}], "invalid_type"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "invalid_type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "invalid_value"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "unsupported_parameter",
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "unsupported_parameter"),
    ],
)
def test_malformed_messages(messages, code):
    error = refusal(chat, messages=messages)
    assert (error.param, error.code, error.status) == ("messages", code, 400)


def test_the_wrong_message_is_counted():
    error = refusal(chat, messages=[{"role": "user"}, {"role": "robot"}])
    assert "messages.1.role" in error.message and "'robot'" in error.message
    assert len(refusal(chat, messages=[{"role": "q" * 10_000}]).message) < 300


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"{} {}", "invalid_json"),
        (b"{'model': 'm'}", "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": -Infinity}', "invalid_json"),
        (b'{"a": [Infinity]}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"\xef\xbb\xbf{}", "invalid_json"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "invalid_json"),
        (b"\xff{}", "invalid_utf8"),
        (b'{"a": "\xc3"}', "invalid_utf8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8"),
        (b'{"a": "\\ud800"}', "invalid_utf8"),
        (b'{"a": ["\\udc00x"]}', "invalid_utf8"),
        (b'{"\\ud83d": 1}', "invalid_utf8"),
        (b'{"a": "\\ude00\\ud83d"}', "invalid_utf8"),
    ],
)
def test_bodies_that_are_no_json_object(raw, code):
    error = body_refusal(raw)
    assert (error.param, error.code, error.status) == (None, code, 400)


def test_escaped_surrogate_pairs_are_text():
    assert parse_body(b'{"a": "\\ud83d\\ude00"}', LIMITS) == {"a": "\U0001f600"}


@pytest.mark.parametrize("depth", [200, 900])
def test_deep_nesting_below_the_limit_is_harmless(depth):
    nested = b"[" * depth + b"]" * depth
    ignored = parse_body(b'{"model": "m", "prompt": "\\u0041", "x": %b}' % nested, LIMITS)
    assert parse_completion(ignored, model_names=["m"], limits=LIMITS).prompts == ("A",)
    wrong = parse_body(b'{"model": "m", "prompt": %b}' % nested, LIMITS)
    assert refusal(parse_completion, wrong, model_names=["m"], limits=LIMITS).param == "prompt"


@pytest.mark.parametrize("name", ["token_rate", "temperature", "logit_bias"])
def test_numbers_too_large_for_a_float_are_refused(name):
    value = b'{"1": 1e999}' if name == "logit_bias" else b"1e999"
    body = parse_body(b'{"model": "m", "prompt": "x", "%b": %b}' % (name.encode(), value), LIMITS)
    error = refusal(parse_completion, body, model_names=["m"], limits=LIMITS)
    assert (error.param, error.code) == (name, "invalid_type")


def test_a_body_that_is_too_large_is_413():
    limits = Limits(max_body_bytes=1024)
    assert parse_body(b"{}".ljust(1024), limits) == {}
    error = body_refusal(b"{}".ljust(1025), limits)
    assert (error.param, error.code, error.status) == (None, "request_too_large", 413)
    assert "1024" in error.message


# -- anything at all ------------------------------------------------------------------------------

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FULL = {
    **SAMPLING_FIELDS,
    "model": "m",
    "logit_bias": {"1": 1},
    "stop": ["x"],
    "stop_token_ids": [1],
    "token_rate": 20,
    "n": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
    "request_id": "r",
    "cache_salt": "s",
    "user": "u",
}
FULL_COMPLETION = FULL | {"prompt": "x", "echo": True, "logprobs": 2, "best_of": 1, "suffix": None}
FULL_CHAT = FULL | {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    "logprobs": True,
    "top_logprobs": 2,
    "max_completion_tokens": 8,
    "tools": None,
    "response_format": {"type": "text"},
}
field_names = st.sampled_from(sorted({*FULL_COMPLETION, *FULL_CHAT})) | st.text(max_size=6)


def parses_or_refuses(function, body, header_rate=None) -> None:
    try:
        call = parse(function, body, header_rate)
        if body.get("token_rate") != "max" and header_rate != "max":
            assert LIMITS.min_token_rate <= call.token_rate <= LIMITS.max_token_rate
        assert 1 <= call.n * max(1, len(call.prompts)) <= LIMITS.max_choices
        assert bool(call.prompts) != bool(call.messages)
        params = sampling_of(call)
        assert 1 <= params.max_tokens <= 90
    except InvalidRequestError as error:
        assert error.message
        assert error.status in (400, 404)


def sampling_of(call: Call, **changes) -> SamplingParams:
    given = {"prompt_tokens": 10, "max_model_len": 100, "vocab_size": 50, "seed": 1} | changes
    return build_sampling(call, **given)


@settings(deadline=None)
@given(st.dictionaries(field_names, anything, max_size=6))
def test_any_json_object_parses_or_is_refused(body):
    parses_or_refuses(parse_completion, body)
    parses_or_refuses(parse_chat, body)


@settings(deadline=None)
@given(st.sampled_from(sorted(FULL_COMPLETION)), anything)
def test_a_completion_with_one_odd_field_parses_or_is_refused(name, value):
    parses_or_refuses(parse_completion, FULL_COMPLETION | {name: value})


@settings(deadline=None)
@given(st.sampled_from(sorted(FULL_CHAT)), anything)
def test_a_chat_with_one_odd_field_parses_or_is_refused(name, value):
    parses_or_refuses(parse_chat, FULL_CHAT | {name: value})


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"role": anything, "content": anything}), max_size=3))
def test_odd_messages_parse_or_are_refused(messages):
    parses_or_refuses(parse_chat, CHAT | {"messages": messages})


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_header_parses_or_is_refused(header_rate):
    parses_or_refuses(parse_completion, COMPLETION, header_rate)


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda s: s.encode("utf-8", "replace")))
def test_any_bytes_parse_or_are_refused(raw):
    try:
        assert isinstance(parse_body(raw, LIMITS), dict)
    except InvalidRequestError as error:
        assert error.code in ("invalid_json", "invalid_utf8")


@settings(deadline=None)
@given(st.data())
def test_a_cut_or_damaged_body_parses_or_is_refused(data):
    raw = bytearray(json.dumps(FULL_CHAT).encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        parse_chat(parse_body(bytes(raw), LIMITS), model_names=["m"], limits=LIMITS)
    except InvalidRequestError as error:
        assert error.message


def test_the_full_bodies_of_the_fuzz_are_valid():
    assert sampling_of(parse(parse_completion, FULL_COMPLETION)).max_tokens == 7
    assert sampling_of(parse(parse_chat, FULL_CHAT)).max_tokens == 8


# -- sampling parameters --------------------------------------------------------------------------


def test_without_max_tokens_a_chat_fills_the_context_and_a_completion_gets_16():
    assert sampling_of(chat()).max_tokens == 90
    assert sampling_of(completion()).max_tokens == 16
    assert sampling_of(completion(), prompt_tokens=95).max_tokens == 5
    assert sampling_of(chat(), prompt_tokens=99).max_tokens == 1


def test_every_field_reaches_the_sampler():
    call = completion(**SAMPLING_FIELDS, logit_bias={"7": 2}, stop="x", stop_token_ids=[2, 3])
    call = replace(call, sampling=replace(call.sampling, logprobs=4))
    given = SAMPLING_FIELDS | {"seed": 99}
    assert sampling_of(call, seed=99) == SamplingParams(
        **given, logit_bias={7: 2.0}, stop=("x",), stop_token_ids=(2, 3), logprobs=4
    )


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "param"),
    [(100, None, None), (101, 1, None), (10, 91, "max_tokens"), (99, 2, "max_tokens")],
)
@pytest.mark.parametrize("make", [completion, chat])
def test_what_exceeds_the_context_is_refused(make, prompt_tokens, max_tokens, param):
    error = refusal(sampling_of, make(max_tokens=max_tokens), prompt_tokens=prompt_tokens)
    assert (error.param, error.code, error.status) == (param, "context_length_exceeded", 400)
    assert "100 tokens" in error.message and str(prompt_tokens) in error.message


def test_the_whole_context_may_be_used():
    assert sampling_of(completion(max_tokens=90)).max_tokens == 90


def test_a_prompt_without_tokens_is_refused():
    assert refusal(sampling_of, completion(), prompt_tokens=0).param == "prompt"
    assert refusal(sampling_of, chat(), prompt_tokens=0).param == "messages"


@pytest.mark.parametrize("token", [-1, 50, 10**30])
def test_ids_outside_the_vocabulary_are_refused(token):
    for name, value in (("logit_bias", {str(token): 1}), ("stop_token_ids", [1, token])):
        error = refusal(sampling_of, completion(**{name: value}))
        assert (error.param, error.code) == (name, "invalid_value")
        assert "0 to 49" in error.message and str(token) in error.message


def test_ids_at_the_edge_of_the_vocabulary_are_taken():
    params = sampling_of(completion(logit_bias={"0": 1, "49": 1}, stop_token_ids=[0, 49]))
    assert set(params.logit_bias) == {0, 49}
    assert params.stop_token_ids == (0, 49)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 11),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": -100.5}),
    ],
)
@pytest.mark.parametrize("make", [completion, chat])
def test_values_out_of_the_samplers_range_name_the_field(make, name, value):
    error = refusal(sampling_of, make(max_tokens=16, **{name: value}))
    assert (error.param, error.code, error.status) == (name, "invalid_value", 400)
