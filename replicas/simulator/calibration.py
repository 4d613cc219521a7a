"""A cost model fitted to a real engine on one machine, with all that says what it is worth.

What the probe (probe.py) observed becomes coefficients here; `tokenflow calibrate` is the command.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.simulator.fitting import fit, mean_over_typical
from tokenflow.replicas.simulator.hardware import Floor
from tokenflow.replicas.simulator.probe import Observations
from tokenflow.replicas.simulator.recording import Copy, Step
from tokenflow.replicas.simulator.run import Machine

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Overhead:
    """What the engine itself takes between two steps: planning, detokenizing, handing out."""

    step_s: Seconds = 0.0
    sequence_s: Seconds = 0.0
    """Per sequence in the step."""


@dataclass(frozen=True, slots=True)
class CalibratedCost:
    """Implements `StepCost`. Typical seconds of each part of a step; all coefficients >= 0.

    `step_s` adds what `execute_s` does not see: the engine's overhead, since the simulated engine
    takes no time, and `stretch`, since only means add up to the length of a run.
    """

    fixed_s: Seconds
    decode_s: Seconds
    """Per decoding sequence."""
    context_s: Seconds
    """Per token of context that decoding reads."""
    padded_s: Seconds
    """Per token of it after padding: a batch is as wide as its longest context."""
    prefill_s: Seconds
    """Per prompt token."""
    score_s: Seconds
    """Per query-key pair of a prefill."""
    chunk_s: Seconds
    """Per prefill in the step."""
    large_s: Seconds
    """Per square of the step's prompt tokens: activations outgrow the caches."""
    stretch: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """All steps together over all steps if each were typical: interruptions by other processes."""
    overhead: Overhead = Overhead()

    def execute_s(
        self, decode_contexts: Iterable[int], prefills: Iterable[tuple[int, int]]
    ) -> float:
        """Typical seconds of the executor alone."""
        coefficients = (
            self.fixed_s,
            self.decode_s,
            self.context_s,
            self.padded_s,
            self.prefill_s,
            self.score_s,
            self.chunk_s,
            self.large_s,
        )
        parts = features(decode_contexts, prefills)
        return sum(c * part for c, part in zip(coefficients, parts, strict=True))

    def step_s(self, decode_contexts: Iterable[int], prefills: Iterable[tuple[int, int]]) -> float:
        decodes, chunks = list(decode_contexts), list(prefills)
        own = self.overhead.step_s + self.overhead.sequence_s * (len(decodes) + len(chunks))
        return self.stretch * self.execute_s(decodes, chunks) + own

    def floors(self) -> tuple[Floor, ...]:
        """All but what prompts take beyond their number; no context is padded."""
        stretch = self.stretch
        floor = Floor(
            stretch * self.fixed_s + self.overhead.step_s,
            stretch * self.decode_s + self.overhead.sequence_s,
            stretch * (self.context_s + self.padded_s),
            stretch * self.prefill_s,
        )
        return (floor,)


def features(
    decode_contexts: Iterable[int], prefills: Iterable[tuple[int, int]]
) -> tuple[float, ...]:
    """What the coefficients of CalibratedCost stand before, in their order."""
    decodes, chunks = list(decode_contexts), list(prefills)
    tokens = sum(chunk for chunk, _ in chunks)
    return (
        1.0,
        float(len(decodes)),
        float(sum(decodes)),
        float(len(decodes) * max(decodes, default=0)),
        float(tokens),
        sum(chunk * (before + chunk / 2) for chunk, before in chunks),
        float(len(chunks)),
        float(tokens * tokens),
    )


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Accuracy(_Data):
    """Relative errors of the typical step time, over the steps of a run."""

    median: Seconds
    p90: Seconds
    steps: int = Field(ge=1)
    cpu_share: Seconds
    """CPU time of the thread that ran the steps over their time: below about 0.95 on a CPU, other
    processes took part of the core, and the errors are theirs too."""


