"""A server with OpenAI's API and known timings: what the self-test measures, and what tests let
misbehave. It generates nothing; it only keeps to a script."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

from tokenflow.loadgen.targets.base import Clock

Fault = Literal["error event", "cut", "garbage", "no finish", "refusal", "silence"]
MODEL = "stub"
_BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class Script:
    """How one answer goes. Times in seconds after the request came in."""

    messages: tuple[tuple[float, int], ...]
    """(time, tokens) of each message, ascending."""
    generated: tuple[float, ...] | None = None
    """When each token is said to have been drawn; None = it is not said."""
    usage: Literal["running", "final", "none"] = "running"
    fault: Fault | None = None
    """What happens in the place of the end."""
    text: str = "word "
    """Of each token."""


def paced(first_s: float, per_token_s: float, tokens: int, *, each: int = 1) -> Script:
    """`tokens` at an even pace, `each` a message; a message goes when its last token is due, the
    first alone when it is."""
    counts = [1] + [min(each, tokens - i) for i in range(1, tokens, each)]
    messages, done = [], 0
    for count in counts:
        done += count
        messages.append((first_s + (done - 1) * per_token_s, count))
    return Script(tuple(messages))


@dataclass(slots=True)
class Served:
    """What the server itself knows of an answer; its clock's seconds."""

    body: dict[str, Any]
    rate: str | None
    """The X-Token-Rate header."""
    received_s: float
    sent: list[tuple[float, int]] = field(default_factory=list)


class StubServer:
    """Serves `script(body)` to every request; at most `slots` at a time, others wait in line."""

    def __init__(
        self,
        script: Callable[[dict[str, Any]], Script],
        *,
        slots: int | None = None,
        clock: Clock = time.monotonic,
        keep: bool = True,
    ) -> None:
        self.served: list[Served] = []
        """In order of arrival, when they are kept."""
        self._script = script
        self._clock = clock
        self._keep = keep
        self._slots = asyncio.Semaphore(slots) if slots else contextlib.nullcontext()
        self._app = web.Application(client_max_size=1 << 26)
        self._app.router.add_get("/v1/models", self._models)
        self._app.router.add_get("/v1/served", self._tell)
        self._app.router.add_post("/v1/chat/completions", self._answer)
        self._app.router.add_post("/v1/completions", self._answer)

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[str]:
        """Listen on this machine only; gives the base URL."""
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port, backlog=_BACKLOG)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _tell(self, _: web.Request) -> web.Response:
        """What was sent when, for a self-test in another process."""
        return web.json_response(
            [
                {"seed": s.body.get("seed"), "received_s": s.received_s, "sent": s.sent}
                for s in self.served
            ]
        )

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        served = Served(
            json.loads(await request.read()), request.headers.get("X-Token-Rate"), self._clock()
        )
        if self._keep:
            self.served.append(served)
        script = self._script(served.body)
        if script.fault == "refusal":
            error = {"message": "The queue is full.", "type": "rate_limit_error"}
            return web.json_response({"error": error}, status=429)
        async with self._slots:
            return await self._stream(request, script, served)

    async def _stream(
        self, request: web.Request, script: Script, served: Served
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = request.path.endswith("/chat/completions")
        begun = self._clock()
        done = 0
        for at, tokens in script.messages:
            await self._sleep_until(begun + at)
            drawn = script.generated and script.generated[done : done + tokens]
            done += tokens
            await response.write(_event(script, chat, tokens, done, drawn))
            if self._keep:
                served.sent.append((self._clock(), tokens))
        if script.fault == "silence":
            await asyncio.sleep(3600)
        elif script.fault == "cut":
            assert request.transport is not None
            request.transport.abort()
        else:
            await response.write(_ending(script, chat, done))
        return response

    async def _sleep_until(self, due: float) -> None:
        wait = due - self._clock()
        if wait > 0:
            await asyncio.sleep(wait)


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}


def _chunk(chat: bool, text: str, reason: str | None, **fields: Any) -> bytes:
    said: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, **said, "finish_reason": reason}
    kind = "chat.completion.chunk" if chat else "text_completion"
    data = {"id": "stub", "object": kind, "created": 0, "model": MODEL, "choices": [choice]}
    return b"data: " + json.dumps(data | fields).encode() + b"\n\n"


def _event(
    script: Script, chat: bool, tokens: int, done: int, drawn: tuple[float, ...] | None
) -> bytes:
    fields: dict[str, Any] = {}
    if script.usage == "running":
        fields["usage"] = _usage(done)
    if drawn is not None:
        fields["tokenflow"] = {"generated_at": list(drawn)}
    return _chunk(chat, script.text * tokens, None, **fields)


def _ending(script: Script, chat: bool, done: int) -> bytes:
    match script.fault:
        case "error event":
            return b'data: {"error": {"message": "The engine has failed.", "code": 500}}\n\n'
        case "garbage":
            return b'data: {"choices": [{"ind\n\n'
        case "no finish":
            return b"data: [DONE]\n\n"
    ending = _chunk(chat, "", "length")
    if script.usage != "none":
        ending += b"data: " + json.dumps({"choices": [], "usage": _usage(done)}).encode() + b"\n\n"
    return ending + b"data: [DONE]\n\n"
