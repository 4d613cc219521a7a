"""Answers and errors have OpenAI's shape, by the types of OpenAI's own client."""

from __future__ import annotations

import json
import logging
import math
import pickle
from typing import Any

import pytest
from openai._streaming import SSEDecoder
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tokenflow.cluster.api.errors import INTERNAL_MESSAGE, error_body, http_error
from tokenflow.cluster.api.framing import (
    DONE,
    HEARTBEAT,
    Answer,
    finite,
    model_body,
    new_id,
    sse,
    usage_body,
)
from tokenflow.cluster.api.protocol import Call, Message, Sampling
from tokenflow.replicas.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    KVStoreError,
    RequestCancelledError,
    TokenFlowError,
)
from tokenflow.replicas.executor.base import TokenLogprobs
from tokenflow.replicas.output import TokenEvent

WORDS = {1: "It", 2: " was", 3: " a", 4: " dark", 5: " night", 6: " né", 7: "\u2028", 8: "<eos>"}


def call(*, is_chat: bool = True, logprobs: int | None = None, **fields: Any) -> Call:
    return Call(
        model="m",
        prompts=() if is_chat else ("Say:",),
        messages=(Message("user", "Hi"),) if is_chat else (),
        sampling=Sampling(logprobs=logprobs),
        token_rate=20.0,
        **fields,
    )


def answer(asked: Call) -> Answer:
    return Answer(asked, "the-id", "m", WORDS.__getitem__)


def tokens(*ids: int, reason: str | None = None, logprobs: bool = False) -> list[TokenEvent]:
    """Events of these tokens; the last one carries the finish reason."""
    drawn = TokenLogprobs(-0.5, [(1, -0.5), (2, -1.25)]) if logprobs else None
    return [
        TokenEvent("r", i, token, WORDS[token], 1e9, drawn, reason if i == len(ids) - 1 else None)
        for i, token in enumerate(ids)
    ]


def stream(
    asked: Call,
    *batches: tuple[int, list[TokenEvent]],
    echo: tuple[str, ...] = (),
    choices: int = 1,
) -> bytes:
    """The body of a stream as the ingress writes it."""
    made = answer(asked)
    sent = 0

    def usage() -> dict[str, int]:
        return usage_body(3, sent, 2)

    out = made.opening(choices, echo)
    for index, events in batches:
        sent += len(events)
        out += made.chunk(index, events, usage)
    return out + made.closing(usage())


def payloads(body: bytes) -> list[dict[str, Any]]:
    """The JSON of each event; [DONE] comes last and only there."""
    events = body.split(b"\n\n")
    assert events.pop() == b""
    datas = []
    for event in events:
        first, data = event.split(b"\n")
        assert first.startswith(b"id: the-id:")
        assert b"\r" not in event
        datas.append(data)
    assert datas.pop() + b"\n\n" == DONE
    return [json.loads(data.removeprefix(b"data: ")) for data in datas]


def strict(kind: type[BaseModel], data: dict[str, Any]) -> Any:
    """Validated without conversions, and without a field that the type does not have."""
    parsed = kind.model_validate(data, strict=True)
    no_extras(parsed)
    return parsed


