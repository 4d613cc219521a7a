"""`tokenflow bench selftest`: known timings through the whole client, and what comes back.

First on a virtual clock, where client and stub server share one event loop and every figure must be
exactly the one that was worked out by hand. Then in real time against a stub in another process,
where the delays are those of this machine: they are how far its measurements can be trusted.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import aiohttp

from tokenflow.loadgen import virtual_time
from tokenflow.loadgen.description import Description, OpenAIServer, load_description
from tokenflow.loadgen.figures import Figures, figures
from tokenflow.loadgen.metrics import StreamRecord, percentile
from tokenflow.loadgen.runner import Run, short_collections
from tokenflow.loadgen.stub import MODEL, Script, StubServer, paced
from tokenflow.loadgen.targets.openai import OpenAITarget
from tokenflow.loadgen.workload import Ask, Workload

EXACT = 1e-6
"""Largest error of a figure on the virtual clock; what floating point leaves of exact sums."""
_TOKENS, _RATE = 100, 20.0
_PERIOD = 1 / _RATE


@dataclass(frozen=True, slots=True)
class Case:
    """One script, and the figures it must come to."""

    name: str
    script: Script
    expected: dict[str, float]
    requests: int = 1


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of a case."""

    case: str
    figure: str
    expected: float
    measured: float | None

    @property
    def ok(self) -> bool:
        return self.measured is not None and abs(self.measured - self.expected) <= EXACT


def _stalled(first_s: float, at: int, stall_s: float) -> Script:
    times = [first_s + i * _PERIOD + (stall_s if i >= at else 0.0) for i in range(_TOKENS)]
    return Script(tuple((at, 1) for at in times))


_EVEN = paced(0.5, _PERIOD, _TOKENS)
_LASTS = 0.5 + 99 * _PERIOD
CASES = (
    Case("exact pacing", _EVEN, {
        "ttft_mean_s": 0.5, "tpot_mean_s": 0.05, "chunk_gap_p50_s": 0.05, "duration_s": _LASTS,
        "raw_tok_s": 100 / _LASTS, "effective_tok_s": 100 / _LASTS, "stall_s": 0.0,
        "andes_qoe_mean": 1.0, "fairness": 1.0,
    }),
    Case("all at once", Script(((0.5, _TOKENS),)), {
        "ttft_mean_s": 0.5, "effective_ratio": 0.155, "stall_s": 0.0, "andes_qoe_mean": 1.0,
        "duration_s": 0.5,
    }),
    Case("2 s stall at token 50", _stalled(0.5, 50, 2.0), {
        "effective_ratio": 1.0, "stall_s": 2.0, "stalls": 1, "smooth_share": 0.0,
        "andes_qoe_mean": 1 - 60 / 437.5, "e2e_mean_s": _LASTS + 2,
    }),
    Case("5 s late start", paced(5.0, _PERIOD, _TOKENS), {
        "ttft_mean_s": 5.0, "ttft_slo_share": 0.0, "effective_ratio": 1.0, "stall_s": 0.0,
        "andes_qoe_mean": 1 - 370 / 747.5,
    }),
    Case("4 tokens a message", Script(tuple((0.5 + 0.2 * i, 4) for i in range(25))), {
        "tokens": 100, "chunk_gap_p50_s": 0.2, "chunk_gap_max_s": 0.2,
        "tpot_mean_s": 4.8 / 99, "stall_s": 0.0, "effective_ratio": 1.0,
    }),
    Case("held back to be sent in time", Script(_EVEN.messages, generated=(0.5,) * _TOKENS), {
        "effective_ratio": 1.0, "generated_effective_ratio": 0.155,
    }),
    Case("usage at the end only", Script(_EVEN.messages, usage="final"), {
        "tokens": 100, "ttft_mean_s": 0.5, "tpot_mean_s": 0.05, "effective_ratio": 1.0,
    }),
    Case("error in mid-stream", Script(_EVEN.messages[:50], fault="error event"), {
        "requests": 1, "failed": 1, "tokens": 50, "goodput_share": 0.0, "andes_qoe_mean": 0.0,
    }),
    Case("refused", Script((), fault="refusal"), {
        "failed": 4, "tokens": 0, "ttft_slo_share": 1.0, "goodput_share": 0.0,
    }, requests=4),
)  # fmt: skip
"""The hand cases; a refusal costs no time, so its TTFT is as short as the run."""


def check_exactly() -> list[Check]:
    """Every case on the virtual clock."""
    return [check for case in CASES for check in virtual_time.run(_check(case))]


async def _check(case: Case) -> list[Check]:
    clock = asyncio.get_running_loop().time
    stub = StubServer(lambda _: case.script, clock=clock)
    asks = tuple(Ask(i, 0.0, 1, _TOKENS, _RATE, i, i) for i in range(case.requests))
    async with stub.running() as url:
        target = OpenAITarget(OpenAIServer(url=url, model=MODEL), probe=False, clock=clock)
        await target.open()
        try:
            records = await Run(target, Workload(asks), timeout_s=60.0, clock=clock).run()
        finally:
            await target.close()
    found = figures(records, _description(url).objectives)
    return [
        Check(case.name, name, expected, found[name]) for name, expected in case.expected.items()
    ]


