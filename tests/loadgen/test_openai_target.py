"""The benchmark's client against a server of a few lines that says what each test wants."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tokenflow.cluster.config import embedded_model
from tokenflow.loadgen.description import OpenAIServer
from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.targets.base import TargetError, Turn
from tokenflow.loadgen.targets.openai import OpenAITarget
from tokenflow.loadgen.workload import Ask

Script = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]
DONE = b"data: [DONE]\n\n"


def event(
    text: str | None, tokens: int | None, reason: str | None = None, end: str = "\n\n"
) -> bytes:
    """One chunk, as the ingress frames it; `tokens` is the count so far."""
    delta = {} if text is None else {"content": text}
    data: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    if tokens is not None:
        data["usage"] = {
            "prompt_tokens": 3,
            "completion_tokens": tokens,
            "total_tokens": 3 + tokens,
        }
    return f"data: {json.dumps(data, ensure_ascii=False)}{end}".encode()


def ok(*pieces: bytes, pause_s: float = 0.0, chunked: bool = False) -> Script:
    """A 200 whose body is these pieces, ended properly."""

    async def script(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        head(writer, "200 OK", "Transfer-Encoding: chunked" if chunked else "Connection: close")
        for piece in pieces:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        if chunked:
            writer.write(b"0\r\n\r\n")

    return script


def head(writer: asyncio.StreamWriter, status: str, *lines: str) -> None:
    text = "\r\n".join([f"HTTP/1.1 {status}", "Content-Type: text/event-stream", *lines])
    writer.write(text.encode() + b"\r\n\r\n")


class Server:
    """HTTP/1.1, one request per connection; `requests` are the bodies that came."""

    def __init__(self, script: Script) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self._script = script

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            if request.startswith(b"GET /v1/models "):
                models = b'{"data": [{"id": "first"}, {"id": "second"}]}'
                head(writer, "200 OK", f"Content-Length: {len(models)}", "Connection: close")
                writer.write(models)
                return
            assert request.startswith((b"POST /v1/chat/completions ", b"POST /v1/completions "))
            fields = dict(line.lower().split(b": ", 1) for line in request.split(b"\r\n")[1:-2])
            body = json.loads(await reader.readexactly(int(fields[b"content-length"])))
            self.requests.append(body)
            self.headers.append(fields)
            await self._script(writer, body)
            await writer.drain()
        except asyncio.CancelledError:
            pass  # the test is over while the script still hangs
        finally:
            writer.close()


@asynccontextmanager
async def serving(script: Script):
    server = Server(script)
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    try:
        yield server, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


def ask(tokens: int = 8, rate: float = 20.0, seed: int = 3) -> Ask:
    return Ask(0, 0.0, 2, tokens, rate, seed, 0)


@asynccontextmanager
async def client(url: str, *, probe: bool = False, **fields: Any):
    target = OpenAITarget(
        OpenAIServer.model_validate({"url": url, "model": "m"} | fields), probe=probe
    )
    target.opened = await target.open()
    try:
        yield target
    finally:
        await target.close()


async def stream(script: Script, **fields: Any) -> StreamRecord:
    record = StreamRecord(20.0, time.monotonic())
    async with serving(script) as (_, url), client(url, **fields) as target:
        await target.stream(ask(), "Hi", (), record)
    assert record.sent_s is not None and record.finished_s is not None
    assert record.intended_s <= record.sent_s <= record.finished_s
    return record


# -- a good stream --------------------------------------------------------------------------------


async def test_tokens_are_counted_by_usage_and_not_by_events():
    record = await stream(
        ok(
            event("", None),
            event("It", 1),
            event(" was a dark", 4),
            event("", 4),
            event(" night", 5),
            event(None, 5, "length"),
            DONE,
            pause_s=0.01,
        )
    )
    assert record.ok
    assert [count for _, count in record.arrivals] == [1, 3, 1]
    assert record.tokens == 5
    assert (record.text, record.finish_reason) == ("It was a dark night", "length")
    times = [at for at, _ in record.arrivals]
    assert times == sorted(times) and times[-1] - times[0] >= 0.015
    assert record.first_token_s == times[0]


async def test_a_last_chunk_without_choices_may_bring_the_rest():
    last = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":6}}\n\n'
    record = await stream(ok(event("a", 4), event(None, 4, "stop"), last, DONE))
    assert record.ok and record.tokens == 6


async def test_the_finish_reason_may_be_missing_until_the_end():
    first = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    record = await stream(ok(first, event("b", 2, "stop"), DONE))
    assert record.ok and record.tokens == 2


async def test_null_usage_and_null_content_are_nothing():
    choice = {"index": 0, "delta": {"content": None}, "finish_reason": None}
    data = b"data: %b\n\n" % json.dumps({"choices": [choice], "usage": None}).encode()
    record = await stream(ok(data, event("a", 1, "stop"), DONE))
    assert record.ok and (record.text, record.tokens) == ("a", 1)


@pytest.mark.parametrize("chunked", [False, True])
async def test_comments_blank_lines_other_fields_and_crlf_are_tolerated(chunked):
    record = await stream(
        ok(
            b": waiting\n\n",
            b": waiting\r\n\r\nevent: message\r\nid: 1\r\nretry: 100\r\n",
            event("a", 1, end="\r\n\r\n"),
            b"\n\n\n",
            event("b", 2).replace(b"data: ", b"data:"),
            b": waiting\n\n",
            event("c", 3, "stop"),
            DONE,
            chunked=chunked,
        )
    )
    assert record.ok and (record.text, record.tokens) == ("abc", 3)


async def test_events_may_be_cut_anywhere():
    body = event("né\U0001f600", 2) + event("b", 3, "stop") + DONE
    record = await stream(ok(*[body[i : i + 1] for i in range(len(body))], chunked=True))
    assert record.ok and (record.text, record.tokens) == ("né\U0001f600b", 3)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85"])
async def test_line_separators_inside_the_text_are_text(odd):
    record = await stream(ok(event(f"a{odd}b", 1), event("c", 2, "stop"), DONE))
    assert record.ok and record.text == f"a{odd}bc"


async def test_the_request_asks_for_a_stream_with_usage_of_exactly_the_length():
    record = StreamRecord(12.5, time.monotonic())
    script = ok(event("a", 1, "stop"), DONE)
    async with (
        serving(script) as (server, url),
        client(url, extra_body={"temperature": 0.5}) as target,
    ):
        await target.stream(ask(8, 12.5), "Hi", (), record)
    assert server.requests == [
        {
            "model": "m",
            "stream": True,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 8,
            "seed": 3,
            "min_tokens": 8,
            "ignore_eos": True,
            "stream_options": {
                "include_usage": True,
                "continuous_usage_stats": True,
                "include_generation_times": True,
            },
            "temperature": 0.5,
        }
    ]
    assert server.headers[0][b"x-token-rate"] == b"12.5"


async def test_without_a_reader_the_rate_is_max():
    record = StreamRecord(math.inf, time.monotonic())
    async with serving(ok(event("a", 1, "stop"), DONE)) as (server, url), client(url) as target:
        await target.stream(ask(rate=math.inf), "Hi", (), record)
    assert record.ok and server.headers[0][b"x-token-rate"] == b"max"


async def test_a_conversation_is_sent_whole():
    history = [Turn("one", "two"), Turn("three", "four")]
    for endpoint in ("chat", "completions"):
        said = ok(b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\n', DONE)
        async with serving(said) as (server, url), client(url, endpoint=endpoint) as target:
            await target.stream(ask(), "five", history, StreamRecord(20.0, 0.0))
        if endpoint == "chat":
            messages = server.requests[0]["messages"]
            assert [m["content"] for m in messages] == ["one", "two", "three", "four", "five"]
            assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
        else:
            assert server.requests[0]["prompt"] == "onetwo\nthreefour\nfive"


async def test_completions_have_text_and_may_take_token_ids():
    chunk = b'data: {"choices":[{"text":"ab","finish_reason":"length"}],"usage":%b}\n\n'
    script = ok(chunk % b'{"prompt_tokens":3,"completion_tokens":2}', DONE)
    record = StreamRecord(20.0, 0.0)
    async with serving(script) as (server, url), client(url, endpoint="completions") as target:
        await target.stream(ask(), [5, 6, 7], (), record)
    assert (record.text, record.tokens, record.prompt_tokens) == ("ab", 2, 3)
    assert server.requests[0]["prompt"] == [5, 6, 7] and "messages" not in server.requests[0]


async def test_generation_times_are_kept():
    said = json.loads(event("ab", 2, "stop")[6:]) | {"tokenflow": {"generated_at": [1.5, 2.5]}}
    record = await stream(ok(b"data: " + json.dumps(said).encode() + b"\n\n", DONE))
    assert record.generated == [1.5, 2.5]


async def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "secret")
    async with (
        serving(ok(event("a", 1, "stop"), DONE)) as (server, url),
        client(url, api_key_env="OTHER_KEY") as target,
    ):
        await target.stream(ask(), "Hi", (), StreamRecord(20.0, 0.0))
    assert server.headers[0][b"authorization"] == b"bearer secret"


async def test_a_server_may_close_every_connection():
    async with serving(ok(event("a", 1, "stop"), DONE)) as (server, url), client(url) as target:
        for _ in range(3):
            record = StreamRecord(20.0, 0.0)
            await target.stream(ask(), "Hi", (), record)
            assert record.ok
    assert len(server.requests) == 3


# -- looking at a server --------------------------------------------------------------------------


def refusing(*fields: str) -> Script:
    """Takes no request that has one of these fields, at the top or among the stream options."""

    async def script(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        options = body.get("stream_options", {})
        wrong = [name for name in fields if name in body or name in options]
        if wrong:
            message = json.dumps({"error": {"message": f"Unknown parameter: {wrong[0]}"}})
            await refused("400 Bad Request", message.encode())(writer, body)
        elif "continuous_usage_stats" in options:
            await ok(event("a", 1), event("b", 2, "stop"), DONE)(writer, body)
        elif "include_usage" in options:
            last = b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\n'
            await ok(event("a", None), event("b", None, "stop"), last, DONE)(writer, body)
        else:
            await ok(event("a", None), event("b", None, "stop"), DONE)(writer, body)

    return script


@pytest.mark.parametrize(
    ("unknown", "notes"),
    [
        ((), []),
        (("continuous_usage_stats",), ["share of the text"]),
        (("continuous_usage_stats", "min_tokens"), ["end early", "share of the text"]),
    ],
)
async def test_extensions_a_server_does_not_take_are_left_out(unknown, notes):
    async with serving(refusing(*unknown)) as (server, url), client(url, probe=True) as target:
        said = target.opened.notes
        asked = len(server.requests)
        record = StreamRecord(20.0, 0.0)
        await target.stream(ask(), "Hi", (), record)
    assert record.ok and record.tokens == 2 and len(server.requests) == asked + 1
    assert [sum(note in line for line in said) for note in notes] == [1] * len(notes)
    assert len(said) == len(notes) + 1 and "does not say when it generates" in said[-1]


async def test_a_server_without_usage_needs_a_tokenizer():
    script = refusing("stream_options", "min_tokens")
    async with serving(script) as (_, url):
        with pytest.raises(TargetError, match="no usage; give --tokenizer"):
            async with client(url, probe=True):
                pass
        tokenizer = str(embedded_model())
        async with client(url, probe=True, tokenizer=tokenizer) as target:
            record = StreamRecord(20.0, 0.0)
            await target.stream(ask(), "Hi", (), record)
    assert record.ok and record.tokens >= 1


async def test_the_first_model_is_taken():
    async with (
        serving(refusing()) as (server, url),
        client(url, probe=True, model=None) as target,
    ):
        assert target.opened.model == "first"
    assert server.requests[0]["model"] == "first"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        ("401 Unauthorized", b'{"error": {"message": "no key"}}', ["API key", "no key", "MY_KEY"]),
        ("503 Service Unavailable", b"busy", ["refuses a request", "HTTP 503: busy"]),
        ("400 Bad Request", b'{"error": "never"}', ["refuses a request", "never"]),
    ],
)
async def test_a_server_that_refuses_everything_is_no_target(status, body, words):
    async with serving(refused(status, body)) as (_, url):
        with pytest.raises(TargetError) as caught:
            async with client(url, probe=True, api_key_env="MY_KEY"):
                pass
    assert [word for word in words if word not in str(caught.value)] == []


async def test_a_server_that_is_not_there_is_no_target():
    async with serving(ok()) as (_, url):
        pass
    for model in ("m", None):
        with pytest.raises(TargetError, match=r"cannot reach http://127.*Is the server running"):
            async with client(url, probe=True, model=model):
                pass


async def test_something_else_than_a_model_server_is_no_target():
    async with serving(ok(b"<html>hello</html>")) as (_, url):
        with pytest.raises(TargetError, match="no usable answer"):
            async with client(url, probe=True):
                pass


# -- what goes wrong ------------------------------------------------------------------------------


def refused(status: str, body: bytes) -> Script:
    async def script(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        head(writer, status, f"Content-Length: {len(body)}", "Connection: close")
        writer.write(body)

    return script


async def test_a_refusal_keeps_status_and_message():
    body = b'{"error": {"message": "4096 requests are waiting.", "type": "rate_limit_error"}}'
    record = await stream(refused("429 Too Many Requests", body))
    assert not record.ok
    assert record.error is not None and record.error.startswith("HTTP 429: ")
    assert "4096 requests are waiting." in record.error
    assert (record.tokens, record.first_token_s, record.text) == (0, None, "")


async def test_a_refusal_of_any_length_and_encoding_is_shortened():
    record = await stream(refused("500 Internal Server Error", b"\xff" * 5000))
    assert record.error is not None and record.error.startswith("HTTP 500: ")
    assert len(record.error) < 300


async def test_an_error_event_ends_the_stream():
    error = b'data: {"error": {"message": "The request was cancelled.", "code": "cancelled"}}\n\n'
    record = await stream(ok(event("a", 1), error, DONE))
    assert not record.ok
    assert record.error == "The request was cancelled."
    assert (record.text, record.tokens) == ("a", 1)


async def test_an_error_event_after_the_finish_reason_is_still_an_error():
    record = await stream(ok(event("a", 1, "stop"), b'data: {"error": {"message": "late"}}\n\n'))
    assert (record.ok, record.error) == (False, "late")


async def test_an_error_without_a_message_is_shown_whole():
    record = await stream(ok(b'data: {"error": {"code": 5}}\n\n'))
    assert record.error is not None and "5" in record.error


async def test_a_stream_without_a_finish_reason_is_a_failure():
    for pieces in ([event("a", 1), DONE], [event("a", 1)], [DONE], []):
        record = await stream(ok(*pieces))
        assert (record.ok, record.error) == (False, "the stream ended without a finish reason")


def dropped(*pieces: bytes, length: int | None = None) -> Script:
    """The connection is lost in the middle of the body."""

    async def script(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        framing = f"Content-Length: {length}" if length else "Transfer-Encoding: chunked"
        head(writer, "200 OK", framing)
        for piece in pieces:
            writer.write(piece if length else b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()

    return script


async def test_a_dropped_connection_is_a_failure_with_what_had_come():
    for length in (None, 5000):
        record = await stream(dropped(event("a", 1), event("b", 3), length=length))
        assert not record.ok
        assert record.error is not None and "ClientPayloadError" in record.error
        assert (record.text, record.tokens) == ("ab", 3)


async def test_a_reset_connection_is_a_failure():
    async def script(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        writer.transport.abort()

    record = await stream(script)
    assert not record.ok and record.error is not None


async def test_a_server_that_is_not_there_is_a_failure():
    async with serving(ok()) as (_, url):
        pass
    record = StreamRecord(20.0, time.monotonic())
    async with client(url) as target:
        await target.stream(ask(), "Hi", (), record)
    assert record.error is not None and "ClientConnectorError" in record.error
    assert record.finished_s is not None


@pytest.mark.parametrize(
    "piece",
    [
        b"data: {oops\n\n",
        b"data: {}\n\n",
        b"data: []\n\n",
        b"data: 3\n\n",
        b'data: {"error": "boom"}\n\n',
        b'data: {"choices": [{"index": 0}]}\n\n',
        b'data: {"choices": [{"ind',
    ],
)
async def test_events_that_are_no_chunks_are_a_failure(piece):
    record = await stream(ok(event("a", 1), piece))
    assert not record.ok and record.error
    assert record.text == "a"
