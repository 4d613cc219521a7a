"""Limits on what a client may ask for. Part of the one pydantic tree."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Limits(BaseModel):
    """What a single request may ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = Field(default=4 << 20, ge=1024, description="Longest HTTP body.")
    max_body_s: float = Field(
        default=30.0, gt=0, description="Longest time that the HTTP body of a request may take."
    )
    max_stop_sequences: int = Field(default=16, ge=0)
    max_stop_length: int = Field(default=256, ge=1, description="Characters of one stop string.")
    max_choices: int = Field(default=16, ge=1, description="Prompts times n of one request.")
    min_token_rate: float = Field(default=0.01, ge=0.001, description="tokens/s")
    max_token_rate: float = Field(default=1000.0, gt=0, le=1e6, description="tokens/s")
    default_token_rate: float = Field(
        default=20.0, gt=0, description="tokens/s of a request that declares none"
    )
    max_predicted_ttft_s: float | None = Field(
        default=60.0,
        gt=0,
        description="A request whose first token is predicted to come later is refused with 429 "
        "and Retry-After; null = only a full queue refuses.",
    )
    max_predicted_stall_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds for which readers may be asked to go short. A request that would make "
        "it longer is refused in the same way: what streams keeps its rate under any load. null = "
        "it may begin at once and pause, so long as max_predicted_ttft_s is kept.",
    )
    max_timeout_s: float = Field(
        default=86_400.0, gt=0, description="Longest timeout that a request may give itself."
    )
    max_logit_bias: int = Field(default=1024, ge=0, description="Entries of logit_bias.")

    @model_validator(mode="after")
    def _default_rate_is_allowed(self) -> Limits:
        if not self.min_token_rate <= self.default_token_rate <= self.max_token_rate:
            raise ValueError(
                "default_token_rate must lie between min_token_rate and max_token_rate"
            )
        return self