def _description(url: str, **changes: Any) -> Description:
    target = {"kind": "openai", "url": url, "model": MODEL}
    return load_description(None, {"name": "selftest", "target": target, **changes})


# -- in real time ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What the generator is loaded with: streams that all overlap, read at `token_rate`."""

    streams: int = 200
    ramp_s: float = 2.0
    """Seconds in which they begin."""
    overlap_s: float = 5.0
    """Seconds in which all of them run."""
    token_rate: float = 10.0
    each: int = 2
    """Tokens a message, as servers that coalesce send them."""

    @property
    def tokens(self) -> int:
        return round((self.ramp_s + self.overlap_s) * self.token_rate)


@dataclass(frozen=True, slots=True)
class RealTime:
    """What the machine and the generator add to true times; seconds."""

    load: Load
    most_at_once: int
    """Streams that were open together, by the stub."""
    messages_per_s: float
    late_p50_s: float
    late_p99_s: float
    late_max_s: float
    """Of the generator's own sends, after they were due."""
    delivery_p50_s: float
    delivery_p99_s: float
    """From the stub's write of a message to its time stamp in the client."""
    ttft_error_p99_s: float
    """Measured less scripted TTFT: sending, the stub's own delays, and delivery."""
    failed: int
    tokens_missing: int
    cpu_share: float
    """Of one core, taken by the generator's process."""
    figures: Figures

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_FIRST_S = 0.2


def measure(load: Load) -> RealTime:
    """Run the load against a stub in a process of its own."""
    with stub_process(load) as url:
        return asyncio.run(_measure(load, url))


async def _measure(load: Load, url: str) -> RealTime:
    step = load.ramp_s / load.streams
    asks = tuple(
        Ask(i, i * step, 1, load.tokens, load.token_rate, i, i) for i in range(load.streams)
    )
    description = _description(url)
    target = OpenAITarget(OpenAIServer(url=url, model=MODEL), probe=False)
    await target.open()
    try:
        before, begun = time.process_time(), time.monotonic()
        records = await Run(target, Workload(asks), timeout_s=300.0).run()
        cpu = (time.process_time() - before) / (time.monotonic() - begun)
    finally:
        await target.close()
    async with aiohttp.ClientSession() as session, session.get(f"{url}/served") as response:
        served = {entry["seed"]: entry for entry in json.loads(await response.read())}
    return _evaluate(load, description, records, served, cpu)


def _evaluate(
    load: Load,
    description: Description,
    records: list[StreamRecord],
    served: dict[int, dict[str, Any]],
    cpu: float,
) -> RealTime:
    lags = [r.sent_s - r.intended_s for r in records if r.sent_s is not None]
    deliveries, spans, messages = [], [], 0
    for record in records:
        sent = served[record.index]["sent"]
        messages += len(sent)
        spans.append((served[record.index]["received_s"], sent[-1][0]))
        if len(sent) == len(record.arrivals):
            pairs = zip(record.arrivals, sent, strict=True)
            deliveries += [arrived - written for (arrived, _), (written, _) in pairs]
    found = figures(records, description.objectives)
    errors = [r.first_token_s - r.intended_s - _FIRST_S for r in records if r.first_token_s]
    return RealTime(
        load=load,
        most_at_once=_most_at_once(spans),
        messages_per_s=messages / (found["duration_s"] or 1.0),
        late_p50_s=percentile(lags, 50),
        late_p99_s=percentile(lags, 99),
        late_max_s=max(lags),
        delivery_p50_s=percentile(deliveries, 50),
        delivery_p99_s=percentile(deliveries, 99),
        ttft_error_p99_s=percentile(errors, 99),
        failed=sum(not r.ok for r in records),
        tokens_missing=load.streams * load.tokens - sum(r.tokens for r in records),
        cpu_share=cpu,
        figures=found,
    )


def _most_at_once(spans: list[tuple[float, float]]) -> int:
    changes = sorted([(start, 1) for start, _ in spans] + [(stop, -1) for _, stop in spans])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@contextmanager
def stub_process(load: Load, *, first_s: float = _FIRST_S) -> Iterator[str]:
    """A stub in a process of its own, at the pace of the load; each answer as long as it is asked
    to be. Gives its base URL."""
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, load, first_s), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("stop")
        process.join(10)
        if process.is_alive():
            process.kill()


def _serve(pipe: Connection, load: Load, first_s: float) -> None:
    def script(body: dict[str, Any]) -> Script:
        return paced(first_s, 1 / load.token_rate, body["max_tokens"], each=load.each)

    async def serve() -> None:
        async with StubServer(script).running() as url:
            pipe.send(url)
            await asyncio.to_thread(pipe.recv)

    with short_collections():
        asyncio.run(serve())
