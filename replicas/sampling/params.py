"""What a request asks of the sampler and of the stop conditions. Plain data, validated once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenflow.replicas.errors import InvalidRequestError

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Per-request sampling and stopping.

    Raises InvalidRequestError (with `param` set) on construction when a value is out of range.
    """

    max_tokens: int
    """Upper bound on generated tokens, >= 1."""
    min_tokens: int = 0
    """End-of-sequence, stop ids and stop strings are ignored before this many tokens."""
    temperature: float = 1.0
    """0 = greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 = off."""
    min_p: float = 0.0
    seed: int = 0
    """Any 64-bit integer. The same seed, prompt and parameters give the same text, however the
    request is batched, preempted or moved."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> bias in [-100, 100], added to the logit."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """None = off; n >= 0 = log-probability of the chosen token and of the n likeliest."""

    def __post_init__(self) -> None:
        def need(ok: bool, param: str, text: str) -> None:
            if not ok:
                raise InvalidRequestError(f"{param} {text}", param=param, code="invalid_value")

        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            need(math.isfinite(getattr(self, name)), name, "must be a finite number.")
        need(self.max_tokens >= 1, "max_tokens", f"must be at least 1, got {self.max_tokens}.")
        need(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}.",
        )
        need(
            0 <= self.temperature <= 2,
            "temperature",
            f"must be between 0 and 2, got {self.temperature}.",
        )
        need(0 < self.top_p <= 1, "top_p", f"must be in (0, 1], got {self.top_p}.")
        need(self.top_k >= -1, "top_k", f"must be -1 (off) or >= 0, got {self.top_k}.")
        need(0 <= self.min_p <= 1, "min_p", f"must be between 0 and 1, got {self.min_p}.")
        need(
            0 < self.repetition_penalty <= 10,
            "repetition_penalty",
            f"must be in (0, 10], got {self.repetition_penalty}.",
        )
        need(
            -2 <= self.presence_penalty <= 2,
            "presence_penalty",
            f"must be between -2 and 2, got {self.presence_penalty}.",
        )
        need(
            -2 <= self.frequency_penalty <= 2,
            "frequency_penalty",
            f"must be between -2 and 2, got {self.frequency_penalty}.",
        )
        need(-(1 << 63) <= self.seed < (1 << 63), "seed", "must fit in 64 bits.")
        need(all(self.stop), "stop", "must not contain an empty string.")
        need(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"must be between 0 and {MAX_LOGPROBS}, got {self.logprobs}.",
        )
        need(
            all(math.isfinite(b) and -100 <= b <= 100 for b in self.logit_bias.values()),
            "logit_bias",
            "values must be between -100 and 100.",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether top-k, top-p or min-p narrows the distribution."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalizes(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
