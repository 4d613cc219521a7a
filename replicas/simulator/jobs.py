"""Simulated runs, one after the other or several at a time; what is left of each is its figures."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from tokenflow.loadgen.metrics import StreamRecord, percentile
from tokenflow.replicas.errors import TokenFlowError
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.bounds import Bounds
from tokenflow.replicas.simulator.plots import PlotData, plot_data
from tokenflow.replicas.simulator.run import Machine, Outcome, simulate
from tokenflow.replicas.simulator.workload import Arrival


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one setting with one seed."""

    setting: str
    policy: str
    seed: int
    bounds: Bounds
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Job:
    """A run to come."""

    setting: str
    policy: str
    seed: int
    machine: Machine
    arrivals: list[Arrival]
    bounds: Bounds
    plotted: bool
    params: dict[str, float] = field(default_factory=dict)
    """Of the policy."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of EngineConfig that differ from the defaults."""


def figures(outcome: Outcome) -> dict[str, float]:
    """What is reported of a run."""
    stats = outcome.stats
    return {
        **outcome.summary.to_dict(),
        # Per reader: seconds it sat dry.
        "stall_p99_s": percentile(
            [r.playback().stall_s for r in outcome.records if r.reads] or [0.0], 99
        ),
        **_dry_shares(outcome.records),
        "preemptions": stats.preemptions,
        "resumes": stats.resumes,
        "recomputed_tokens": stats.recomputed_tokens,
        "offloaded_bytes": stats.offloaded_bytes,
        "loaded_bytes": stats.loaded_bytes,
        "device_busy_s": outcome.busy_s,
    }


def _dry_shares(records: Seq[StreamRecord]) -> dict[str, float]:
    """For every reading speed, the share of their reading time that its readers sat dry."""
    shares = {}
    for rate in sorted({r.token_rate for r in records if r.reads}):
        own = [r for r in records if r.token_rate == rate]
        dry = sum(r.playback().stall_s for r in own)
        reading = sum(r.tokens / rate for r in own)
        shares[f"dry_share_at_{rate:g}"] = dry / max(dry + reading, 1e-9)
    return shares


def work(job: Job) -> tuple[Run, PlotData | None]:
    """Runs a job; the outcome itself, with every token's time, is too much to hand on."""
    policy = make_policy(job.policy, job.params)
    outcome = simulate(job.machine, policy, job.arrivals, engine=job.engine)
    done = Run(job.setting, job.policy, job.seed, job.bounds, figures(outcome))
    return done, plot_data(outcome) if job.plotted else None


@contextmanager
def results(jobs: Seq[Job], workers: int) -> Iterator[Iterator[tuple[Run, PlotData | None]]]:
    """The results in the order of the jobs, from that many processes."""
    if workers == 1:
        yield map(work, jobs)
        return
    # Not forked: the caller may have threads. An interrupt ends a worker without a word.
    with ProcessPoolExecutor(
        min(workers, len(jobs)),
        get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    ) as pool:
        try:
            yield pool.map(work, jobs)
        except BrokenProcessPool:
            raise TokenFlowError(
                "a worker process was killed, perhaps for lack of memory; use fewer --jobs."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
