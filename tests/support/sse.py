"""A client of one streamed answer over HTTP: what it has, and how it goes on with it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Reading:
    """A streamed answer, as far as its client has it."""

    request_id: str
    text: str = ""
    last_id: str | None = None
    usage: dict[str, Any] | None = None
    finish: str | None = None
    done: bool = False
    error: dict[str, Any] | None = None
    ids: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    """When each event with text came, seconds of the monotonic clock."""
    on_text: Callable[[int], None] | None = None
    """Is told of each piece of text which one it was."""

    def take(self, event: dict[str, str]) -> None:
        """One server-sent event."""
        self.last_id = event["id"]
        self.ids.append(event["id"])
        request_id = event["id"].rpartition(":")[0]
        self.request_id = self.request_id or request_id
        assert request_id == self.request_id
        if event["data"] == "[DONE]":
            self.done = True
            return
        data = json.loads(event["data"])
        self.error = data.get("error")
        self.usage = data.get("usage") or self.usage
        for choice in data.get("choices", ()):
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if text:
                self.arrivals.append(time.monotonic())
                if self.on_text is not None:
                    self.on_text(len(self.arrivals))
            self.text += text
            self.finish = choice["finish_reason"] or self.finish


async def read(answer: httpx.Response, reading: Reading, until: int | None = None) -> Reading:
    """Take events into `reading`; with `until`, leave after so many in all."""
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value
        elif not line and event:
            reading.take(event)
            event = {}
            if until is not None and len(reading.ids) >= until:
                break
    return reading


async def begin(
    client: httpx.AsyncClient,
    request_id: str,
    body: dict[str, Any],
    *,
    path: str = "/v1/completions",
    until: int | None = None,
    **headers: str,
) -> Reading:
    """POST a streamed request with an id of one's own."""
    sent = {"X-Request-Id": request_id, **headers}
    async with client.stream("POST", path, json={**body, "stream": True}, headers=sent) as answer:
        assert answer.status_code == 200, await answer.aread()
        return await read(answer, Reading(request_id), until)


async def go_on(client: httpx.AsyncClient, reading: Reading, until: int | None = None) -> Reading:
    """Come back to it after the last event."""
    headers = {} if reading.last_id is None else {"Last-Event-ID": reading.last_id}
    path = f"/v1/streams/{reading.request_id}"
    async with client.stream("GET", path, headers=headers) as answer:
        if answer.status_code == 204:
            return reading
        assert answer.status_code == 200, await answer.aread()
        return await read(answer, reading, until)


class Started:
    """Completions that tell when they have begun: the clients of tests that kill something."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self.begun = asyncio.Semaphore(0)

    async def read(self, **body: Any) -> Reading:
        """One greedy completion to its end; `begun` is released with its second piece of text."""
        request = {"model": self._model, "temperature": 0, "ignore_eos": True, "stream": True}
        request |= {"stream_options": {"include_usage": True}, **body}
        reading = Reading("", on_text=self._on_text)
        async with self._client.stream("POST", "/v1/completions", json=request) as answer:
            assert answer.status_code == 200, await answer.aread()
            await read(answer, reading)
        assert reading.usage and reading.usage["completion_tokens"] == body["max_tokens"]
        return reading

    def _on_text(self, pieces: int) -> None:
        if pieces == 2:
            self.begun.release()

    async def wait(self, streams: int) -> None:
        """Until so many have begun."""
        for _ in range(streams):
            await asyncio.wait_for(self.begun.acquire(), 60)
