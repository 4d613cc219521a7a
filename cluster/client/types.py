"""What comes out of a stream, as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenflow.cluster.rpc import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    chosen: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), likeliest first."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token as a reader gets it."""

    text: str
    """Where several tokens came in one message, which has one text, its even share of the
    characters; the texts joined are the output."""
    token_id: int | None
    """None for text that became final without a new token."""
    offset: int
    """Index in the output."""
    generated_at: float | None = None
    """When it was drawn, Unix seconds."""
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Those of the prompt tokens that came out of a cache."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    model: str
    max_model_len: int
    """Longest prompt plus output, tokens."""
    vocab_size: int
    default_token_rate: float
    """Tokens/s of a request that declares no rate."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message of the server: the tokens it sent together, and the text that became final."""

    text: str
    token_ids: tuple[int, ...]
    offset: int
    """Index in the output of the first token."""
    generated_at: tuple[float, ...]
    """When each token was drawn, Unix seconds."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token when asked for."""
    finish_reason: str | None = None
    """ "stop" or "length" in the last chunk."""

    def tokens(self) -> Iterator[Token]:
        count = len(self.token_ids)
        if not count:
            if self.text:
                yield Token(self.text, None, self.offset)
            return
        for i, token_id in enumerate(self.token_ids):
            begin, end = len(self.text) * i // count, len(self.text) * (i + 1) // count
            yield Token(
                self.text[begin:end],
                token_id,
                self.offset + i,
                self.generated_at[i] if i < len(self.generated_at) else None,
                self.logprobs[i] if i < len(self.logprobs) else None,
            )


def chunk_of(message: pb.GenerateResponse) -> Chunk:
    return Chunk(
        message.text,
        tuple(message.token_ids),
        message.offset,
        tuple(message.generated_at_unix_s),
        tuple(
            TokenLogprobs(entry.chosen, tuple((top.token_id, top.logprob) for top in entry.top))
            for entry in message.logprobs
        ),
        message.finish_reason or None,
    )


def usage_of(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def model_info_of(message: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        message.model, message.max_model_len, message.vocab_size, message.default_token_rate
    )
