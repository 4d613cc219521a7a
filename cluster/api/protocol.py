"""Parsing OpenAI requests: bytes in, a checked `Call` out, or an InvalidRequestError that names the
field. What vLLM adds to the API (top_k, min_p, ignore_eos, ...) is understood; fields nobody knows
are ignored, since clients send all sorts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenflow.cluster.limits import Limits
from tokenflow.cluster.tenancy import scoped_salt
from tokenflow.replicas.errors import InvalidRequestError
from tokenflow.replicas.request import ReaderChange
from tokenflow.replicas.sampling.params import MAX_LOGPROBS, SamplingParams

Number = Annotated[float, Field(allow_inf_nan=False)]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TOKEN_ID = re.compile(r"-?[0-9]{1,100}")
_SHOWN_CHARS = 100
"""How much of a client's own words an error repeats."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")
MAX_CACHE_SALT_CHARS = 256
_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default max_tokens of /v1/completions."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling fields of a request; None = not given."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One client request, whichever way it came. Either `prompts` or `messages` is set."""

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[Message, ...]
    sampling: Sampling
    token_rate: float
    """tokens/s; infinite = as fast as it can be had, by no reader."""
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    generation_times: bool = False
    echo: bool = False
    request_id: str | None = None
    cache_salt: str | None = None
    """Only calls with the same salt share cached prefixes."""
    resumable: bool = False
    """Whether the request outlives a lost connection for a while."""
    timeout_s: float | None = None
    """Seconds after which the client has no use for the rest; None = it waits."""
    tenant: str = ""
    """Who asks; empty where nobody is asked for that."""

    @property
    def prefix_salt(self) -> str | None:
        """The salt of its cached prefixes, which no other tenant has."""
        return scoped_salt(self.tenant, self.cache_salt)

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


@dataclass(frozen=True, slots=True)
class Given:
    """What a request's headers say; the body's own fields win. None = no such header."""

    rate: str | None = None
    """X-Token-Rate"""
    request_id: str | None = None
    """X-Request-Id"""
    resumable: str | None = None
    """X-Resumable"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_generation_times: bool | None = None


class _Common(_Strict):
    model: str
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    seed: int | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    token_rate: Number | Literal["max"] | None = None
    request_id: Annotated[str, Field(max_length=256)] | None = None
    resumable: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)] | None = None
    timeout: Number | None = None
    user: str | None = None


class _Completion(_Common):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class _ContentPart(_Strict):
    type: str
    text: str | None = None


class _Message(_Strict):
    role: str
    content: str | list[_ContentPart] | None = None


class _Chat(_Common):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class _Change(_Strict):
    model_config = ConfigDict(extra="forbid", strict=True)

    token_rate: Number | Literal["max"] | None = None
    paused: bool | None = None
    consumed: Annotated[int, Field(ge=0)] | None = None


_Request = TypeVar("_Request", bound=BaseModel)
_OTHER_RATES = ', "max" (no reader) or null (the default)'
_CHAT_UNSUPPORTED = ("tools", "functions", "audio")


