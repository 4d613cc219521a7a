"""Bounds no schedule may beat, and `tokenflow simulate`."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace

import pytest
from rich.console import Console

from tokenflow.cluster.cli import build_parser, main
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy
from tokenflow.replicas.simulator import command
from tokenflow.replicas.simulator.bounds import bounds
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.settings import SETTINGS
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests

MACHINE = SETTINGS["rtx4090-a"].machine()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_beats_the_bounds(policy, seed):
    rng = random.Random(seed)
    times = burst(40) if seed % 2 else poisson(3.0, 10.0, rng)
    arrivals = requests(times, 256, 300, [(rng.choice([5.0, 15.0, 40.0]), 1)], rng)
    limit = bounds(MACHINE, arrivals)
    got = simulate(MACHINE, make_policy(policy), arrivals).summary
    assert got.effective_tok_s <= limit.effective_tok_s * (1 + 1e-9)
    assert got.raw_tok_s <= limit.raw_tok_s * (1 + 1e-9)
    assert got.duration_s >= limit.duration_s * (1 - 1e-9)
    if policy != "andes":  # it serves short prompts first, which the bound does not know
        assert got.ttft_p99_s >= limit.ttft_p99_s * (1 - 1e-9)


def test_the_bounds_of_one_request_are_what_it_takes():
    arrivals = [Arrival(0.0, 512, 200, 1000.0)]
    limit = bounds(MACHINE, arrivals)
    got = simulate(MACHINE, make_policy("fcfs"), arrivals).summary
    assert limit.ttft_p99_s == pytest.approx(got.ttft_p99_s)
    assert limit.duration_s == pytest.approx(got.duration_s, rel=0.05)
    assert limit.effective_tok_s == pytest.approx(limit.raw_tok_s)


def test_slow_readers_bound_what_is_effective():
    arrivals = [Arrival(0.0, 100, 400, 2.0) for _ in range(4)]
    limit = bounds(MACHINE, arrivals)
    assert limit.effective_tok_s < limit.raw_tok_s
    faster = bounds(MACHINE, [replace(a, token_rate=4.0) for a in arrivals])
    assert limit.effective_tok_s < faster.effective_tok_s


def test_bounds_need_requests():
    with pytest.raises(ValueError, match="no requests"):
        bounds(MACHINE, [])


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_the_papers(name):
    setting = SETTINGS[name]
    arrivals = setting.arrivals(1, [(20.0, 1)], 60.0)
    count = setting.burst or 60 * setting.poisson_per_s
    assert len(arrivals) == pytest.approx(count, rel=0.25)
    assert arrivals == setting.arrivals(1, [(20.0, 1)], 60.0)
    assert arrivals != setting.arrivals(2, [(20.0, 1)], 60.0)
    mean = sum(a.output_tokens for a in arrivals) / len(arrivals)
    assert mean == pytest.approx(setting.output_mean, rel=0.1)


def test_the_command_prints_a_table_and_writes_every_figure(tmp_path):
    path = tmp_path / "out.json"
    flags = f"simulate --setting rtx4090-a --policy fcfs,tokenflow --json {path}"
    out = io.StringIO()
    console = Console(file=out, width=120)
    assert command.run(build_parser().parse_args(flags.split()), console) == 0
    text = out.getvalue()
    assert "bound" in text and "fcfs" in text and "tokenflow" in text
    report = json.loads(path.read_text())
    assert [(r["policy"], r["seed"]) for r in report["runs"]] == [("fcfs", 1), ("tokenflow", 1)]
    for run in report["runs"]:
        assert 0 < run["figures"]["effective_tok_s"] <= run["bounds"]["effective_tok_s"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--setting a100-z", "unknown name 'a100-z'"),
        ("--policy lifo", "unknown name 'lifo'"),
        ("--rates fast", "'fast' is not RATE"),
        ("--rates 0", "outside"),
        ("--rates nan", "outside"),
        ("--rates 20@-1", "outside"),
        ("--seeds 0", "--seeds"),
        ("--duration nan", "--duration"),
        ("--json /nowhere/at/all.json", "cannot write"),
    ],
)
def test_bad_flags_are_one_sentence(flags, words, capsys):
    assert main(["simulate", "--policy", "fcfs", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_rates_have_shares():
    assert command.parse_rates("20") == [(20.0, 1.0)]
    assert command.parse_rates("15@0.4,20@0.6") == [(15.0, 0.4), (20.0, 0.6)]
    with pytest.raises(ConfigError):
        command.parse_rates("")
