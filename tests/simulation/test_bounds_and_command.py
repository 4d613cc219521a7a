"""Bounds no schedule may beat, and `tokenflow simulate`."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.support.machines import machine
from tokenflow.cluster.cli import build_parser, main
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy
from tokenflow.replicas.simulator import command
from tokenflow.replicas.simulator.bounds import bounds
from tokenflow.replicas.simulator.calibration import Calibration
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.settings import SETTINGS
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests

MACHINE = SETTINGS["rtx4090-a"].machine()
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


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


SMALL = machine()
"""Memory for 20 sequences of 200 tokens, 300 tokens/s."""


@settings(max_examples=25, deadline=None)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    requested=st.lists(
        st.tuples(
            st.floats(0, 30),
            st.integers(1, 300),
            st.integers(1, 600),
            st.sampled_from([0.5, 3.0, 8.0, 40.0, math.inf]),
        ),
        min_size=1,
        max_size=40,
    ),
)
def test_no_policy_beats_the_paced_bound_on_any_workload(policy, requested):
    arrivals = [Arrival(*one) for one in requested]
    limit = bounds(SMALL, arrivals)
    got = simulate(SMALL, make_policy(policy), arrivals).summary
    assert got.effective_tok_s <= limit.paced_effective_tok_s * (1 + 1e-9)
    assert limit.paced_effective_tok_s <= limit.effective_tok_s
    assert got.raw_tok_s <= limit.raw_tok_s * (1 + 1e-9)
    assert got.duration_s >= limit.duration_s * (1 - 1e-9)


def test_readers_who_could_wait_lower_the_paced_bound():
    # More than the device can make later, and early on nobody to read it.
    setting = SETTINGS["h200-c"]
    arrivals = setting.arrivals(301, [(20.0, 1)], 60.0)
    limit = bounds(setting.machine(), arrivals)
    assert 0.9 < limit.paced_effective_tok_s / limit.effective_tok_s < 0.94
    # Without readers there is nothing to be early for.
    burst = SETTINGS["h200-b"]
    nobody = burst.arrivals(301, [(math.inf, 1)], 60.0)
    limit = bounds(burst.machine(), nobody)
    assert limit.paced_effective_tok_s == pytest.approx(limit.raw_tok_s)


def test_one_slow_reader_alone_cannot_be_served_faster_than_paced():
    # Ten seconds of device for what is read in a hundred: at the end of which all tokens counted,
    # or before it, when less did.
    arrivals = [Arrival(0.0, 50, 300, 3.0)]
    limit = bounds(SMALL, arrivals)
    best = max(
        min(300, 3.0 * end + 0.15 * 300 + 2) / end for end in (limit.duration_s, 255 / 3.0, 100.0)
    )
    assert limit.paced_effective_tok_s == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_takes_at_least_its_floors(name):
    rng = random.Random(name)
    calibrated = Calibration.load(RESULTS / "calibration-2-cores.json").machine("fcfs").cost
    for cost in (SETTINGS[name].machine().cost, calibrated, SMALL.cost):
        for _ in range(50):
            decodes = [rng.randint(1, 4000) for _ in range(rng.randint(0, 40))]
            chunks = [
                (rng.randint(2, 1000), rng.randint(0, 1000)) for _ in range(rng.randint(0, 3))
            ]
            if not decodes and not chunks:
                continue
            prompt = sum(tokens for tokens, _ in chunks)
            for floor in cost.floors():
                least = floor.step_s + floor.decode_s * len(decodes)
                least += floor.context_s * sum(decodes) + floor.prompt_s * prompt
                assert cost.step_s(decodes, chunks) >= least * (1 - 1e-12)


def test_a_calibrated_machine_can_be_simulated(tmp_path):
    trace = tmp_path / "small.csv"
    rows = "".join(f"{i * 0.01},40,{60 + i}\n" for i in range(30))
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    out = tmp_path / "out.json"
    file = RESULTS / "calibration-2-cores.json"
    flags = f"simulate --trace {trace} --machine {file} --policy fcfs,tokenflow --json {out}"
    console = Console(file=io.StringIO(), width=120)
    assert command.run(build_parser().parse_args(flags.split()), console) == 0
    report = json.loads(out.read_text())
    assert report["arguments"]["machine"] == file.name
    for run in report["runs"]:
        # Each policy has its own overhead, so its own bound.
        expected = bounds(
            Calibration.load(file).machine(run["policy"]),
            [Arrival(i * 0.01, 40, 60 + i, 20.0) for i in range(30)],
        )
        assert run["bounds"]["raw_tok_s"] == pytest.approx(expected.raw_tok_s)
        assert 0 < run["figures"]["raw_tok_s"] <= run["bounds"]["raw_tok_s"]
    first, second = (run["bounds"]["raw_tok_s"] for run in report["runs"])
    assert first != second


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--setting rtx4090-a --policy fcfs", "does not fit into the 4096 KV tokens"),
        ("--setting rtx4090-a --policy andes", "not of andes"),
        ("--memory-fraction 0.5 --policy fcfs", "--memory-fraction is part of the calibration"),
    ],
)
def test_what_a_calibration_cannot_be_is_said(flags, words, capsys):
    file = RESULTS / "calibration-2-cores.json"
    assert main(["simulate", "--machine", str(file), *flags.split()]) == 2
    assert words in capsys.readouterr().err
