"""Any server with OpenAI's streaming API, over HTTP/1.1 with kept connections.

aiohttp and not httpx, with which receiving an event costs four times the processor time
(benchmarks/loadgen/http_clients.py).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urljoin

import aiohttp

from tokenflow.loadgen.description import OpenAIServer
from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.prompts import id_prompt, load_tokenizer, text_prompt
from tokenflow.loadgen.server_gauges import read_gauges
from tokenflow.loadgen.targets.base import Behaver, Clock, Opened, TargetError, Turn
from tokenflow.loadgen.targets.counting import TokenCounter
from tokenflow.loadgen.workload import Ask

_SHOWN_CHARS = 250
_CONNECT_TIMEOUT_S = 10.0
_PROBE_TOKENS = 2
_PROBE_TIMEOUT_S = 120.0
_SAMPLE_TIMEOUT_S = 5.0
_EVENT_BUFFER_BYTES = 1 << 18
_KEEP_IDLE_S = 4.0
"""Servers close idle connections, uvicorn after 5 s; one that is closed must not be used again."""


@dataclass(frozen=True, slots=True)
class _Features:
    """Which extensions of the API the server takes."""

    usage: bool = True
    """`stream_options.include_usage`"""
    running_usage: bool = True
    """`stream_options.continuous_usage_stats` (vLLM) and `include_generation_times` (ours)."""
    exact: bool = True
    """`min_tokens` and `ignore_eos`"""


_FALLBACKS = (
    _Features(),
    _Features(running_usage=False),
    _Features(running_usage=False, exact=False),
    _Features(usage=False, running_usage=False, exact=False),
)
"""What is tried in turn, until the server takes a request."""


class OpenAITarget:
    """A server by its base URL. Never retries: a refusal is a result."""

    def __init__(
        self,
        server: OpenAIServer,
        *,
        content: str = "words",
        probe: bool = True,
        clock: Clock = time.monotonic,
    ) -> None:
        """Raises ConfigError for a tokenizer that cannot be loaded.

        Without `probe`, `open` takes server and model on trust and sends nothing.
        """
        self._server = server
        self._content = content
        self._probe = probe
        self._clock = clock
        self._tokenizer = load_tokenizer(server.tokenizer) if server.tokenizer else None
        self._features = _Features(exact=server.exact_output)
        self._model = server.model or ""
        self._session: aiohttp.ClientSession | None = None
        self._estimates = False
        """Whether the server counted the last answer's tokens at its end only."""
        self._metrics_url = urljoin(server.url, "/metrics")
        chat = server.endpoint == "chat"
        self._url = f"{server.url}/chat/completions" if chat else f"{server.url}/completions"

    async def open(self) -> Opened:
        """Find model and features with one short request. Raises TargetError."""
        key = os.environ.get(self._server.api_key_env)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, ttl_dns_cache=3600, keepalive_timeout=_KEEP_IDLE_S
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            read_bufsize=_EVENT_BUFFER_BYTES,
            trust_env=False,
        )
        opened = Opened(self._server.url, self._model)
        if self._probe:
            try:
                opened.model = self._model = self._model or await self._first_model()
                await self._try_features(opened.notes)
            except BaseException:
                await self.close()
                raise
        return opened

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def sample(self) -> dict[str, float] | None:
        assert self._session is not None
        try:
            async with (
                asyncio.timeout(_SAMPLE_TIMEOUT_S),
                self._session.get(self._metrics_url) as response,
            ):
                return read_gauges(await response.text(errors="replace"))
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    # -- requests -------------------------------------------------------------------------------

    def build(self, ask: Ask) -> Any:
        if self._content == "ids":
            return id_prompt(ask, self._tokenizer.get_vocab_size())  # type: ignore[union-attr]
        return text_prompt(ask, self._content, self._tokenizer)

    def asked(self, built: Any) -> str:
        return str(built)

    def body(self, ask: Ask, built: Any, history: Seq[Turn]) -> dict[str, Any]:
        """The request's JSON."""
        features = self._features
        body: dict[str, Any] = {"model": self._model, "stream": True}
        if self._server.endpoint == "chat":
            body["messages"] = [
                message
                for turn in history
                for message in (
                    {"role": "user", "content": turn.asked},
                    {"role": "assistant", "content": turn.answered},
                )
            ] + [{"role": "user", "content": built}]
        elif isinstance(built, str):
            said = "".join(f"{turn.asked}{turn.answered}\n" for turn in history)
            body["prompt"] = said + built
        else:
            body["prompt"] = built
        body |= {"max_tokens": ask.output_tokens, "seed": ask.seed}
        if features.exact:
            body |= {"min_tokens": ask.output_tokens, "ignore_eos": True}
        if features.usage:
            options = {"include_usage": True}
            if features.running_usage:
                options |= {"continuous_usage_stats": True, "include_generation_times": True}
            body["stream_options"] = options
        return body | self._server.extra_body

    async def stream(self, ask: Ask, built: Any, history: Seq[Turn], record: StreamRecord) -> None:
        assert self._session is not None
        data = json.dumps(self.body(ask, built, history)).encode()
        # As a header it disturbs no server that does not know it.
        rate = "max" if ask.token_rate == math.inf else f"{ask.token_rate:g}"
        headers = {"Content-Type": "application/json", "X-Token-Rate": rate}
        counter = TokenCounter(record, self._tokenizer)
        record.sent_s = self._clock()
        try:
            async with self._session.post(self._url, data=data, headers=headers) as response:
                if response.status != 200:
                    text = (await response.read()).decode("utf-8", "replace")
                    record.error = f"HTTP {response.status}: {_message(text)}"
                else:
                    behaver = Behaver(ask.behaviour, self._clock)
                    await self._read(response, record, counter, behaver)
        except (aiohttp.ClientError, OSError) as error:
            record.error = f"{type(error).__name__}: {error}"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            record.error = f"not an OpenAI stream: {type(error).__name__}: {error}"
        finally:
            record.finished_s = self._clock()
            counter.finish()
            self._estimates = counter.estimates
        if record.error is None and record.finish_reason is None:
            record.error = "the stream ended without a finish reason"

    async def _read(
        self,
        response: aiohttp.ClientResponse,
        record: StreamRecord,
        counter: TokenCounter,
        behaver: Behaver,
    ) -> None:
        async for lines in _lines(response):
            now = self._clock()
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    return
                event = json.loads(payload)
                if "error" in event:
                    record.error = _message(payload.decode("utf-8", "replace"))
                    return
                text = ""
                for choice in event["choices"]:
                    text += _text(choice)
                    record.finish_reason = choice.get("finish_reason") or record.finish_reason
                counter.event(now, text, event.get("usage"))
                times = event.get("tokenflow")
                if times:
                    record.generated += times["generated_at"]
            if await behaver.leaves(record):
                return

    # -- looking at the server ------------------------------------------------------------------

    async def _first_model(self) -> str:
        assert self._session is not None
        url = f"{self._server.url}/models"
        try:
            async with (
                asyncio.timeout(_PROBE_TIMEOUT_S),
                self._session.get(url) as response,
            ):
                text = await response.text(errors="replace")
                status = response.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise TargetError(self._unreachable(error)) from None
        if status in (401, 403):
            raise TargetError(self._refused(status, text))
        try:
            if status != 200:
                raise ValueError(f"HTTP {status}")
            return str(json.loads(text)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise TargetError(
                f"{url} lists no model ({error}); name one with --model, or check that the URL is "
                "the base of an OpenAI API."
            ) from None

    async def _try_features(self, notes: list[str]) -> None:
        """Raises TargetError when no form of request is taken, or tokens cannot be counted."""
        ask = Ask(0, 0.0, 8, _PROBE_TOKENS, math.inf, 1, 0)
        for features in _FALLBACKS:
            wanted = features.exact and self._server.exact_output
            self._features = replace(features, exact=wanted)
            record = StreamRecord(math.inf, self._clock())
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    await self.stream(ask, self.build(ask), (), record)
            except TimeoutError:
                raise TargetError(
                    f"{self._url} did not finish a request of {_PROBE_TOKENS} tokens in "
                    f"{_PROBE_TIMEOUT_S:g} s."
                ) from None
            error = record.error or ""
            if not error.startswith(("HTTP 400", "HTTP 422")):
                break
        error = record.error or ""
        if error.startswith(("HTTP 401", "HTTP 403")):
            raise TargetError(self._refused(int(error[5:8]), error[10:]))
        if error.startswith("HTTP"):
            raise TargetError(f"{self._url} refuses a request of {_PROBE_TOKENS} tokens: {error}")
        if error.startswith("Client") and record.first_token_s is None:
            raise TargetError(self._unreachable(error))
        if error == TokenCounter.NO_USAGE:
            raise TargetError(f"{self._url}: {error}")
        if error:
            raise TargetError(f"{self._url} gives no usable answer: {error}")
        if not self._features.exact and self._server.exact_output:
            notes.append("The server takes no min_tokens and ignore_eos: outputs may end early.")
        if self._estimates:
            notes.append(
                "The server counts tokens at the end only: when each arrived is estimated by its "
                "share of the text."
            )
        if not record.generated:
            notes.append("The server does not say when it generates: no server-side figures.")

    def _unreachable(self, error: object) -> str:
        reason = str(error) or type(error).__name__
        return f"cannot reach {self._server.url}: {reason}. Is the server running there?"

    def _refused(self, status: int, text: str) -> str:
        return (
            f"{self._server.url} refuses the API key (HTTP {status}: {_message(text)}); set "
            f"{self._server.api_key_env}."
        )


def _text(choice: Mapping[str, Any]) -> str:
    """What a choice of either endpoint adds."""
    if "delta" in choice:
        return choice["delta"].get("content") or ""
    return choice["text"] or ""


def _message(text: str) -> str:
    """What an error body says, shortened."""
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) and "message" in error else str(error)
    except (ValueError, LookupError, TypeError):
        pass
    return str(text)[:_SHOWN_CHARS]


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[list[bytes]]:
    """The lines of an event stream, those that arrive together at once. Only line feeds end them
    (the carriage return before one is white space to whoever strips it)."""
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]
