"""When requests arrive: the processes of a workload. Seeded, and without lengths or readers."""

from __future__ import annotations

import math
import random
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.simulator.workload import burst, poisson

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Rate = Annotated[float, Field(gt=0, le=100_000, description="Requests per second.")]
_Duration = Annotated[float, Field(gt=0, le=86_400, description="Seconds in which they arrive.")]
_GAMMA_LEAST_CV = 0.01


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Burst(_Model):
    """Everybody at once."""

    kind: Literal["burst"] = "burst"
    count: int = Field(ge=1, le=1_000_000)

    def times(self, rng: random.Random) -> list[float]:
        return burst(self.count)


class Poisson(_Model):
    """Independent arrivals."""

    kind: Literal["poisson"] = "poisson"
    per_s: _Rate
    duration_s: _Duration = 60.0

    def times(self, rng: random.Random) -> list[float]:
        return poisson(self.per_s, self.duration_s, rng)


class Gamma(_Model):
    """Arrivals with gamma-distributed gaps: burstier than Poisson where `cv` is above 1."""

    kind: Literal["gamma"] = "gamma"
    per_s: _Rate
    cv: float = Field(
        default=2.0,
        ge=_GAMMA_LEAST_CV,
        le=100,
        description="Deviation of gaps over their mean.",
    )
    duration_s: _Duration = 60.0

    def times(self, rng: random.Random) -> list[float]:
        shape = 1 / self.cv**2
        scale = 1 / (self.per_s * shape)
        times = []
        at = rng.gammavariate(shape, scale)
        while at < self.duration_s:
            times.append(at)
            at += rng.gammavariate(shape, scale)
        return times


class Ramp(_Model):
    """Poisson arrivals whose rate goes from one value to another in a straight line."""

    kind: Literal["ramp"] = "ramp"
    from_per_s: float = Field(ge=0, le=100_000)
    to_per_s: float = Field(ge=0, le=100_000)
    duration_s: _Duration = 60.0

    @model_validator(mode="after")
    def _someone_comes(self) -> Ramp:
        if not self.from_per_s + self.to_per_s > 0:
            raise ValueError("from_per_s and to_per_s cannot both be 0")
        return self

    def times(self, rng: random.Random) -> list[float]:
        # Arrivals at a rate of 1 in the time that is the integral of the rate, mapped back.
        slope = (self.to_per_s - self.from_per_s) / self.duration_s
        total = (self.from_per_s + self.to_per_s) / 2 * self.duration_s
        times = []
        passed = rng.expovariate(1.0)
        while passed < total:
            root = math.sqrt(max(0.0, self.from_per_s**2 + 2 * slope * passed))
            times.append(2 * passed / (self.from_per_s + root))
            passed += rng.expovariate(1.0)
        return times


class Replay(_Model):
    """The arrivals of a trace file, and its lengths where the description asks for them."""

    kind: Literal["trace"] = "trace"
    path: str = Field(
        min_length=1, description="CSV (BurstGPT, Azure, normalised) or Mooncake's JSONL."
    )
    start_s: float = Field(default=0.0, ge=0, description="From this second of the trace on.")
    duration_s: _Positive | None = Field(
        default=None, description="Seconds of the trace; null = to its end."
    )
    time_scale: _Positive = Field(
        default=1.0, description="Arrival times times this; 0.5 is twice the load."
    )
    max_requests: int | None = Field(default=None, ge=1)
    max_input_tokens: int | None = Field(
        default=None, ge=1, description="Longer prompts are cut to this; null = as they are."
    )
    max_output_tokens: int | None = Field(default=None, ge=1)
    spread_s: float = Field(
        default=0.0,
        ge=0,
        description="Arrivals are moved later by up to this at random, for traces whose clock is "
        "coarse: BurstGPT's steps by 1 s, Mooncake's by 3 s. Seconds of the trace.",
    )


Arrivals = Annotated[Burst | Poisson | Gamma | Ramp | Replay, Field(discriminator="kind")]
_ARRIVALS: TypeAdapter[Burst | Poisson | Gamma | Ramp | Replay] = TypeAdapter(Arrivals)


def parse_arrivals(text: str) -> Burst | Poisson | Gamma | Ramp | Replay:
    """The short form of the command line: burst:40, poisson:4, gamma:4,cv=2, ramp:1-8,
    trace:FILE; further fields by name, as poisson:4,duration_s=30. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    fields: dict[str, str] = {}
    first, *others = rest.split(",")
    for other in others:
        name, _, value = other.partition("=")
        fields[name] = value
    if kind == "burst":
        fields["count"] = first
    elif kind in ("poisson", "gamma"):
        fields["per_s"] = first
    elif kind == "ramp":
        fields["from_per_s"], _, fields["to_per_s"] = first.partition("-")
    elif kind == "trace":
        fields["path"] = first
    else:
        raise ConfigError(
            f"--arrivals: {text!r} is none of burst:COUNT, poisson:PER_S, gamma:PER_S,cv=X, "
            "ramp:FROM-TO, trace:FILE."
        )
    try:
        return _ARRIVALS.validate_python({"kind": kind, **fields})
    except ValueError as error:
        raise ConfigError(f"--arrivals: {text!r}: {first_problem(error)}.") from None


def first_problem(error: ValueError) -> str:
    """The first of pydantic's complaints as "field: what is wrong"."""
    problems = getattr(error, "errors", None)
    if problems is None:
        return str(error)
    first = problems()[0]
    where = ".".join(str(part) for part in first["loc"][1:] or first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field"
    return f"{where}: {message}" if where else message