def parse_body(raw: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object of a request body. Raises InvalidRequestError (413 when it is too long)."""
    if len(raw) > limits.max_body_bytes:
        too_long(limits)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _reject(f"The body is not valid UTF-8 (byte {error.start}).", None, "invalid_utf8")
    try:
        body = json.loads(text, parse_constant=_reject_constant)
    except RecursionError:
        _reject("The body is nested too deeply.", None, "invalid_json")
    except ValueError as error:
        _reject(f"The body is not valid JSON: {error}.", None, "invalid_json")
    if not isinstance(body, dict):
        _reject("The body must be a JSON object.", None, "invalid_json")
    if "\\u" in text:
        # json accepts escaped lone surrogates, which are no text and cannot be encoded again.
        try:
            json.dumps(body, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError):
            _reject("The body holds text that is not valid Unicode.", None, "invalid_utf8")
    return body


def too_long(limits: Limits) -> NoReturn:
    """Raise the error for a body above the limit."""
    raise InvalidRequestError(
        f"The body is larger than {limits.max_body_bytes} bytes.",
        code="request_too_large",
        status=413,
    )


def parse_completion(
    body: Mapping[str, Any],
    *,
    model_names: Collection[str],
    limits: Limits,
    headers: Given = Given(),
) -> Call:
    """A /v1/completions request. Raises InvalidRequestError."""
    request = _validate(_Completion, body, limits)
    check_model(request.model, model_names)
    n = request.n if request.n is not None else 1
    if request.best_of is not None and request.best_of != n:
        _unsupported("best_of")
    if request.suffix:
        _unsupported("suffix")
    prompts = _prompts(request.prompt)
    _check_choices(n, len(prompts), limits)
    return Call(
        model=request.model,
        prompts=prompts,
        messages=(),
        sampling=_sampling(request, request.max_tokens, request.logprobs, limits),
        n=n,
        echo=bool(request.echo),
        **_delivery(request, limits, headers),
    )


def parse_chat(
    body: Mapping[str, Any],
    *,
    model_names: Collection[str],
    limits: Limits,
    headers: Given = Given(),
) -> Call:
    """A /v1/chat/completions request. Raises InvalidRequestError."""
    for name in _CHAT_UNSUPPORTED:
        if body.get(name):
            _unsupported(name)
    response_format = body.get("response_format")
    if response_format is not None and response_format != {"type": "text"}:
        _unsupported("response_format")
    request = _validate(_Chat, body, limits)
    check_model(request.model, model_names)
    n = request.n if request.n is not None else 1
    _check_choices(n, 1, limits)
    logprobs = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
    elif request.top_logprobs is not None:
        _reject("top_logprobs needs logprobs to be true.", "top_logprobs")
    limit, limit_name = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        limit, limit_name = request.max_completion_tokens, "max_completion_tokens"
    return Call(
        model=request.model,
        prompts=(),
        messages=_messages(request.messages),
        sampling=_sampling(request, limit, logprobs, limits, limit_name),
        n=n,
        **_delivery(request, limits, headers),
    )


def build_sampling(
    call: Call, *, prompt_tokens: int, max_model_len: int, vocab_size: int, seed: int
) -> SamplingParams:
    """The engine's parameters for one choice. Raises InvalidRequestError.

    Without max_tokens a chat may fill the context, a completion gets 16 tokens.
    """
    asked = call.sampling
    room = max_model_len - prompt_tokens
    if prompt_tokens < 1:
        _reject("The prompt is empty.", "messages" if call.is_chat else "prompt")
    if room < 1:
        _too_long_context(max_model_len, prompt_tokens, None)
    max_tokens = asked.max_tokens
    if max_tokens is None:
        max_tokens = room if call.is_chat else min(room, _DEFAULT_COMPLETION_TOKENS)
    if max_tokens > room:
        _too_long_context(max_model_len, prompt_tokens, max_tokens)
    for name, ids in (("logit_bias", asked.logit_bias), ("stop_token_ids", asked.stop_token_ids)):
        wrong = [i for i in ids if not 0 <= i < vocab_size]
        if wrong:
            _reject(
                f"{name} has token ids outside the vocabulary (0 to {vocab_size - 1}): "
                f"{wrong[:5]}.",
                name,
            )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=seed,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=dict(asked.logit_bias),
        stop=asked.stop,
        stop_token_ids=asked.stop_token_ids,
        include_stop_str_in_output=asked.include_stop_str_in_output,
        ignore_eos=asked.ignore_eos,
        skip_special_tokens=asked.skip_special_tokens,
        logprobs=asked.logprobs,
    )


def check_rate(rate: float, limits: Limits, others: str) -> float:
    """A reading speed in tokens/s. Raises InvalidRequestError, which names `others` as well: what
    may be given in its place."""
    if not limits.min_token_rate <= rate <= limits.max_token_rate:
        _refuse_rate("token_rate", limits, others, got=f"{rate:g}")
    return rate


def text_rate(text: str, where: str, limits: Limits) -> float:
    """The rate of a header or of metadata (`where`): tokens/s, infinite for "max". Raises
    InvalidRequestError."""
    if text == "max":
        return math.inf
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not limits.min_token_rate <= rate <= limits.max_token_rate:
        _refuse_rate(where, limits, ' or "max" (no reader)', got=repr(text[:_SHOWN_CHARS]))
    return rate


def text_timeout(text: str, where: str, limits: Limits) -> float:
    """The timeout of a header or of metadata (`where`), seconds. Raises InvalidRequestError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    return check_timeout(seconds, where, limits)


def check_timeout(seconds: float, where: str, limits: Limits) -> float:
    """Raises InvalidRequestError."""
    if not 0 < seconds <= limits.max_timeout_s:
        _reject(
            f"{where} must be a number of seconds above 0, at most {limits.max_timeout_s:g}.",
            "timeout",
        )
    return seconds


def check_seed(seed: int | None) -> None:
    """Raises InvalidRequestError for a seed that does not fit in 64 bits."""
    if seed is not None and not -(1 << 63) <= seed < 1 << 63:
        _reject("seed must fit in 64 bits.", "seed")


def check_model(model: str, names: Collection[str]) -> None:
    """Raise the 404 for a model that is not served."""
    if model not in names:
        served = ", ".join(sorted(names))
        raise InvalidRequestError(
            f"The model {model[:_SHOWN_CHARS]!r} does not exist; served here: {served}.",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_stops(stop: tuple[str, ...], limits: Limits) -> tuple[str, ...]:
    """Stop strings within the limits. Raises InvalidRequestError."""
    if len(stop) > limits.max_stop_sequences:
        _reject(
            f"stop has {len(stop)} sequences; at most {limits.max_stop_sequences} are allowed.",
            "stop",
        )
    if any(len(s) > limits.max_stop_length for s in stop):
        _reject(f"A stop sequence is longer than {limits.max_stop_length} characters.", "stop")
    if not all(stop):
        _reject("stop must not contain an empty string.", "stop")
    return stop


# -- the pieces -----------------------------------------------------------------------------------


def _validate(model: type[_Request], body: Mapping[str, Any], limits: Limits) -> _Request:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(str(part) for part in first["loc"])
        kind = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
        if param == "token_rate":
            _refuse_rate(param, limits, _OTHER_RATES, code="invalid_type")
        raise InvalidRequestError(f"{where}: {first['msg']}.", param=param, code=kind) from None
    except RecursionError:
        _reject("The body is nested too deeply.", None, "invalid_json")


def _prompts(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        prompts: tuple[str | tuple[int, ...], ...] = (prompt,)
    elif all(isinstance(p, int) for p in prompt):
        prompts = (tuple(prompt),) if prompt else ()  # type: ignore[arg-type]
    else:
        prompts = tuple(p if isinstance(p, str) else tuple(p) for p in prompt)  # type: ignore[arg-type]
    if not prompts or not all(prompts):
        _reject("The prompt is empty.", "prompt")
    return prompts


def _messages(messages: list[_Message]) -> tuple[Message, ...]:
    if not messages:
        _reject("messages is empty.", "messages")
    return tuple(_message(i, m) for i, m in enumerate(messages))


def check_role(index: int, role: str) -> str:
    """A message's role. Raises InvalidRequestError."""
    if role not in _ROLES:
        _reject(
            f"messages.{index}.role: unknown role {role[:_SHOWN_CHARS]!r}; use one of "
            f"{', '.join(_ROLES)}.",
            "messages",
        )
    return role


def _message(index: int, message: _Message) -> Message:
    check_role(index, message.role)
    content = message.content
    if content is None:
        return Message(message.role, "")
    if isinstance(content, str):
        return Message(message.role, content)
    for part in content:
        if part.type != "text":
            _reject(
                f"messages.{index}.content: parts of type {part.type[:_SHOWN_CHARS]!r} are not "
                "supported, only text.",
                "messages",
                "unsupported_parameter",
            )
        if part.text is None:
            _reject(f"messages.{index}.content: a part of type 'text' has no text.", "messages")
    return Message(message.role, "".join(part.text or "" for part in content))


def _check_choices(n: int, prompts: int, limits: Limits) -> None:
    if n < 1:
        _reject("n must be at least 1.", "n")
    if n * prompts > limits.max_choices:
        _reject(f"n times the number of prompts may be at most {limits.max_choices}.", "n")


def check_request_id(request_id: str, where: str = "request_id") -> str:
    """A client's own id, which stands in header lines and paths. Raises InvalidRequestError."""
    if not _REQUEST_ID.fullmatch(request_id):
        _reject(
            f"{where} must have 1 to 256 visible ASCII characters and no spaces, got "
            f"{request_id[:_SHOWN_CHARS]!r}.",
            "request_id",
        )
    return request_id


def parse_change(body: Mapping[str, Any], limits: Limits) -> ReaderChange:
    """The body of POST /v1/streams/{id}. Raises InvalidRequestError."""
    request = _validate(_Change, body, limits)
    rate = request.token_rate
    change = ReaderChange(
        token_rate=math.inf
        if isinstance(rate, str)
        else None
        if rate is None
        else check_rate(rate, limits, ' or "max" (no reader)'),
        paused=request.paused,
        consumed=request.consumed,
    )
    if change == ReaderChange():
        _reject("Give at least one of token_rate, paused and consumed.", None)
    return change


def _resumable(request: _Common, header: str | None) -> bool:
    resumable = request.resumable
    if resumable is None and header is not None:
        if header.lower() not in ("true", "false"):
            _reject(
                f"The header X-Resumable must be true or false, got {header[:_SHOWN_CHARS]!r}.",
                "resumable",
            )
        resumable = header.lower() == "true"
    if resumable and not request.stream:
        _reject("resumable is only allowed when stream is true.", "resumable")
    return bool(resumable)


def _request_id(request: _Common, header: str | None) -> str | None:
    if request.request_id:
        return check_request_id(request.request_id)
    return check_request_id(header, "The header X-Request-Id") if header else None


def _delivery(request: _Common, limits: Limits, headers: Given) -> dict[str, Any]:
    options = request.stream_options
    if options is not None and not request.stream:
        _reject("stream_options is only allowed when stream is true.", "stream_options")
    return {
        "token_rate": _rate(request, limits, headers.rate),
        "stream": bool(request.stream),
        "include_usage": bool(options and options.include_usage),
        "continuous_usage": bool(options and options.continuous_usage_stats),
        "generation_times": bool(options and options.include_generation_times),
        "request_id": _request_id(request, headers.request_id),
        "cache_salt": request.cache_salt,
        "resumable": _resumable(request, headers.resumable),
        "timeout_s": _timeout(request, limits),
    }


def _timeout(request: _Common, limits: Limits) -> float | None:
    if request.timeout is None:
        return None
    return check_timeout(request.timeout, "timeout", limits)


def _rate(request: _Common, limits: Limits, header: str | None) -> float:
    rate = request.token_rate
    if isinstance(rate, str):
        return math.inf
    if rate is not None:
        return check_rate(rate, limits, _OTHER_RATES)
    if header is not None:
        return text_rate(header, "The header X-Token-Rate", limits)
    return limits.default_token_rate


def _sampling(
    request: _Common,
    max_tokens: int | None,
    logprobs: int | None,
    limits: Limits,
    limit_name: str = "max_tokens",
) -> Sampling:
    stop = request.stop
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    bias = request.logit_bias or {}
    if len(bias) > limits.max_logit_bias:
        _reject(f"logit_bias has more than {limits.max_logit_bias} entries.", "logit_bias")
    if not all(_TOKEN_ID.fullmatch(token) for token in bias):
        _reject("The keys of logit_bias must be token ids.", "logit_bias")
    logit_bias = {int(token): value for token, value in bias.items()}
    check_seed(request.seed)
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        name = "top_logprobs" if isinstance(request, _Chat) else "logprobs"
        _reject(f"{name} must be between 0 and {MAX_LOGPROBS}.", name)
    if max_tokens is not None and max_tokens < 1:
        _reject(f"{limit_name} must be at least 1, got {max_tokens}.", limit_name)
    given = {
        name: getattr(request, name)
        for name in (
            "min_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "include_stop_str_in_output",
            "ignore_eos",
            "skip_special_tokens",
        )
        if getattr(request, name) is not None
    }
    return Sampling(
        max_tokens=max_tokens,
        seed=request.seed,
        logit_bias=logit_bias,
        stop=check_stops(stops, limits),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=logprobs,
        **given,
    )


def _too_long_context(limit: int, prompt_tokens: int, max_tokens: int | None) -> NoReturn:
    asked = f" and {max_tokens} tokens of output were requested" if max_tokens is not None else ""
    _reject(
        f"This model's maximum context length is {limit} tokens, but the prompt has "
        f"{prompt_tokens} tokens{asked}. Shorten the prompt or lower max_tokens.",
        "max_tokens" if max_tokens is not None else None,
        "context_length_exceeded",
    )


def _refuse_rate(
    where: str, limits: Limits, others: str, *, got: str = "", code: str = "invalid_value"
) -> NoReturn:
    _reject(
        f"{where} must be a number from {limits.min_token_rate:g} to {limits.max_token_rate:g} "
        f"(tokens/s){others}{got and f', got {got}'}.",
        "token_rate",
        code,
    )


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unsupported(name: str) -> NoReturn:
    _reject(f"{name} is not supported.", name, "unsupported_parameter")


def _reject(message: str, param: str | None, code: str = "invalid_value") -> NoReturn:
    raise InvalidRequestError(message, param=param, code=code)
