"""gRPC messages to and from the types that HTTP uses too, so that both obey the same rules."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import Any, NoReturn

import grpc

from tokenflow.cluster.api.errors import INTERNAL_MESSAGE
from tokenflow.cluster.api.protocol import (
    MAX_CACHE_SALT_CHARS,
    Call,
    Message,
    Sampling,
    check_model,
    check_rate,
    check_request_id,
    check_role,
    check_stops,
    text_rate,
)
from tokenflow.cluster.generation import Usage
from tokenflow.cluster.limits import Limits
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.replicas.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    ReaderReplacedError,
    RequestCancelledError,
)
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange

logger = logging.getLogger("ray.serve")

_OPTIONAL = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "logprobs",
)


def call_from(
    request: pb.GenerateRequest,
    *,
    model_names: Collection[str],
    limits: Limits,
    metadata_rate: str | None = None,
) -> Call:
    """The call of a GenerateRequest. Raises InvalidRequestError.

    `metadata_rate` is the value of the `x-token-rate` metadata; the fields in the message win.
    """
    if request.request_id:
        check_request_id(request.request_id)
    if len(request.cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequestError(
            f"cache_salt may have at most {MAX_CACHE_SALT_CHARS} characters.", param="cache_salt"
        )
    model = request.model or next(iter(model_names))
    check_model(model, model_names)
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Message, ...] = ()
    kind = request.WhichOneof("input")
    if kind == "text":
        prompts = (request.text,)
    elif kind == "token_ids":
        prompts = (tuple(request.token_ids.ids),)
    elif kind == "chat":
        messages = tuple(
            Message(check_role(i, m.role), m.content) for i, m in enumerate(request.chat.messages)
        )
    if not messages and not (prompts and prompts[0]):
        raise InvalidRequestError("The prompt is empty.", param="input")
    return Call(
        model=model,
        prompts=prompts,
        messages=messages,
        sampling=_sampling(request.sampling, limits),
        token_rate=_rate(request, limits, metadata_rate),
        stream=True,
        request_id=request.request_id or None,
        cache_salt=request.cache_salt or None,
        resumable=request.resumable,
    )


def change_from(request: pb.UpdateStreamRequest, limits: Limits) -> ReaderChange:
    """The change of an UpdateStreamRequest. Raises InvalidRequestError."""
    rate: float | None = None
    if request.as_fast_as_possible:
        if request.HasField("token_rate"):
            _two_rates()
        rate = math.inf
    elif request.HasField("token_rate"):
        rate = check_rate(request.token_rate, limits, "; without a reader set as_fast_as_possible")
    change = ReaderChange(
        token_rate=rate,
        paused=request.paused if request.HasField("paused") else None,
        consumed=request.consumed if request.HasField("consumed") else None,
    )
    if change == ReaderChange():
        raise InvalidRequestError(
            "Give at least one of token_rate, as_fast_as_possible, paused and consumed."
        )
    return change


def _rate(request: pb.GenerateRequest, limits: Limits, metadata: str | None) -> float:
    if request.as_fast_as_possible:
        if request.HasField("token_rate"):
            _two_rates()
        return math.inf
    if request.HasField("token_rate"):
        return check_rate(request.token_rate, limits, "; without a reader set as_fast_as_possible")
    if metadata is not None:
        return text_rate(metadata, "The metadata x-token-rate", limits)
    return limits.default_token_rate


def _two_rates() -> NoReturn:
    raise InvalidRequestError(
        "as_fast_as_possible and token_rate exclude each other: a consumer that is no reader has "
        "no reading speed.",
        param="as_fast_as_possible",
    )


def _sampling(message: pb.SamplingParams, limits: Limits) -> Sampling:
    given: dict[str, Any] = {
        name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)
    }
    if given.get("max_tokens", 1) < 1:
        raise InvalidRequestError(
            f"max_tokens must be at least 1, got {given['max_tokens']}.", param="max_tokens"
        )
    if len(message.logit_bias) > limits.max_logit_bias:
        raise InvalidRequestError(
            f"logit_bias has more than {limits.max_logit_bias} entries.", param="logit_bias"
        )
    return Sampling(
        logit_bias=dict(message.logit_bias),
        stop=check_stops(tuple(message.stop), limits),
        stop_token_ids=tuple(message.stop_token_ids),
        **given,
    )


def response_from(
    request_id: str, events: Seq[TokenEvent], usage: Usage | None
) -> pb.GenerateResponse:
    """One message for a batch of events; `usage` on the last one."""
    tokens = [event for event in events if event.token_id >= 0]
    message = pb.GenerateResponse(
        request_id=request_id,
        offset=tokens[0].offset if tokens else events[0].offset,
        token_ids=[event.token_id for event in tokens],
        text="".join(event.text for event in events),
        generated_at_unix_s=[event.generated_at for event in tokens],
        finish_reason=events[-1].finish_reason or "",
    )
    for event in tokens:
        if event.logprobs is not None:
            message.logprobs.append(
                pb.TokenLogprobs(
                    chosen=event.logprobs.chosen,
                    top=[pb.TopLogprob(token_id=t, logprob=v) for t, v in event.logprobs.top],
                )
            )
    if usage is not None:
        message.usage.prompt_tokens = usage.prompt_tokens
        message.usage.completion_tokens = usage.completion_tokens
        message.usage.cached_tokens = usage.cached_tokens
    return message


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """(code, details) for any exception; internals are logged, never shown."""
    if isinstance(error, InvalidRequestError):
        code = {
            401: grpc.StatusCode.UNAUTHENTICATED,
            404: grpc.StatusCode.NOT_FOUND,
            409: grpc.StatusCode.ALREADY_EXISTS,
            413: grpc.StatusCode.RESOURCE_EXHAUSTED,
            416: grpc.StatusCode.OUT_OF_RANGE,
            429: grpc.StatusCode.RESOURCE_EXHAUSTED,
        }.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
        named = error.param is None or error.message.startswith(f"{error.param} ")
        return code, error.message if named else f"{error.param}: {error.message}"
    if isinstance(error, CapacityError):
        return (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{error} (retry after {error.retry_after_s:g} s)",
        )
    if isinstance(error, DeadlineExceededError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, str(error)
    if isinstance(error, RequestCancelledError):
        return grpc.StatusCode.CANCELLED, str(error)
    if isinstance(error, ReaderReplacedError):
        return grpc.StatusCode.ABORTED, str(error)
    if isinstance(error, EngineDeadError):
        return grpc.StatusCode.UNAVAILABLE, "No replica can serve this request right now."
    logger.error("request failed: %r", error, exc_info=error)
    return grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE
