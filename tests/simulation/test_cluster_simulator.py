"""Routers before simulated replicas."""

from __future__ import annotations

import io
import json
import random
from statistics import mean

import pytest
from rich.console import Console

from tokenflow.cluster.cli import build_parser
from tokenflow.cluster.routing import ROUTERS
from tokenflow.cluster.simulator import command
from tokenflow.cluster.simulator.replicas import EngineReplica, ReducedReplica
from tokenflow.cluster.simulator.run import Setup, simulate_cluster
from tokenflow.cluster.simulator.workload import BURST_AT_S, burst, scaled
from tokenflow.loadgen.traces import TraceRow
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.simulator.replay import parse_machine, replay_machine
from tokenflow.replicas.simulator.settings import SETTINGS
from tokenflow.replicas.simulator.workload import Arrival

H200 = replay_machine(*parse_machine("h200:qwen2.5-32b"), 0.9)
SMALL = SETTINGS["rtx4090-a"].machine()


def setup(**changes) -> Setup:
    return Setup(**({"machine": H200, "replicas": 8, "model": "reduced"} | changes))


def overload(per_s: float, seconds: float) -> list[Arrival]:
    rng = random.Random(1)
    at, arrivals = 0.0, []
    while at < seconds:
        at += rng.expovariate(per_s)
        prompt, output = rng.randrange(50, 400), rng.randrange(100, 300)
        arrivals.append(Arrival(at, prompt, output, 20.0))
    return arrivals


@pytest.mark.parametrize("model", ["engine", "reduced"])
@pytest.mark.parametrize("router", ["burst", "random"])
def test_every_request_is_answered_in_full_and_the_same_way_each_time(model, router):
    arrivals = burst(40, 4, 20.0, 1)
    runs = [
        simulate_cluster(setup(replicas=4, model=model, router=router, ingresses=2), arrivals)
        for _ in range(2)
    ]
    for record in runs[0].records:
        assert record.tokens == record.arrival.output_tokens
        assert record.ended_s is not None and record.ttft_s is not None and record.ttft_s > 0
    assert sum(runs[0].placed) == len(arrivals)
    assert runs[0].ttfts() == runs[1].ttfts() and runs[0].placed == runs[1].placed


def test_a_skewed_burst_waits_less_under_the_burst_router():
    p99 = {}
    for router in ("burst", "power-of-two", "random"):
        runs = [
            simulate_cluster(setup(router=router, seed=seed), burst(200, 8, 20.0, seed))
            for seed in (1, 2, 3)
        ]
        p99[router] = mean(run.figures(BURST_AT_S)["ttft_p99_s"] for run in runs)
    assert p99["burst"] < 0.9 * p99["power-of-two"]
    assert p99["burst"] < 0.85 * p99["random"]


def test_the_reduced_replica_is_near_the_engine():
    arrivals = burst(100, 4, 20.0, 1)
    seen = {}
    for model in ("engine", "reduced"):
        run = simulate_cluster(setup(replicas=4, model=model), arrivals)
        seen[model] = run.figures(BURST_AT_S)
    for key in ("ttft_mean_s", "ttft_p99_s", "raw_tok_s"):
        assert seen["reduced"][key] == pytest.approx(seen["engine"][key], rel=0.2), key


def test_admission_keeps_the_wait_bounded_and_readers_supplied():
    arrivals = overload(20.0, 60.0)
    changes = {"machine": SMALL, "replicas": 1, "model": "engine"}
    bounded = simulate_cluster(setup(**changes, max_ttft_s=5.0), arrivals)
    figures = bounded.figures()
    assert figures["refused"] > 0.3 * len(arrivals)
    assert figures["unfinished"] == 0
    assert figures["ttft_p99_s"] < 10.0
    # Who comes before the engine has measured its speeds is not refused, and not spared.
    warm = bounded.figures(since_s=5.0)
    assert warm["stall_p99_s"] < 1.0
    assert figures["prediction_error_mean_s"] < 2.0
    refused = [r for r in bounded.records if r.replica < 0]
    assert all(r.retry_after_s >= 1.0 and r.tokens == 0 for r in refused)


def test_reports_that_come_late_cost_something_and_break_nothing():
    arrivals = burst(100, 4, 20.0, 1)
    run = simulate_cluster(
        setup(replicas=4, frames=False, stats_delay_s=(1.0, 2.0), ingresses=4), arrivals
    )
    assert run.figures()["unfinished"] == 0


def test_a_scaled_trace_keeps_its_lengths_and_its_bursts():
    rows = (TraceRow(0.0, 10, 20), TraceRow(100.0, 30, 40))
    arrivals = scaled(rows, 500, 20.0, 1)
    assert len(arrivals) == 500
    late = [a for a in arrivals if a.at_s >= 100]
    assert len(late) == 250 and {a.prompt_tokens for a in late} == {30}
    assert max(a.at_s for a in arrivals if a.at_s < 100) < 10


def test_an_idle_replica_has_nothing_to_be_seen():
    for replica in (EngineReplica(SMALL, "slack", [5]), ReducedReplica(SMALL, 5)):
        assert replica.next_s == float("inf")
        replica.add(0, Arrival(3.0, 100, 5, 20.0), 3.0)
        assert 3.0 <= replica.next_s < 4.0
        tokens = 0
        while replica.next_s < float("inf"):
            tokens += sum(happening.tokens for happening in replica.advance())
        assert tokens == 5 and replica.load.active == 0 and replica.load.requests == 1


def run(tmp_path, *flags: str) -> str:
    args = build_parser().parse_args(["simulate-cluster", *flags])
    console = Console(file=io.StringIO(), width=120)
    assert command.run(args, console) == 0
    return console.file.getvalue()


def test_the_command_shows_and_writes_every_router_and_size(tmp_path):
    out, plot = tmp_path / "runs.json", tmp_path / "ttft.svg"
    flags = ["--replicas", "2,3", "--model", "reduced", "--requests", "5"]
    text = run(tmp_path, *flags, "--json", str(out), "--plot", str(plot))
    assert all(text.count(router) == 2 for router in ROUTERS)
    runs = json.loads(out.read_text())["runs"]
    assert [(r["replicas"], r["router"]) for r in runs] == [(n, r) for n in (2, 3) for r in ROUTERS]
    assert {r["requests"] for r in runs} == {10, 15}
    assert "10 requests on 2 replicas" in plot.read_text()


def test_the_command_replays_a_trace(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,100,10\n1,200,20\n")
    flags = ["--replicas", "2", "--trace", str(trace), "--requests", "10", "--router", "burst"]
    assert "20 requests" in run(tmp_path, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--router", "psychic"], "unknown name 'psychic'; known are burst"),
        (["--replicas", "0"], "not a list of numbers"),
        (["--replicas", "x"], "not a list of numbers"),
        (["--ingresses", "0"], "--ingresses must be from 1"),
        (["--machine", "tpu:gpt"], "is not GPU:MODEL"),
        (["--machine", "rtx4090:llama3-8b", "--memory-fraction", "0.75"], "does not fit into"),
    ],
)
def test_bad_flags_are_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "--requests", "100", *flags)