def no_extras(value: object) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, value
        for name in type(value).model_fields:
            no_extras(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            no_extras(item)


def chat_chunks(body: bytes) -> list[ChatCompletionChunk]:
    return [strict(ChatCompletionChunk, data) for data in payloads(body)]


def text_chunks(body: bytes) -> list[dict[str, Any]]:
    """Completion chunks; their type has no null finish reason, though OpenAI itself sends it."""
    chunks = payloads(body)
    for data in chunks:
        choices = [c | {"finish_reason": c["finish_reason"] or "stop"} for c in data["choices"]]
        strict(Completion, data | {"choices": choices})
    return chunks


# -- chat streams ---------------------------------------------------------------------------------


def test_a_chat_stream_has_the_role_first_and_the_finish_reason_last():
    body = stream(call(), (0, tokens(1)), (0, tokens(2, 3)), (0, tokens(4, reason="length")))
    chunks = chat_chunks(body)
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert [c.delta.content for c in middle] == ["It", " was a", " dark"]
    assert all(c.delta.role is None and c.finish_reason is None for c in (*middle, last)[:-1])
    assert first.finish_reason is None
    assert (last.finish_reason, last.delta.content, last.delta.role) == ("length", None, None)
    assert {(c.id, c.model, c.object, c.created) for c in chunks} == {
        ("the-id", "m", "chat.completion.chunk", chunks[0].created)
    }


def test_a_chat_stream_may_end_with_an_event_without_text():
    end = TokenEvent("r", 1, 8, "", 1e9, None, "stop")
    chunks = chat_chunks(stream(call(), (0, tokens(1)), (0, [end])))
    assert [c.choices[0].delta.content for c in chunks] == ["", "It", None]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_token_without_text_yet_is_still_sent():
    held = TokenEvent("r", 0, 6, "", 1e9)
    chunks = chat_chunks(stream(call(), (0, [held]), (0, tokens(1, reason="stop"))))
    assert [c.choices[0].delta.content for c in chunks] == ["", "", "It", None]


def test_without_stream_options_there_is_no_usage():
    for data in payloads(stream(call(), (0, tokens(1, reason="stop")))):
        assert "usage" not in data


@pytest.mark.parametrize("is_chat", [True, False])
def test_usage_is_null_until_the_last_chunk_has_it(is_chat):
    asked = call(is_chat=is_chat, include_usage=True)
    body = stream(asked, (0, tokens(1, 2)), (0, tokens(3, reason="stop")))
    *chunks, _ = chat_chunks(body) if is_chat else text_chunks(body)
    assert all(data["usage"] is None and data["choices"] for data in payloads(body)[:-1])
    assert len(chunks) == (4 if is_chat else 2)
    last = payloads(body)[-1]
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@pytest.mark.parametrize("is_chat", [True, False])
def test_continuous_usage_counts_up_on_every_chunk_with_tokens(is_chat):
    asked = call(is_chat=is_chat, include_usage=True, continuous_usage=True)
    body = stream(asked, (0, tokens(1)), (0, tokens(2, 3)), (0, tokens(4, reason="stop")))
    (chat_chunks if is_chat else text_chunks)(body)
    usages = [data["usage"] for data in payloads(body)]
    counts = [usage["completion_tokens"] for usage in usages if usage]
    assert counts == ([1, 3, 4, 4, 4] if is_chat else [1, 3, 4, 4])
    assert all(
        u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages if u
    )
    assert all(u["prompt_tokens_details"] == {"cached_tokens": 2} for u in usages if u)


def test_continuous_usage_alone_adds_no_last_chunk():
    asked = call(continuous_usage=True)
    data = payloads(stream(asked, (0, tokens(1)), (0, tokens(2, reason="stop"))))
    assert all(d["choices"] for d in data)
    assert data[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("is_chat", [True, False])
def test_generation_times_of_every_token_once_where_they_are_asked_for(is_chat):
    asked = call(is_chat=is_chat, generation_times=True)
    ended = TokenEvent("r", 4, -1, "", 1e9 + 9, None, "cancelled")
    body = stream(asked, (0, tokens(1)), (0, tokens(2, 3)), (0, [*tokens(4), ended]))
    times = [data["tokenflow"]["generated_at"] for data in payloads(body) if "tokenflow" in data]
    assert times == [[1e9], [1e9, 1e9], [1e9]]


def test_generation_times_of_a_token_without_text_are_not_lost():
    last = [TokenEvent("r", 1, 5, "", 1e9 + 1, None, "stop")]
    data = payloads(stream(call(generation_times=True), (0, tokens(1)), (0, last)))
    assert [d["tokenflow"]["generated_at"] for d in data if "tokenflow" in d] == [[1e9], [1e9 + 1]]


def test_nobody_else_sees_generation_times():
    asked = call(include_usage=True, continuous_usage=True)
    assert all("tokenflow" not in data for data in payloads(stream(asked, (0, tokens(1, 2)))))


def test_the_choices_of_a_chat_are_told_apart():
    body = stream(
        call(n=3),
        (0, tokens(1)),
        (2, tokens(2)),
        (0, tokens(3, reason="stop")),
        (1, tokens(4, 5, reason="length")),
        (2, tokens(6, reason="stop")),
        choices=3,
    )
    chunks = [chunk.choices[0] for chunk in chat_chunks(body)]
    assert [c.index for c in chunks if c.delta.role] == [0, 1, 2]
    for index, text, reason in ((0, "It a", "stop"), (1, " dark night", "length")):
        own = [c for c in chunks if c.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == text
        assert [c.finish_reason for c in own if c.finish_reason] == [reason]
        assert own[-1].finish_reason == reason


def test_chat_logprobs_in_a_stream():
    asked = call(logprobs=2)
    body = stream(asked, (0, tokens(1, 2, logprobs=True)), (0, tokens(6, reason="stop")))
    chunks = [chunk.choices[0] for chunk in chat_chunks(body)]
    first = chunks[1].logprobs
    assert first is not None and first.content is not None
    assert [t.token for t in first.content] == ["It", " was"]
    assert [t.bytes for t in first.content] == [list(b"It"), list(b" was")]
    assert [t.logprob for t in first.content] == [-0.5, -0.5]
    assert [(t.token, t.logprob) for t in first.content[0].top_logprobs] == [
        ("It", -0.5),
        (" was", -1.25),
    ]
    assert chunks[0].logprobs is None and chunks[-1].logprobs is None


def test_logprobs_that_nobody_asked_for_are_null():
    body = stream(call(), (0, tokens(1, reason="stop", logprobs=True)))
    assert all(data["choices"][0]["logprobs"] is None for data in payloads(body))


def test_an_impossible_token_has_a_finite_logprob():
    assert finite(-math.inf) == -9999.0
    assert finite(-0.25) == -0.25
    event = TokenEvent("r", 0, 1, "It", 1e9, TokenLogprobs(-math.inf, [(2, -math.inf)]), "stop")
    chunk = chat_chunks(stream(call(logprobs=1), (0, [event])))[1]
    token = chunk.choices[0].logprobs.content[0]
    assert (token.logprob, token.top_logprobs[0].logprob) == (-9999.0, -9999.0)


# -- completion streams ---------------------------------------------------------------------------


def test_a_completion_stream_has_its_finish_reason_in_the_last_chunk_only():
    asked = call(is_chat=False)
    chunks = text_chunks(stream(asked, (0, tokens(1)), (0, tokens(2, 3, reason="length"))))
    assert [c["choices"][0]["text"] for c in chunks] == ["It", " was a"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, "length"]
    assert all(c["object"] == "text_completion" and c["id"] == "the-id" for c in chunks)


def test_echo_puts_the_prompts_first():
    asked = call(is_chat=False, n=2, echo=True, include_usage=True)
    body = stream(
        asked,
        (1, tokens(1, reason="stop")),
        (0, tokens(2, reason="stop")),
        echo=("Say:", "Say:"),
        choices=2,
    )
    *chunks, _ = text_chunks(body)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["Say: was", "Say:It"]


def test_text_offsets_ascend_over_the_chunks_of_each_choice():
    asked = call(is_chat=False, logprobs=2, n=2)
    body = stream(
        asked,
        (0, tokens(1, 2, logprobs=True)),
        (1, tokens(5, logprobs=True)),
        (0, tokens(3, logprobs=True)),
        (0, tokens(4, reason="stop", logprobs=True)),
        (1, tokens(1, reason="stop", logprobs=True)),
        choices=2,
    )
    for index, offsets, words in (
        (0, [0, 2, 6, 8], ["It", " was", " a", " dark"]),
        (1, [0, 6], [" night", "It"]),
    ):
        own = [c["choices"][0] for c in text_chunks(body) if c["choices"][0]["index"] == index]
        text = "".join(c["text"] for c in own)
        assert [o for c in own for o in c["logprobs"]["text_offset"]] == offsets
        assert [t for c in own for t in c["logprobs"]["tokens"]] == words
        for offset, word in zip(offsets, words, strict=True):
            assert text[offset:].startswith(word)
    assert own[0]["logprobs"]["token_logprobs"] == [-0.5]
    assert own[0]["logprobs"]["top_logprobs"] == [{"It": -0.5, " was": -1.25}]


@pytest.mark.parametrize("streamed", [True, False])
def test_text_offsets_point_into_the_echoed_text(streamed):
    asked = call(is_chat=False, logprobs=0, echo=True)
    events = tokens(1, 2, reason="stop", logprobs=True)
    if streamed:
        chunks = [c["choices"][0] for c in text_chunks(stream(asked, (0, events), echo=("Say:",)))]
        text, logprobs = "".join(c["text"] for c in chunks), chunks[-1]["logprobs"]
    else:
        choice = answer(asked).whole([events], usage_body(1, 2), ["Say:"])["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert text[offset:].startswith(token)


# -- whole answers --------------------------------------------------------------------------------


def test_a_whole_chat():
    body = answer(call(n=2)).whole(
        [tokens(1, 2, reason="stop"), tokens(3, reason="length")], usage_body(4, 3, 1)
    )
    parsed = strict(ChatCompletion, body)
    assert [c.message.content for c in parsed.choices] == ["It was", " a"]
    assert [c.finish_reason for c in parsed.choices] == ["stop", "length"]
    assert [c.index for c in parsed.choices] == [0, 1]
    assert {c.message.role for c in parsed.choices} == {"assistant"}
    assert all(c.logprobs is None for c in parsed.choices)
    assert (parsed.object, parsed.id, parsed.model) == ("chat.completion", "the-id", "m")
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (4, 3)
    assert parsed.usage.total_tokens == 7
    assert parsed.usage.prompt_tokens_details.cached_tokens == 1


def test_a_whole_chat_with_logprobs():
    events = tokens(1, 2, reason="stop", logprobs=True)
    parsed = strict(ChatCompletion, answer(call(logprobs=2)).whole([events], usage_body(1, 2)))
    content = parsed.choices[0].logprobs.content
    assert [token.token for token in content] == ["It", " was"]
    assert all(len(token.top_logprobs) == 2 for token in content)


def test_a_whole_completion():
    asked = call(is_chat=False, n=2, logprobs=0)
    events = tokens(1, 2, 3, reason="length", logprobs=True)
    body = answer(asked).whole([events, events], usage_body(1, 6, 1))
    parsed = strict(Completion, body)
    assert parsed.usage.prompt_tokens_details.cached_tokens == 1
    assert [(c.index, c.text, c.finish_reason) for c in parsed.choices] == [
        (0, "It was a", "length"),
        (1, "It was a", "length"),
    ]
    for choice in parsed.choices:
        assert choice.logprobs.text_offset == [0, 2, 6]
        assert choice.logprobs.tokens == ["It", " was", " a"]


def test_a_whole_completion_with_echo():
    asked = call(is_chat=False, echo=True)
    body = answer(asked).whole([tokens(1, reason="stop")], usage_body(1, 1), ["Say: "])
    assert strict(Completion, body).choices[0].text == "Say: It"


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_stream_adds_up_to_the_whole(is_chat):
    asked = call(is_chat=is_chat, include_usage=True)
    events = tokens(1, 2, 6, 7, 5, reason="stop")
    whole = answer(asked).whole([events], usage_body(3, 5, 2))
    data = payloads(stream(asked, *[(0, [event]) for event in events]))
    deltas = [c for d in data for c in d["choices"]]
    if is_chat:
        text = "".join(c["delta"].get("content") or "" for c in deltas)
        assert text == whole["choices"][0]["message"]["content"]
    else:
        assert "".join(c["text"] for c in deltas) == whole["choices"][0]["text"]
    assert data[-1]["usage"] == whole["usage"]
    assert deltas[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]


# -- events on the wire ---------------------------------------------------------------------------

ODD = 'a\nb\r\nc\rd\x00\x0b\x0c\x1c\x85\u2028\u2029"\\/é\U0001f600\ufeff\ufffd data: [DONE]\n\n'


def test_odd_text_survives_an_event():
    raw = sse({"text": ODD})
    assert raw.count(b"\n") == 2 and raw.endswith(b"\n\n") and b"\r" not in raw
    assert json.loads(raw[len(b"data: ") :]) == {"text": ODD}


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_odd_text_survives_the_official_decoder_however_it_is_cut(size):
    event = TokenEvent("r", 0, 1, ODD, 1e9, None, "stop")
    body = stream(call(), (0, [event]))
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    *chunks, done = [event.data for event in SSEDecoder().iter_bytes(pieces)]
    assert done == "[DONE]"
    parsed = [strict(ChatCompletionChunk, json.loads(data)) for data in chunks]
    assert "".join(c.choices[0].delta.content or "" for c in parsed) == ODD


def test_heartbeats_are_no_events():
    body = HEARTBEAT + sse({"a": 1}) + HEARTBEAT + HEARTBEAT + DONE
    events = [event.data for event in SSEDecoder().iter_bytes([body])]
    assert events == ['{"a":1}', "[DONE]"]


def test_ids_are_the_clients_own_or_new_ones():
    assert new_id(call(request_id="mine")) == "mine"
    first, second = new_id(call()), new_id(call())
    assert first.startswith("chatcmpl-") and first != second
    assert new_id(call(is_chat=False)).startswith("cmpl-")


def test_a_model_card():
    assert model_body("m", 5, 1024) == {
        "id": "m",
        "object": "model",
        "created": 5,
        "owned_by": "tokenflow",
        "max_model_len": 1024,
    }


# -- errors ---------------------------------------------------------------------------------------

SECRET = "secret/path at 0x7f"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "headers"),
    [
        (InvalidRequestError("no"), 400, "invalid_request_error", None, {}),
        (InvalidRequestError("no", code="c"), 400, "invalid_request_error", "c", {}),
        (InvalidRequestError("no", code="c", status=404), 404, "invalid_request_error", "c", {}),
        (InvalidRequestError("no", status=413), 413, "invalid_request_error", None, {}),
        (CapacityError("full"), 429, "rate_limit_error", "overloaded", {"Retry-After": "1"}),
        (
            CapacityError("full", retry_after_s=2.1),
            429,
            "rate_limit_error",
            "overloaded",
            {"Retry-After": "3"},
        ),
        (
            CapacityError("full", retry_after_s=0.0),
            429,
            "rate_limit_error",
            "overloaded",
            {"Retry-After": "1"},
        ),
        (RequestCancelledError("ended"), 499, "invalid_request_error", "cancelled", {}),
        (EngineDeadError(SECRET), 503, "server_error", "unavailable", {"Retry-After": "1"}),
        (ConfigError(SECRET), 500, "server_error", "internal_error", {}),
        (CheckpointError(SECRET), 500, "server_error", "internal_error", {}),
        (KVStoreError(SECRET), 500, "server_error", "internal_error", {}),
        (TokenFlowError(SECRET), 500, "server_error", "internal_error", {}),
        (RuntimeError(SECRET), 500, "server_error", "internal_error", {}),
        (KeyError(SECRET), 500, "server_error", "internal_error", {}),
    ],
)
def test_each_error_has_its_status_and_shape(error, status, kind, code, headers):
    got_status, body, got_headers = error_body(error)
    assert (got_status, got_headers) == (status, headers)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["code"]) == (kind, code)
    assert body["error"]["message"]
    assert SECRET not in json.dumps(body)
    if status < 500:
        assert body["error"]["message"] == str(error)


def test_an_invalid_request_names_its_field():
    _, body, _ = error_body(InvalidRequestError("n is wrong", param="n", code="invalid_value"))
    assert body["error"] == {
        "message": "n is wrong",
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_value",
    }


def test_internal_errors_are_logged_and_not_shown(caplog):
    with caplog.at_level(logging.ERROR):
        _, body, _ = error_body(RuntimeError(SECRET))
    assert body["error"]["message"] == INTERNAL_MESSAGE
    assert SECRET in caplog.text


def test_an_error_inside_a_stream_is_one_event():
    made = answer(call())
    made.opening(1)
    body = made.failure(error_body(RuntimeError("x"))[1])
    (data,) = payloads(body)
    assert data["error"]["message"] == INTERNAL_MESSAGE


@pytest.mark.parametrize(
    ("status", "code"), [(404, "not_found"), (405, "method_not_allowed"), (418, None)]
)
def test_errors_of_the_http_layer(status, code):
    assert http_error(status, "No.")["error"] == {
        "message": "No.",
        "type": "invalid_request_error",
        "param": None,
        "code": code,
    }


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("no", param="n", code="c", status=404),
        CapacityError("full", retry_after_s=7.0),
        RequestCancelledError("ended"),
        EngineDeadError("gone"),
    ],
)
def test_errors_keep_their_answer_on_the_way_from_a_replica(error):
    assert error_body(pickle.loads(pickle.dumps(error))) == error_body(error)
