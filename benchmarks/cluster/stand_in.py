"""An executor that computes nothing, for benchmarks of what stands around the model: it draws the
next token at once, or makes each step last a given time."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Any

from tokenflow.replicas import factory
from tokenflow.replicas.executor.base import CopyDone, ScheduledSequence, StepResult

_FIRST_WORD = 300
"""Ids below are single bytes, which alone are no text."""


class StandInExecutor:
    """Implements `Executor` for engines without host memory."""

    def __init__(self, layout: Any, num_blocks: int, vocab_size: int, step_s: float) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self._step_s = step_s
        self._free_at = 0.0

    def execute(self, batch: Seq[ScheduledSequence]) -> StepResult:
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + self._step_s
        words = self.vocab_size - _FIRST_WORD
        tokens = [
            _FIRST_WORD + (s.start * 7919 + s.slot * 31) % words if s.sample else -1 for s in batch
        ]
        # Sleeping frees the interpreter, as waiting for a GPU does.
        if (wait_s := self._free_at - time.monotonic()) > 0:
            time.sleep(wait_s)
        return StepResult(tokens, [None] * len(tokens))

    # An engine without host slots starts no copies; with them the benchmark is set up wrongly.

    def offload(self, pairs: Seq[tuple[int, int]]) -> int:
        raise RuntimeError("the stand-in has no host memory; set kvstore.host_kv_gib to 0")

    def load(self, pairs: Seq[tuple[int, int]], expected: Seq[int | None] = ()) -> int:
        raise RuntimeError("the stand-in has no host memory; set kvstore.host_kv_gib to 0")

    def poll_transfers(self, timeout_s: float = 0.0) -> list[CopyDone]:
        return []

    def close(self) -> None:
        pass


def install(step_s: float) -> None:
    """Every engine that this process builds from now on gets a stand-in for its model."""

    def build(spec: Any, config: Any, *, num_blocks: int, **_: Any) -> StandInExecutor:
        layout = spec.kv_layout(config.block_size)
        return StandInExecutor(layout, num_blocks, spec.vocab_size, step_s)

    factory.build_executor = build  # type: ignore[assignment]
