"""The load generator's client against a server of a few lines that says what each test wants."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tokenflow.loadgen.burst import Burst, BurstRequest, make_burst
from tokenflow.loadgen.client import stream_chat
from tokenflow.loadgen.metrics import StreamRecord, summarize

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
        self._script = script

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            assert request.startswith(b"POST /v1/chat/completions ")
            fields = dict(line.lower().split(b": ", 1) for line in request.split(b"\r\n")[1:-2])
            body = json.loads(await reader.readexactly(int(fields[b"content-length"])))
            self.requests.append(body)
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


async def stream(script: Script) -> StreamRecord:
    record = StreamRecord(20.0, time.monotonic())
    async with serving(script) as (_, url), httpx.AsyncClient(trust_env=False) as client:
        await stream_chat(client, url, {"model": "m"}, record)
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


async def test_the_request_asks_for_a_stream_with_usage_and_the_readers_rate():
    record = StreamRecord(12.5, time.monotonic())
    script = ok(event("a", 1, "stop"), DONE)
    async with serving(script) as (server, url), httpx.AsyncClient(trust_env=False) as client:
        await stream_chat(client, url, {"model": "m", "seed": 3, "stream": False}, record)
    assert server.requests == [
        {
            "model": "m",
            "seed": 3,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "token_rate": 12.5,
        }
    ]


async def test_without_a_reader_the_rate_is_max():
    record = StreamRecord(math.inf, time.monotonic())
    script = ok(event("a", 1, "stop"), DONE)
    async with serving(script) as (server, url), httpx.AsyncClient(trust_env=False) as client:
        await stream_chat(client, url, {"model": "m"}, record)
    assert record.ok
    assert [request["token_rate"] for request in server.requests] == ["max"]


# -- what goes wrong ------------------------------------------------------------------------------


def refused(status: str, body: bytes) -> Script:
    async def script(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        head(writer, status, f"Content-Length: {len(body)}")
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
        assert record.error is not None and "RemoteProtocolError" in record.error
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
    async with httpx.AsyncClient(trust_env=False) as client:
        await stream_chat(client, url, {}, record)
    assert record.error is not None and "ConnectError" in record.error
    assert record.finished_s is not None


async def test_a_client_that_waits_too_long_is_a_failure():
    async def script(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        head(writer, "200 OK", "Connection: close")
        writer.write(event("a", 1))
        await writer.drain()
        await asyncio.sleep(5)

    record = StreamRecord(20.0, time.monotonic())
    async with (
        serving(script) as (_, url),
        httpx.AsyncClient(trust_env=False, timeout=0.4) as client,
    ):
        await stream_chat(client, url, {}, record)
    assert record.error is not None and "ReadTimeout" in record.error
    assert record.tokens == 1


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


# -- bursts ---------------------------------------------------------------------------------------


def test_a_burst_is_the_same_for_the_same_seed():
    first = make_burst(40, max_tokens=9, token_rate=7.0, seed=5)
    assert first == make_burst(40, max_tokens=9, token_rate=7.0, seed=5)
    assert first != make_burst(40, max_tokens=9, token_rate=7.0, seed=6)
    assert first[:10] == make_burst(10, max_tokens=9, token_rate=7.0, seed=5)
    assert {(r.max_tokens, r.token_rate) for r in first} == {(9, 7.0)}
    assert len({r.message for r in first}) > 10
    assert len({r.seed for r in first}) == 40
    assert all("{" not in r.message for r in first)
    assert make_burst(0, max_tokens=9, token_rate=7.0, seed=5) == []


async def test_a_burst_is_sent_at_once_and_recorded_in_order():
    waiting: list[asyncio.StreamWriter] = []
    together = asyncio.Event()

    async def script(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        waiting.append(writer)
        if len(waiting) == 5:
            together.set()
        await together.wait()
        text = body["messages"][0]["content"]
        await ok(event(text, body["max_tokens"], "length"), DONE)(writer, body)

    requests = [BurstRequest(f"Tell {i}", 10 + i, 4.0 + i, i) for i in range(5)]
    async with serving(script) as (server, url):
        burst = Burst(url, "m", requests)
        assert burst.records == []
        records = await burst.run(10)
    assert records is burst.records
    assert all(record.ok for record in records)
    assert [record.text for record in records] == [f"Tell {i}" for i in range(5)]
    assert [record.tokens for record in records] == [10, 11, 12, 13, 14]
    assert [record.token_rate for record in records] == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert len({record.intended_s for record in records}) == 1
    body = next(b for b in server.requests if b["seed"] == 3)
    assert body["messages"] == [{"role": "user", "content": "Tell 3"}]
    assert (body["model"], body["max_tokens"], body["min_tokens"]) == ("m", 13, 13)
    assert body["token_rate"] == 7.0


async def hang_after_one_token(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    head(writer, "200 OK", "Connection: close")
    writer.write(event("a", 1))
    await writer.drain()
    await asyncio.sleep(5)


async def test_requests_that_are_late_are_given_up_and_fail():
    async def script(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        if body["seed"] == 0:
            await ok(event("done", 2, "stop"), DONE)(writer, body)
        else:
            await hang_after_one_token(writer, body)

    requests = [BurstRequest("Tell", 2, 4.0, seed) for seed in range(3)]
    async with serving(script) as (_, url):
        begun = time.monotonic()
        records = await Burst(url, "m", requests).run(0.8)
        assert time.monotonic() - begun < 4
    assert [record.ok for record in records] == [True, False, False]
    for record in records[1:]:
        assert record.error == "not finished after 0.8 s"
        assert (record.tokens, record.text) == (1, "a")
    assert summarize(records).failed == 2


async def test_a_request_that_was_given_up_waited_until_then():
    async def script(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        await asyncio.sleep(5)

    async with serving(script) as (_, url):
        records = await Burst(url, "m", [BurstRequest("Tell", 2, 4.0, 0)]).run(0.2)
    assert not records[0].ok
    assert summarize(records).ttft_max_s >= 0.2


async def test_one_refusal_does_not_disturb_the_others():
    async def script(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        if body["seed"] == 1:
            await refused("429 Too Many Requests", b"full")(writer, body)
        else:
            await ok(event("a", 1, "stop"), DONE)(writer, body)

    requests = [BurstRequest("Tell", 1, 4.0, seed) for seed in range(4)]
    async with serving(script) as (_, url):
        records = await Burst(url, "m", requests).run(10)
    assert [record.ok for record in records] == [True, False, True, True]
    assert records[1].error == "HTTP 429: full"