class Calibration(_Data):
    """One machine, one model, one configuration."""

    format: Literal[1] = 1
    cost: CalibratedCost
    overheads: dict[str, Overhead] = Field(min_length=1)
    """By policy."""
    to_host_gb_s: Rate
    to_device_gb_s: Rate
    """What copy jobs of the probe's sizes reached alone, 1e9 bytes/s."""
    accuracy: Accuracy
    copies: int = Field(ge=0)
    layout: KVLayout
    kv_tokens: int = Field(ge=1)
    host_kv_tokens: int = Field(ge=0)
    max_num_seqs: int = Field(ge=1)
    max_batch_tokens: int = Field(ge=1)
    about: dict[str, dict[str, str | int | float]]
    """Machine, versions, model and probe, in words and numbers."""

    @field_validator("layout")
    @classmethod
    def _a_layout(cls, layout: KVLayout) -> KVLayout:
        sizes = (layout.layers, layout.block_size, layout.kv_heads, layout.head_dim)
        if min(sizes) < 1 or layout.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError("is not the layout of a KV block")
        return layout

    def machine(self, policy: str) -> Machine:
        """The simulated machine for a run under that policy. Raises ConfigError for a policy that
        the calibration did not run."""
        if policy not in self.overheads:
            raise ConfigError(
                f"the calibration knows the overhead of {', '.join(self.overheads)}, not of "
                f"{policy}; calibrate again with engine.policy: {policy}."
            )
        return Machine(
            cost=replace(self.cost, overhead=self.overheads[policy]),
            layout=self.layout,
            kv_tokens=self.kv_tokens,
            host_kv_tokens=self.host_kv_tokens,
            # The simulated link has one rate for both directions.
            link_gb_s=min(self.to_host_gb_s, self.to_device_gb_s),
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
        )

    def save(self, path: str | Path) -> None:
        """Write JSON. Raises ConfigError when the file cannot be written."""
        try:
            Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}.") from None

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote. Raises ConfigError for a file that is not one."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the calibration {path}: {error.strerror}.") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"{path} is no calibration: {where + ': ' if where else ''}{first['msg']}; make "
                "one with `tokenflow calibrate`."
            ) from None


def fit_cost(steps: Seq[Step]) -> CalibratedCost:
    """The coefficients, without overhead. Raises ValueError without steps."""
    matrix = np.array([features(s.decodes, s.prefills) for s in steps], dtype=np.float64)
    seconds = np.array([s.seconds for s in steps])
    found = fit(matrix.reshape(len(steps), -1), seconds)
    stretch = mean_over_typical(seconds, matrix @ found)
    fixed, decode, context, padded, prefill, score, chunk, large = (float(x) for x in found)
    return CalibratedCost(fixed, decode, context, padded, prefill, score, chunk, large, stretch)


def fit_overhead(steps: Seq[Step]) -> Overhead:
    """Mean seconds between steps, on those that followed one without a pause; 0 without any."""
    rows = [(1.0, len(s.decodes) + len(s.prefills), s.overhead_s) for s in steps if s.overhead_s]
    if not rows:
        return Overhead()
    table = np.array(rows)
    found = fit(table[:, :2], table[:, 2])
    found = found * mean_over_typical(table[:, 2], table[:, :2] @ found)
    return Overhead(float(found[0]), float(found[1]))


def link_gb_s(copies: Seq[Copy], *, to_host: bool) -> float:
    """What the jobs that ran alone reached together. Raises ValueError without any."""
    alone = [c for c in copies if c.alone and c.to_host == to_host]
    if not alone:
        raise ValueError("no copy was observed alone")
    return sum(c.bytes for c in alone) / sum(c.seconds for c in alone) / 1e9


def step_errors(cost: CalibratedCost, steps: Seq[Step]) -> Accuracy:
    """How far `execute_s` is from what steps took. Raises ValueError without steps."""
    if not steps:
        raise ValueError("no steps")
    errors = [abs(cost.execute_s(s.decodes, s.prefills) - s.seconds) / s.seconds for s in steps]
    return Accuracy(
        median=float(np.median(errors)),
        p90=float(np.percentile(errors, 90)),
        steps=len(steps),
        cpu_share=sum(s.cpu_s for s in steps) / sum(s.seconds for s in steps),
    )


def calibrate(
    seen: Observations,
    *,
    layout: KVLayout,
    kv_tokens: int,
    host_kv_tokens: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    about: dict[str, dict[str, str | int | float]],
) -> Calibration:
    """The calibration of what the probe saw. Raises ConfigError when that was too little."""
    try:
        cost = fit_cost(seen.steps)
        return Calibration(
            cost=cost,
            overheads={name: fit_overhead(steps) for name, steps in seen.under_policies.items()},
            to_host_gb_s=link_gb_s(seen.copies, to_host=True),
            to_device_gb_s=link_gb_s(seen.copies, to_host=False),
            accuracy=step_errors(cost, seen.steps),
            copies=len(seen.copies),
            layout=layout,
            kv_tokens=kv_tokens,
            host_kv_tokens=host_kv_tokens,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            about=about,
        )
    except ValidationError:
        raise
    except ValueError as error:
        raise ConfigError(f"the probe was too short to calibrate with: {error}.") from None
