"""How long prompts and outputs are: distributions of token counts, or a trace's own."""

from __future__ import annotations

import math
import random
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokenflow.loadgen.arrivals import first_problem
from tokenflow.replicas.errors import ConfigError

MAX_TOKENS = 10_000_000

_Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fixed(_Model):
    """Always the same."""

    kind: Literal["fixed"] = "fixed"
    tokens: _Tokens

    def draw(self, rng: random.Random) -> int:
        return self.tokens


class Normal(_Model):
    """Normal, rounded, never below `least`."""

    kind: Literal["normal"] = "normal"
    mean: float = Field(gt=0, le=MAX_TOKENS)
    deviation: float = Field(ge=0, le=MAX_TOKENS)
    least: _Tokens = 1

    def draw(self, rng: random.Random) -> int:
        return max(self.least, min(MAX_TOKENS, round(rng.gauss(self.mean, self.deviation))))


class Uniform(_Model):
    """Every length from `low` to `high` alike."""

    kind: Literal["uniform"] = "uniform"
    low: _Tokens
    high: _Tokens

    @model_validator(mode="after")
    def _in_order(self) -> Uniform:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


class LogNormal(_Model):
    """Log-normal, as answers of chat models often are: `median`, and the deviation of the log."""

    kind: Literal["lognormal"] = "lognormal"
    median: float = Field(gt=0, le=MAX_TOKENS)
    sigma: float = Field(ge=0, le=5)
    most: _Tokens = 32_768

    def draw(self, rng: random.Random) -> int:
        return max(1, min(self.most, round(rng.lognormvariate(math.log(self.median), self.sigma))))


class FromTrace(_Model):
    """What the trace says that the arrivals come from."""

    kind: Literal["trace"] = "trace"


Lengths = Annotated[
    Fixed | Normal | Uniform | LogNormal | FromTrace, Field(discriminator="kind")
]  # fmt: skip


def parse_lengths(flag: str, text: str) -> Fixed | Normal | Uniform | LogNormal | FromTrace:
    """The short form of the command line: 128, normal:512,128, uniform:64,256,
    lognormal:200,0.8, trace. Raises ConfigError that names `flag`."""
    kind, _, rest = text.partition(":")
    values = rest.split(",") if rest else []
    try:
        if kind == "trace" and not values:
            return FromTrace()
        if kind == "normal" and len(values) == 2:
            return Normal.model_validate({"mean": values[0], "deviation": values[1]})
        if kind == "uniform" and len(values) == 2:
            return Uniform.model_validate({"low": values[0], "high": values[1]})
        if kind == "lognormal" and len(values) == 2:
            return LogNormal.model_validate({"median": values[0], "sigma": values[1]})
        if kind.isdigit() and not values:
            return Fixed.model_validate({"tokens": kind})
    except ValueError as error:
        raise ConfigError(f"{flag}: {text!r}: {first_problem(error)}.") from None
    raise ConfigError(
        f"{flag}: {text!r} is none of TOKENS, normal:MEAN,DEVIATION, uniform:LOW,HIGH, "
        "lognormal:MEDIAN,SIGMA, trace."
    )
