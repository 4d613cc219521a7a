"""A cost model fitted to what an engine took: the fit, its file, and a real engine end to end."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.fake_executor import FakeExecutor
from tests.support.tiny_models import make_checkpoint
from tokenflow.cluster.cli import main
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.executor.base import AsyncExecutor, KVLayout, ScheduledSequence
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.calibration import (
    Calibration,
    Overhead,
    calibrate,
    features,
    fit_cost,
    fit_overhead,
    link_gb_s,
    step_errors,
)
from tokenflow.replicas.simulator.fitting import fit, nnls
from tokenflow.replicas.simulator.probe import Observations
from tokenflow.replicas.simulator.recording import Copy, RecordingExecutor, Step
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.validation import Figure, workload
from tokenflow.replicas.simulator.workload import Arrival

TRUE = np.array([3e-3, 1.5e-4, 4e-7, 5e-7, 1e-4, 1.2e-7, 1e-4, 3e-8])
"""About what the embedded model takes on one core."""


def situations(count: int, rng: random.Random) -> list[tuple[tuple, tuple]]:
    found = []
    for _ in range(count):
        decodes = [rng.randint(10, 500) for _ in range(rng.choice((0, 1, 4, 16, 64)))]
        prefills = [
            (rng.choice((16, 64, 256)), rng.choice((0, 128)))
            for _ in range(rng.choice((0, 0, 1, 3)))
        ]
        if decodes or prefills:
            found.append((tuple(decodes), tuple(prefills)))
    return found


def observed(count: int = 600, *, noise: float = 0.05, outliers: float = 0.08) -> list[Step]:
    """Steps of the true model, some of which were interrupted for four times as long."""
    rng = random.Random(7)
    steps = []
    for decodes, prefills in situations(count, rng):
        seconds = float(TRUE @ np.array(features(decodes, prefills)))
        seconds *= np.exp(rng.gauss(0, noise))
        if rng.random() < outliers:
            seconds *= 4
        overhead = 2e-4 + 1e-5 * (len(decodes) + len(prefills))
        steps.append(Step(decodes, prefills, seconds, seconds, overhead))
    return steps


def copies() -> list[Copy]:
    alone = [Copy(to_host, 1 << 20, 1e-3, True) for to_host in (True, False)]
    return [*alone, Copy(True, 1 << 20, 1.0, False)]


def calibration(**changes) -> Calibration:
    steps = observed()
    made = calibrate(
        Observations(steps, copies(), {"fcfs": steps, "tokenflow": steps}),
        layout=KVLayout(2, 16, 2, 16, "float32"),
        kv_tokens=4096,
        host_kv_tokens=8192,
        max_num_seqs=32,
        max_batch_tokens=256,
        about={"machine": {"cores": 2}},
    )
    return made.model_copy(update=changes)


# -- the fit --------------------------------------------------------------------------------------


def test_the_fit_finds_the_true_cost_through_noise_and_outliers():
    cost = fit_cost(observed())
    for decodes, prefills in situations(200, random.Random(8)):
        truth = float(TRUE @ np.array(features(decodes, prefills)))
        assert cost.execute_s(decodes, prefills) == pytest.approx(truth, rel=0.06)
    assert cost.fixed_s == pytest.approx(TRUE[0], rel=0.1)
    assert cost.decode_s == pytest.approx(TRUE[1], rel=0.1)
    assert cost.prefill_s == pytest.approx(TRUE[4], rel=0.15)


def test_without_noise_the_fit_is_exact():
    cost = fit_cost(observed(noise=0, outliers=0))
    got = (cost.fixed_s, cost.decode_s, cost.context_s, cost.padded_s, cost.prefill_s)
    assert got == pytest.approx(TRUE[:5], rel=1e-6)
    assert cost.stretch == pytest.approx(1.0)


def test_interrupted_steps_count_in_the_mean_only():
    cost = fit_cost(observed())
    # Eight in a hundred took four times as long, of which the mean takes three.
    assert 1.08 < cost.stretch < 1.3
    quick, slow = [s.seconds for s in observed(outliers=0)], [s.seconds for s in observed()]
    assert sum(slow) > 1.15 * sum(quick)


def test_short_steps_count_as_much_as_long_ones():
    rows = np.array([[1.0, n] for n in [1] * 20 + [1000] * 20])
    seconds = rows @ np.array([1e-3, 1e-3])
    seconds[20:] *= 1.02
    found = fit(rows, seconds)
    assert found @ np.array([1.0, 1]) == pytest.approx(2e-3, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_nnls_is_the_best_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(30, 5)), rng.normal(size=30)
    best = float(np.linalg.norm(b))
    for size in range(1, 6):
        for chosen in itertools.combinations(range(5), size):
            x = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.linalg.norm(a[:, chosen] @ x - b)))
    x = nnls(a, b)
    assert (x >= 0).all()
    assert np.linalg.norm(a @ x - b) == pytest.approx(best)


def test_no_cost_is_negative_where_least_squares_would_make_one_so():
    rng = np.random.default_rng(0)
    first = rng.uniform(1, 2, 50)
    rows = np.stack([np.ones(50), first, first + rng.normal(0, 0.01, 50)], axis=1)
    seconds = rows @ np.array([1.0, 3.0, -1.0])
    assert (np.linalg.lstsq(rows, seconds, rcond=None)[0] < 0).any()
    found = fit(rows, seconds)
    assert (found >= 0).all()
    assert rows @ found == pytest.approx(seconds, rel=0.02)


def test_nothing_observed_is_said():
    with pytest.raises(ValueError, match="nothing was observed"):
        fit(np.empty((0, 3)), np.empty(0))
    with pytest.raises(ConfigError, match="too short"):
        calibrate(
            Observations([], [], {}),
            layout=KVLayout(1, 16, 1, 1, "float32"),
            kv_tokens=64,
            host_kv_tokens=64,
            max_num_seqs=1,
            max_batch_tokens=16,
            about={},
        )


# -- the cost model -------------------------------------------------------------------------------


def test_the_parts_of_a_step():
    assert features([10, 30], []) == (1, 2, 40, 60, 0, 0, 0, 0)
    assert features([], [(4, 0), (6, 10)]) == (1, 0, 0, 0, 10, 4 * 2 + 6 * 13, 2, 100)


def test_a_simulated_step_takes_the_engines_time_too():
    cost = replace(calibration().cost, stretch=1.5, overhead=Overhead(1e-3, 1e-4))
    alone = cost.execute_s([20, 30], [(16, 0)])
    assert cost.step_s(iter([20, 30]), iter([(16, 0)])) == pytest.approx(1.5 * alone + 1.3e-3)


def test_overhead_is_of_steps_without_a_pause():
    steps = observed(noise=0, outliers=0)
    paused = [replace(s, overhead_s=None) for s in steps[:50]]
    overhead = fit_overhead(paused + steps[50:])
    assert overhead.step_s == pytest.approx(2e-4)
    assert overhead.sequence_s == pytest.approx(1e-5)
    assert fit_overhead(paused) == Overhead()


def test_a_link_is_as_fast_as_the_copies_that_ran_alone():
    assert link_gb_s(copies(), to_host=True) == pytest.approx((1 << 20) / 1e-3 / 1e9)
    with pytest.raises(ValueError, match="no copy"):
        link_gb_s(copies()[-1:], to_host=True)


def test_errors_are_relative():
    cost = fit_cost(observed(noise=0, outliers=0))
    steps = observed(noise=0, outliers=0)
    assert step_errors(cost, steps).p90 < 1e-6
    slower = [replace(s, seconds=2 * s.seconds) for s in steps]
    accuracy = step_errors(cost, slower)
    assert accuracy.median == pytest.approx(0.5)
    assert accuracy.cpu_share == pytest.approx(0.5)
    assert Figure(10, 12).error == pytest.approx(0.2)
    assert Figure(0, 0).error == 0 and Figure(0, 1).error is None


def test_a_machine_is_for_a_policy_that_was_run():
    made = calibration()
    machine = made.machine("fcfs")
    assert (machine.kv_tokens, machine.max_num_seqs, machine.max_batch_tokens) == (4096, 32, 256)
    assert machine.cost.overhead == made.overheads["fcfs"]
    outcome = simulate(machine, make_policy("fcfs"), [Arrival(0.0, 100, 50, 10.0)])
    assert outcome.summary.tokens == 50
    with pytest.raises(ConfigError, match="not of andes"):
        made.machine("andes")


def test_the_second_run_is_bound_by_the_machine_not_by_its_arrivals():
    made = calibration()
    arrivals = workload(made, 1024, 1)
    assert arrivals == workload(made, 1024, 1) != workload(made, 1024, 2)
    tokens = sum(a.prompt_tokens + a.output_tokens for a in arrivals)
    assert tokens > 2 * made.kv_tokens
    slower = made.model_copy(update={"cost": replace(made.cost, stretch=2 * made.cost.stretch)})
    took = [
        simulate(m.machine("fcfs"), make_policy("fcfs"), arrivals).summary.duration_s
        for m in (made, slower)
    ]
    assert took[1] == pytest.approx(2 * took[0], rel=0.15)


# -- the file -------------------------------------------------------------------------------------


def test_a_calibration_survives_its_file(tmp_path):
    made = calibration()
    made.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == made
    with pytest.raises(ConfigError, match="cannot write"):
        made.save(tmp_path / "no" / "c.json")


def test_the_committed_calibration_still_loads():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    made = Calibration.load(results / "calibration-2-cores.json")
    arrivals = workload(made, 1024, 2)
    report = json.loads((results / "calibration-2-cores-validation.json").read_text())
    for policy, run in report["policies"].items():
        outcome = simulate(made.machine(policy), make_policy(policy), arrivals)
        assert outcome.summary.raw_tok_s == pytest.approx(
            run["figures"]["raw_tok_s"]["real"], rel=0.25
        )


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("cost", "decode_s"), -1e-3, "cost.decode_s"),
        (("cost", "fixed_s"), "quick", "cost.fixed_s"),
        (("cost",), None, "cost"),
        (("layout", "block_size"), 0, "layout"),
        (("layout", "dtype"), "int3", "layout"),
        (("to_host_gb_s",), 0, "to_host_gb_s"),
        (("kv_tokens",), 0, "kv_tokens"),
        (("overheads",), {}, "overheads"),
        (("format",), 2, "format"),
        (("colour",), "red", "colour"),
    ],
)
def test_a_broken_value_is_named(tmp_path, path, value, words):
    tree = json.loads(calibration().model_dump_json())
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file = tmp_path / "c.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"is no calibration.*tokenflow calibrate") as caught:
        Calibration.load(file)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_a_file_that_is_none_is_said(tmp_path, text):
    file = tmp_path / "c.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="is no calibration"):
        Calibration.load(file)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the calibration"):
        Calibration.load(tmp_path / "none.json")


# -- recording ------------------------------------------------------------------------------------


def test_copies_are_alone_when_waited_for_with_nothing_beside_them():
    times = iter(range(1000))
    executor = RecordingExecutor(FakeExecutor(8, 4, 8, delay=0), clock=lambda: float(next(times)))
    executor.offload([(0, 0), (1, 1)])
    executor.poll_transfers(1.0)
    executor.offload([(2, 2)])
    executor.load([(3, 3)])
    executor.poll_transfers(1.0)
    executor.load([(4, 4)])
    executor.poll_transfers()
    _, found = executor.take()
    assert [(c.to_host, c.alone) for c in found] == [
        (True, True),
        (True, False),
        (False, False),
        (False, False),
    ]
    assert found[0].bytes == 2 * executor.layout.block_bytes
    assert all(c.seconds > 0 for c in found)
    assert executor.take() == ([], [])


def test_a_step_launched_ahead_lasts_from_the_end_of_the_one_before():
    times = iter([0.0, 1.0, 5.0, 6.0, 9.0, 20.0, 22.0])
    inner = FakeExecutor(8, 4, 8)
    executor = RecordingExecutor(inner, clock=lambda: next(times))
    assert not executor.overlaps
    inner.overlaps = True
    assert isinstance(executor, AsyncExecutor) and executor.overlaps
    batch = [
        ScheduledSequence(0, [3], 0, np.array([0]), True, SamplingParams(max_tokens=9), (3,), ())
    ]
    first, second = executor.launch(batch), executor.launch(batch)  # at 0 and 1
    assert first.result().token_ids == second.result().token_ids  # at 5 and 6
    third = executor.launch(batch)  # at 9
    third.result()
    steps, _ = executor.take()
    assert [step.seconds for step in steps] == [5.0, 1.0, 11.0]
    assert all(step.overhead_s is None and step.decodes == (1,) for step in steps)


# -- a real engine --------------------------------------------------------------------------------


def test_a_real_engine_is_predicted(tmp_path, capsys):
    """The whole command on a tiny model; the machine may be busy, so only within a factor of 4."""
    config = tmp_path / "c.yaml"
    engine = {"kv_tokens": 1024, "cpu_threads": 1, "max_num_seqs": 32, "device": "cpu"}
    model = make_checkpoint(tmp_path / "model")
    config.write_text(yaml.safe_dump({"model": {"path": str(model)}, "engine": engine}))
    out = tmp_path / "out.json"
    flags = f"calibrate --validate --seconds 5 --config {config} --out {out}"
    assert main(flags.split()) == 0
    shown = capsys.readouterr().out
    policies = {"slack", "tokenflow", "fcfs"}
    assert all(f"{policy}: " in shown for policy in policies)
    made = Calibration.load(out)
    assert made.kv_tokens == 1024 and made.accuracy.steps > 100 and made.copies > 10
    assert made.cost.fixed_s + made.cost.decode_s > 0
    report = json.loads((tmp_path / "out-validation.json").read_text())
    assert set(report["policies"]) == set(made.overheads) == policies
    for policy in report["policies"].values():
        figures = policy["figures"]
        assert 0.25 < figures["raw_tok_s"]["predicted"] / figures["raw_tok_s"]["real"] < 4
        assert policy["single_steps"]["steps"] == figures["steps"]["real"]
    assert report["policies"]["slack"]["figures"]["preemptions"]["real"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seconds nan", "--seconds"),
        ("--seconds 0", "--seconds"),
        ("--out /nowhere/at/all.json", "cannot write"),
        ("--kv-tokens 3", "kv_tokens"),
        ("--config /nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_bad_flags_are_one_sentence(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
