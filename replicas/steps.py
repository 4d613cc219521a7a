"""Handing batches to the executor: one after the other or a step ahead, and in smaller pieces while
the device is short of memory.

What a step's end means for its sequences is the engine's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import ConfigError, StepMemoryError
from tokenflow.replicas.executor.base import (
    AsyncExecutor,
    Executor,
    PendingStep,
    ScheduledSequence,
    StepResult,
)
from tokenflow.replicas.request import Sequence
from tokenflow.replicas.stats import EngineStats

logger = logging.getLogger("tokenflow.engine")

_CAUTIOUS_STEPS = 64
"""After so many steps that fit the device, those that follow may be twice as large."""

Shares = list[tuple[Sequence, int]]
"""Sequences and the tokens each of them runs."""


class Share(NamedTuple):
    """A sequence's part in a step."""

    seq: Sequence
    tokens: int
    filled: int
    """Its full blocks before."""
    sample: bool


@dataclass(slots=True)
class Step:
    """A step that was handed to the executor."""

    shares: list[Share]
    begun: float
    """Engine clock."""
    done: StepResult | None
    """None: it was launched and is `pending`."""
    pending: PendingStep | None
    decodes: int = 0
    context: int = 0
    """Tokens of KV that the decoding sequences read."""
    prefills: Shares = field(default_factory=list)
    """Those that do not decode."""

    def result(self) -> StepResult:
        """Waits for its end."""
        if self.done is None:
            assert self.pending is not None
            self.done = self.pending.result()
        return self.done


class StepRunner:
    """Starts steps on one executor."""

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        stats: EngineStats,
        clock: Callable[[], float],
    ) -> None:
        """Raises ConfigError when `engine.async_scheduling` asks for what the executor cannot."""
        self._executor = executor
        self._launcher = _launcher(executor, config)
        self._clock = clock
        self._block_size = executor.layout.block_size
        self._most = self.max_tokens = config.max_batch_tokens
        """The budget of a step; lower for a while after one did not fit the device."""
        self._stats = stats
        self._fitted = 0
        """Steps since that happened, or since it was made up for in part."""

    @property
    def ahead(self) -> bool:
        """Whether steps are launched before the last one's tokens are known."""
        return self._launcher is not None

    def start(self, batch: Shares, describe: Callable[[Sequence, int], ScheduledSequence]) -> Step:
        """Run a batch, or with `ahead` launch it; the first half of it, and so on, where the device
        has no memory for more. Raises StepMemoryError when it has none for the first token.
        """
        while True:
            begun = self._clock()
            scheduled = [describe(seq, n) for seq, n in batch]
            try:
                done, pending = self._hand_over(scheduled)
            except StepMemoryError as error:
                batch = self._half(batch, error)
                continue
            break
        self._fitted += 1
        if self._fitted >= _CAUTIOUS_STEPS:
            self.max_tokens = min(2 * self.max_tokens, self._most)
            self._fitted = 0
        shares = [
            Share(seq, n, seq.num_computed // self._block_size, part.sample)
            for (seq, n), part in zip(batch, scheduled, strict=True)
        ]
        return Step(shares, begun, done, pending)

    def _hand_over(
        self, scheduled: Seq[ScheduledSequence]
    ) -> tuple[StepResult | None, PendingStep | None]:
        if self._launcher is not None:
            return None, self._launcher.launch(scheduled)
        return self._executor.execute(scheduled), None

    def _half(self, batch: Shares, error: StepMemoryError) -> Shares:
        """Of a batch that did not fit; raises `error` when it is one token."""
        self._stats.out_of_memory += 1
        self._fitted = 0
        tokens = sum(n for _, n in batch)
        logger.warning("the device has no memory for a step of %d tokens: %s", tokens, error)
        if tokens == 1:
            raise error
        left = self.max_tokens = tokens // 2
        kept = []
        for seq, n in batch:
            if left > 0:
                kept.append((seq, min(n, left)))
                left -= n
        return kept


def _launcher(executor: Executor, config: EngineConfig) -> AsyncExecutor | None:
    """The executor, if it is to run a step ahead. Raises ConfigError when it cannot."""
    wanted = config.async_scheduling
    if isinstance(executor, AsyncExecutor):
        return executor if (executor.overlaps if wanted is None else wanted) else None
    if wanted:
        raise ConfigError(
            f"engine.async_scheduling: a {type(executor).__name__} runs one step after the other; "
            "leave it out."
        )
    return None
