"""How far a calibrated simulation is from a second real run of the same requests."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tokenflow.loadgen.metrics import StreamRecord, summarize
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.calibration import Accuracy, Calibration, step_errors
from tokenflow.replicas.simulator.live import Bench, run_live
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests
from tokenflow.replicas.stats import EngineStats

READ_TOK_S = 10.0
_BURST_SHARE = 0.75
_LATER_SHARE = 1 / 3
_PROMPT_SHARE = 1 / 6


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a run."""

    real: float
    predicted: float

    @property
    def error(self) -> float | None:
        """Relative to the real one, signed; None where that is zero and the other is not."""
        if self.real == 0:
            return 0.0 if self.predicted == 0 else None
        return self.predicted / self.real - 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """One policy."""

    policy: str
    figures: dict[str, Figure]
    steps: Accuracy
    """Of single steps of the real run, which the calibration has not seen."""


def workload(calibration: Calibration, max_model_len: int, seed: int) -> list[Arrival]:
    """A burst for about three times the device memory, and more requests while that is served; on
    the embedded model about what `tokenflow demo` sends."""
    rng = random.Random(seed)
    # At most 256 tokens each, because a validation is to last seconds, not hours.
    each = min(256, max_model_len // 2, max(4, calibration.kv_tokens // 8))
    count = max(4, min(4 * calibration.kv_tokens // each, 4 * calibration.max_num_seqs))
    prompt = each * _PROMPT_SHARE
    at_once = round(count * _BURST_SHARE)
    # The last one must come early: what waits for arrivals does not depend on the machine.
    later_s = _LATER_SHARE * _busy_s(calibration, each, count)
    times = burst(at_once) + poisson((count - at_once) / later_s, later_s, rng)
    return requests(times, prompt, each - prompt, [(READ_TOK_S, 1)], rng)


def _busy_s(calibration: Calibration, each: int, count: int) -> float:
    """Roughly how long `count` requests of `each` tokens keep the device busy."""
    together = max(1, min(calibration.kv_tokens // each, calibration.max_num_seqs))
    return count * each / together * calibration.cost.step_s([each] * together, [])


def validate(
    bench: Bench, calibration: Calibration, policy: str, arrivals: Seq[Arrival], *, seed: int
) -> Comparison:
    """Run for real, then simulate, and set the figures side by side.

    Raises ConfigError for a policy that was not calibrated, InvalidRequestError for requests that
    do not fit the model.
    """
    machine = calibration.machine(policy)
    bench.executor.take()
    engine = bench.engine(make_policy(policy))
    records = run_live(bench, engine, arrivals, seed=seed)
    steps, _ = bench.executor.take()
    real = figures(records, engine.stats)
    outcome = simulate(machine, make_policy(policy), arrivals)
    predicted = figures(outcome.records, outcome.stats)
    return Comparison(
        policy,
        {name: Figure(real[name], predicted[name]) for name in real},
        step_errors(calibration.cost, steps),
    )


def figures(records: Seq[StreamRecord], stats: EngineStats) -> dict[str, float]:
    """What is compared of a run."""
    summary = summarize(records)
    return {
        "makespan_s": summary.duration_s,
        "raw_tok_s": summary.raw_tok_s,
        "effective_tok_s": summary.effective_tok_s,
        "ttft_mean_s": summary.ttft_mean_s,
        "ttft_p99_s": summary.ttft_p99_s,
        "stall_s": summary.stall_s,
        "preemptions": float(stats.preemptions),
        "steps": float(stats.steps),
    }
