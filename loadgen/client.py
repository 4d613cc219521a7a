"""A streaming client that counts tokens as the server reports them, not messages."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from tokenflow.loadgen.metrics import StreamRecord


async def stream_chat(
    client: httpx.AsyncClient, url: str, body: Mapping[str, Any], record: StreamRecord
) -> None:
    """POST `body` to `{url}/v1/chat/completions` as a stream and fill `record` as it comes in.

    Never raises for what the server or the network does: that is in `record.error`.
    """
    request = {
        **body,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "token_rate": "max" if record.token_rate == math.inf else record.token_rate,
    }
    record.sent_s = time.monotonic()
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=request) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", "replace")
                record.error = f"HTTP {response.status_code}: {text[:200]}"
            else:
                await _read_events(response, record)
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        record.error = f"not an OpenAI stream: {type(error).__name__}: {error}"
    record.finished_s = time.monotonic()
    if record.error is None and record.finish_reason is None:
        record.error = "the stream ended without a finish reason"


async def _read_events(response: httpx.Response, record: StreamRecord) -> None:
    received = 0
    async for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            record.error = str(event["error"].get("message", event["error"]))
            return
        usage = event.get("usage")
        if usage and usage["completion_tokens"] > received:
            record.arrivals.append((time.monotonic(), usage["completion_tokens"] - received))
            received = usage["completion_tokens"]
        for choice in event["choices"]:
            record.text += choice["delta"].get("content") or ""
            record.finish_reason = choice["finish_reason"] or record.finish_reason


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of an event stream. Only line feeds end them (the carriage return before one is
    white space to whoever strips it); httpx would also split at separators inside the text."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest
