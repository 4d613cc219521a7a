"""From keyword arguments to messages, checked as far as can be without the server."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, Literal, TypedDict, Unpack

from tokenflow.client.errors import InvalidRequest
from tokenflow.cluster.rpc import inference_pb2 as pb

Rate = float | Literal["max"]
"""Tokens per second at which the reader takes the text; "max" = no reader, as fast as it goes."""

Prompt = str | Seq[int] | Seq[Mapping[str, str]]
"""Text, token ids, or the messages of a conversation ({"role": ..., "content": ...})."""


class Options(TypedDict, total=False):
    """What may be said about a request beside prompt and rate; None or absent = the server's
    default. The meaning of the sampling parameters is that of `SamplingParams` in the proto."""

    model: str | None
    request_id: str | None
    """An id of one's own, for `cancel` and `resume` from elsewhere."""
    cache_salt: str | None
    """Only requests with the same salt share cached prefixes."""
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Seq[str] | None
    stop_token_ids: Seq[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    logprobs: int | None


_SAMPLING = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_OTHERS = ("model", "request_id", "cache_salt")


def generate_request(
    prompt: Prompt, *, token_rate: Rate | None, resumable: bool, **options: Unpack[Options]
) -> pb.GenerateRequest:
    """The message; without a request id it gets a new one. Raises InvalidRequest."""
    given: dict[str, Any] = {n: value for n, value in options.items() if value is not None}
    unknown = sorted(given.keys() - _SAMPLING - set(_OTHERS))
    if unknown:
        known = ", ".join(sorted(_SAMPLING | set(_OTHERS)))
        raise InvalidRequest(f"{', '.join(unknown)}: no such parameter; known are {known}.")
    request = pb.GenerateRequest(resumable=resumable)
    _set_prompt(request, prompt)
    _set_rate(request, token_rate)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        for name in _OTHERS:
            setattr(request, name, given.pop(name, ""))
        request.sampling.CopyFrom(pb.SamplingParams(**given))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"A parameter is of the wrong kind: {error}") from None
    request.request_id = request.request_id or uuid.uuid4().hex
    return request


def update_request(
    request_id: str,
    *,
    token_rate: Rate | None = None,
    paused: bool | None = None,
    consumed: int | None = None,
) -> pb.UpdateStreamRequest:
    """Raises InvalidRequest."""
    request = pb.UpdateStreamRequest(request_id=request_id)
    _set_rate(request, token_rate)
    if paused is not None:
        request.paused = paused
    if consumed is not None:
        try:
            request.consumed = consumed
        except (TypeError, ValueError):
            raise InvalidRequest(f"consumed: {consumed!r} is no number of tokens.") from None
    return request


def checked_rate(rate: Rate) -> float:
    """Tokens/s, infinite for "max". Raises InvalidRequest."""
    if rate == "max":
        return math.inf
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
        raise InvalidRequest(
            f'token_rate: {rate!r} is neither a number of tokens/s above 0 nor "max".'
        )
    return float(rate)


def _set_rate(request: pb.GenerateRequest | pb.UpdateStreamRequest, rate: Rate | None) -> None:
    if rate is None:
        return
    value = checked_rate(rate)
    if value == math.inf:
        request.as_fast_as_possible = True
    else:
        request.token_rate = value


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    items = list(prompt) if isinstance(prompt, Iterable) else []
    if not items:
        raise InvalidRequest("prompt: text, token ids or messages are needed; there is nothing.")
    try:
        if isinstance(items[0], Mapping):
            for message in items:
                if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                    raise InvalidRequest(
                        f"prompt: a message is a mapping with role and content, not {message!r}."
                    )
                request.chat.messages.add(role=message["role"], content=message["content"])
        else:
            request.token_ids.ids.extend(items)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"prompt: {error}.") from None
