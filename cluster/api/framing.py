"""Answers in OpenAI's framing: whole bodies, and server-sent events for streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

from tokenflow.cluster.api.progress import ALL_SENT, USAGE_SENT, Progress
from tokenflow.cluster.api.protocol import Call
from tokenflow.replicas.output import TokenEvent

DONE = b"data: [DONE]\n\n"
# Characters at which many clients end a line, though the event stream does not.
_LINE_SEPARATORS = (("\u2028", "\\u2028"), ("\u2029", "\\u2029"), ("\x85", "\\u0085"))
# Made once: `json.dumps` with arguments makes an encoder for each call.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
HEARTBEAT = b": waiting\n"
"""A comment of the event stream, which clients skip. Without an empty line: some take the end of an
event that has nothing but the id of the one before for an event."""


def sse(data: dict[str, Any], event_id: str | None = None) -> bytes:
    """One server-sent event."""
    text = _encode(data)
    for separator, escaped in _LINE_SEPARATORS:
        text = text.replace(separator, escaped)
    head = "" if event_id is None else f"id: {event_id}\n"
    return f"{head}data: {text}\n\n".encode()


def usage_body(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0
) -> dict[str, Any]:
    """`cached_tokens` are those of the prompt tokens that came out of a cache."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def model_body(name: str, created: int, max_model_len: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "tokenflow",
        "max_model_len": max_model_len,
    }


def new_id(call: Call) -> str:
    """The client's own id, or a new one in OpenAI's style."""
    if call.request_id:
        return call.request_id
    return ("chatcmpl-" if call.is_chat else "cmpl-") + uuid.uuid4().hex


class Answer:
    """Frames the answer to one call. `token_text` renders one token id, for logprobs.

    Of a stream, each event's id says where the client is after it. An answer that goes on
    elsewhere was begun at `created` (Unix seconds), and its client is at `progress`.
    """

    def __init__(
        self,
        call: Call,
        answer_id: str,
        model: str,
        token_text: Callable[[int], str],
        *,
        created: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._call = call
        self._token_text = token_text
        self._progress = progress or Progress()
        self._lengths: dict[int, int] = {}
        """Characters of each choice's text so far, for logprobs."""
        kind = "chat.completion" if call.is_chat else "text_completion"
        chunk = "chat.completion.chunk" if call.is_chat else "text_completion"
        created = int(time.time()) if created is None else created
        self._whole = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._chunk = {"id": answer_id, "object": chunk, "created": created, "model": model}

    # -- streams --------------------------------------------------------------------------------

    def opening(self, choices: int, echo: Seq[str] = ()) -> bytes:
        """What a stream begins with: the role of each chat choice, or the echoed prompts."""
        out = b""
        self._progress.begin(choices)
        for index in range(choices):
            if self._call.echo:
                self._lengths[index] = len(echo[index])
            if not self._progress.open(index):
                continue
            if self._call.is_chat:
                out += self._event(index, {"role": "assistant", "content": ""}, None, None)
            elif self._call.echo:
                out += self._event(index, echo[index], None, None)
        return out

    def skip(self, index: int, events: Seq[TokenEvent]) -> None:
        """Tokens of a choice that the client has from elsewhere."""
        if not self._call.is_chat:
            self._logprobs(index, events)

    def chunk(
        self, index: int, events: Seq[TokenEvent], usage: Callable[[], dict[str, Any]]
    ) -> bytes:
        """A batch of one choice's tokens; with its finish reason, if it ends here."""
        text = "".join(event.text for event in events)
        reason = events[-1].finish_reason
        logprobs = self._logprobs(index, events)
        drawn = sum(event.token_id >= 0 for event in events)
        self._progress.add(index, drawn)
        counted = usage() if self._call.continuous_usage else None
        times = self._generation_times(events)
        if not self._call.is_chat:
            self._progress.add(index, reason is not None)
            return self._event(index, text, logprobs, reason, counted, times)
        out = b""
        if text or (logprobs and drawn) or reason is None:
            out = self._event(index, {"content": text}, logprobs, None, counted, times)
            times = None
        if reason is not None:
            self._progress.add(index, 1)
            out += self._event(index, {}, None, reason, counted, times)
        return out

    def _generation_times(self, events: Seq[TokenEvent]) -> list[float] | None:
        """When each token was drawn, Unix seconds; of use only to whoever measures the server."""
        if not self._call.generation_times:
            return None
        return [round(event.generated_at, 6) for event in events if event.token_id >= 0]

    def closing(self, usage: dict[str, Any]) -> bytes:
        """The end of a stream."""
        out = b""
        if self._progress.close(USAGE_SENT) and self._call.include_usage:
            out += sse({**self._chunk, "choices": [], "usage": usage}, self._event_id)
        return out + (self._done() if self._progress.close(ALL_SENT) else b"")

    def failure(self, body: dict[str, Any]) -> bytes:
        """The end of a stream that failed with `body`; a client that comes back is told again."""
        return sse(body, self._event_id) + self._done()

    def _done(self) -> bytes:
        return b"id: " + self._event_id.encode() + b"\n" + DONE

    @property
    def _event_id(self) -> str:
        return f"{self._chunk['id']}:{self._progress}"

    def _event(
        self,
        index: int,
        content: Any,
        logprobs: dict[str, Any] | None,
        reason: str | None,
        usage: dict[str, Any] | None = None,
        generated_at: list[float] | None = None,
    ) -> bytes:
        key = "delta" if self._call.is_chat else "text"
        choice = {"index": index, key: content, "logprobs": logprobs, "finish_reason": reason}
        data: dict[str, Any] = {**self._chunk, "choices": [choice]}
        if self._call.include_usage or self._call.continuous_usage:
            data["usage"] = usage
        if generated_at is not None:
            data["tokenflow"] = {"generated_at": generated_at}
        return sse(data, self._event_id)

    # -- whole answers --------------------------------------------------------------------------

    def whole(
        self, choices: Seq[Seq[TokenEvent]], usage: dict[str, Any], echo: Seq[str] = ()
    ) -> dict[str, Any]:
        """The body of an answer that is not streamed; one list of events per choice."""
        bodies = []
        for index, events in enumerate(choices):
            text = "".join(event.text for event in events)
            if not self._call.is_chat and self._call.echo:
                text = echo[index] + text
                self._lengths[index] = len(echo[index])
            body: dict[str, Any] = {"index": index}
            if self._call.is_chat:
                body["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                body["text"] = text
            body["logprobs"] = self._logprobs(index, events)
            body["finish_reason"] = events[-1].finish_reason
            bodies.append(body)
        return {**self._whole, "choices": bodies, "usage": usage}

    # -- logprobs -------------------------------------------------------------------------------

    def _logprobs(self, index: int, events: Seq[TokenEvent]) -> dict[str, Any] | None:
        if self._call.sampling.logprobs is None:
            return None
        drawn = [event for event in events if event.logprobs is not None]
        if self._call.is_chat:
            return {"content": [self._chat_logprob(event) for event in drawn], "refusal": None}
        return self._completion_logprobs(index, drawn)

    def _chat_logprob(self, event: TokenEvent) -> dict[str, Any]:
        assert event.logprobs is not None
        return {
            **self._token(event.token_id, event.logprobs.chosen),
            "top_logprobs": [self._token(t, value) for t, value in event.logprobs.top],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": list(text.encode("utf-8", "replace")),
        }

    def _completion_logprobs(self, index: int, drawn: Iterable[TokenEvent]) -> dict[str, Any]:
        tokens, values, top, offsets = [], [], [], []
        at = self._lengths.get(index, 0)
        for event in drawn:
            assert event.logprobs is not None
            text = self._token_text(event.token_id)
            tokens.append(text)
            values.append(finite(event.logprobs.chosen))
            top.append({self._token_text(t): finite(v) for t, v in event.logprobs.top})
            offsets.append(at)
            at += len(text)
        self._lengths[index] = at
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": offsets,
        }


def finite(logprob: float) -> float:
    """JSON has no -Infinity and no NaN; -9999 is what OpenAI uses for "impossible"."""
    return logprob if logprob > -9999.0 else -9999.0
