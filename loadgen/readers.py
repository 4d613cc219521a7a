"""How fast those who asked read, and what some of them do instead of reading to the end."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tokenflow.replicas.errors import ConfigError

PRESETS = {
    "listen": 4.0,
    "read": 6.0,
    "skim": 15.0,
    "fast": 20.0,
    "fast25": 25.0,
    "fast30": 30.0,
    "agent": math.inf,
}
"""Tokens/s by name, at about 1.3 tokens a word: speech is followed at up to 270 words a minute
(4 to 6 tokens/s), silent reading is about 240 (Brysbaert 2019); `skim` scrolls, `fast` are the
rates of the TokenFlow paper (20, 25, 30), `agent` takes all it can get."""
LEAST_RATE, MOST_RATE = 0.01, 1000.0


def rate_of(text: str | float) -> float:
    """A reading speed in tokens/s from a number, a preset's name or "max". Raises ValueError."""
    if isinstance(text, str) and (text == "max" or text in PRESETS):
        return PRESETS.get(text, math.inf)
    try:
        rate = float(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither tokens/s nor one of {', '.join(PRESETS)}, max"
        ) from None
    if rate != math.inf and not LEAST_RATE <= rate <= MOST_RATE:
        raise ValueError(f"{text} tokens/s is outside {LEAST_RATE:g} to {MOST_RATE:g}")
    return rate


def _shown(rate: float) -> float | str:
    return "max" if rate == math.inf else rate


class Readers(BaseModel):
    """A share of those who ask, and their speed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_rate: float | str = Field(
        description=f"Tokens/s, or a preset: {', '.join(PRESETS)}; max = no reader."
    )
    share: float = Field(default=1.0, gt=0, le=1e6, description="Weight beside the other entries.")

    @field_validator("token_rate")
    @classmethod
    def _known(cls, value: float | str) -> float | str:
        return _shown(rate_of(value))

    @property
    def rate(self) -> float:
        return rate_of(self.token_rate)


def parse_readers(text: str) -> list[Readers]:
    """The short form of the command line: 20, read, 15@0.4,20@0.6, read@0.5,agent@0.5. Raises
    ConfigError."""
    readers = []
    for part in text.split(","):
        rate, _, share = part.partition("@")
        try:
            weight = float(share) if share else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight <= 1e6:
            raise ConfigError(f"--rate: {part!r}: the share after @ must be a number above 0.")
        try:
            readers.append(Readers(token_rate=_shown(rate_of(rate)), share=weight))
        except ValueError as error:
            raise ConfigError(f"--rate: {part!r}: {error}.") from None
    return readers


class _Behaviour(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(gt=0, le=1, description="Of all requests.")
    after_tokens: int = Field(ge=1, description="When that many tokens have arrived.")


class Disconnects(_Behaviour):
    """Closes the connection."""

    kind: Literal["disconnect"] = "disconnect"


class Pauses(_Behaviour):
    """Takes nothing from the connection for a while, as a sleeping laptop does."""

    kind: Literal["stall"] = "stall"
    seconds: float = Field(gt=0, le=3600)


class ChangesSpeed(_Behaviour):
    """Reads on at another speed. It is modelled in the reader alone: the server is not told, and
    goes on pacing for the speed that was declared."""

    kind: Literal["change_speed"] = "change_speed"
    token_rate: Annotated[float, Field(ge=LEAST_RATE, le=MOST_RATE)]


Behaviour = Disconnects | Pauses | ChangesSpeed
Behaviours = Annotated[Behaviour, Field(discriminator="kind")]


def choose(options: Seq[Any], shares: Seq[float], drawn: float) -> Any | None:
    """The option in whose share of [0, 1) `drawn` falls, None behind the last."""
    for option, share in zip(options, shares, strict=True):
        if drawn < share:
            return option
        drawn -= share
    return None
