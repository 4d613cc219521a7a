"""`tokenflow simulate`: traces, plots, worker processes, seeds."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from tests.support.shared_data import shared_file
from tokenflow.cluster.cli import build_parser, main
from tokenflow.loadgen.metrics import StreamRecord, percentile
from tokenflow.replicas.errors import ConfigError, TokenFlowError
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator import command, jobs
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.settings import SETTINGS, Setting
from tokenflow.replicas.simulator.workload import Arrival

HEADER = "arrival_s,input_tokens,output_tokens\n"
ROWS = HEADER + "".join(f"{i * 0.5},{300 + i},{40 + i}\n" for i in range(20))
SMALL = ("--machine", "rtx4090:llama3-8b", "--policy", "fcfs,tokenflow")


@pytest.fixture
def trace(tmp_path):
    def write(text: str = ROWS) -> str:
        path = tmp_path / "small.csv"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def tiny(monkeypatch):
    """Two settings that take no time."""
    for name in ("tiny-a", "tiny-b"):
        burst = 12 if name == "tiny-a" else 20
        setting = Setting(name, "rtx4090", 4000, 256, 60, burst=burst)
        monkeypatch.setitem(SETTINGS, name, setting)
    return ("--setting", "tiny-a,tiny-b", "--policy", "fcfs,tokenflow")


def run(*flags: str, width: int = 80) -> str:
    out = io.StringIO()
    args = build_parser().parse_args(["simulate", *flags])
    assert command.run(args, Console(file=out, width=width)) == 0
    return out.getvalue()


def report(tmp_path, *flags: str) -> dict:
    path = tmp_path / "report.json"
    run(*flags, "--json", str(path))
    return json.loads(path.read_text())


# -- traces ---------------------------------------------------------------------------------------


def test_a_trace_is_replayed_with_its_times_and_lengths(trace, tmp_path):
    got = report(tmp_path, "--trace", trace(), *SMALL, "--time-scale", "2", "--rates", "10")
    assert got["arguments"]["trace"] == "small.csv"
    assert got["arguments"]["machine"] == "rtx4090:llama3-8b"
    assert [r["policy"] for r in got["runs"]] == ["fcfs", "tokenflow"]
    for one in got["runs"]:
        assert one["setting"] == "small"
        assert one["figures"]["requests"] == 20
        assert one["figures"]["tokens"] == sum(range(40, 60))
        assert 19 < one["figures"]["duration_s"] < 22  # the last arrives at 2 * 9.5 s
        assert 0 < one["figures"]["effective_tok_s"] <= one["bounds"]["effective_tok_s"]


def test_a_window_of_a_trace(trace, tmp_path):
    flags = ("--trace-start", "2", "--duration", "3")
    got = report(tmp_path, "--trace", trace(), *SMALL, *flags)
    assert {r["figures"]["tokens"] for r in got["runs"]} == {sum(range(44, 50))}


def test_failed_requests_and_memory_are_told(trace):
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text = run("--trace", trace(header + "7,m,10,0,10,l\n8,m,10,5,15,l\n"), *SMALL, width=200)
    assert "1 requests of" in text and "(1 that failed are left out)" in text
    # 24 GB * 0.9 - 16.06 GB - 1 GB at 131,072 bytes a token, in blocks of 16.
    assert "34624 KV tokens" in text


def test_seeds_draw_the_reading_speeds_of_a_trace(trace, tmp_path):
    flags = ("--rates", "5@1,40@1", "--seeds", "2", "--policy", "fcfs")
    got = report(tmp_path, "--trace", trace(), "--machine", "rtx4090:llama3-8b", *flags)
    first, second = (r["figures"] for r in got["runs"])
    assert first["tokens"] == second["tokens"]
    assert first["effective_tok_s"] != second["effective_tok_s"]


def test_a_public_trace_under_less_memory():
    path = shared_file("data/traces/burstgpt2_gpt4_894s_raw.csv")
    text = run("--trace", str(path), "--duration", "60", *SMALL)
    assert "burstgpt2_gpt4_894s_raw" in text and "tokenflow" in text


def test_a_request_may_fill_the_memory(trace, tmp_path):
    got = report(tmp_path, "--trace", trace(HEADER + "0,34000,624\n0,100,50\n"), *SMALL)
    assert {r["figures"]["tokens"] for r in got["runs"]} == {674}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "is empty"),
        ("a,b,c\n", 1, "unknown header"),
        (HEADER + "0,1,1\n0,1\n", 3, "2 columns"),
        (HEADER + "0,1,1\n1,x,1\n", 3, "input_tokens is 'x'"),
        (HEADER + "0,1,1\n1,1,0\n", 3, "output_tokens is '0'"),
        (HEADER + "nan,1,1\n", 2, "arrival_s is 'nan'"),
        (HEADER + "2,1,1\n1,1,1\n", 3, "sort"),
        (HEADER + "0,1,1\n1,34000,625\n", 3, "34000 + 625 tokens does not fit into the 34624 KV"),
    ],
)
def test_bad_traces_are_one_sentence_with_file_and_line(trace, text, line, words, capsys):
    path = trace(text)
    assert main(["simulate", "--trace", path, *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tokenflow: {path}:{line}: ") and words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--trace /nowhere.csv", "cannot read the trace /nowhere.csv"),
        ("--trace {} --setting rtx4090-a", "exclude each other"),
        ("--trace {} --trace-start 99", "Choose another window"),
        ("--trace {} --trace-start -1", "start must be"),
        ("--trace {} --time-scale 0", "time scale must be"),
        ("--trace {} --time-scale nan", "time scale must be"),
        ("--trace {} --machine tpu:llama3-8b", "'tpu:llama3-8b' is not GPU:MODEL"),
        ("--trace {} --machine h200", "'h200' is not GPU:MODEL"),
        ("--trace {} --machine rtx4090:qwen2.5-32b", "qwen2.5-32b does not fit into rtx4090"),
        ("--trace {} --memory-fraction 0", "--memory-fraction must be"),
        ("--trace {} --memory-fraction nan", "--memory-fraction must be"),
        ("--trace {} --memory-fraction 0.1", "does not fit into h200 at a memory fraction of 0.1"),
        ("--trace-start 0", "--trace-start needs --trace"),
        ("--time-scale 1", "--time-scale needs --trace"),
        ("--machine h200:llama3-8b", "--machine needs --trace"),
        ("--memory-fraction 0.9", "--memory-fraction needs --trace"),
        ("--jobs 0", "--jobs must be"),
        ("--limit-factor 0.5", "--limit-factor must be"),
        ("--limit-factor nan", "--limit-factor must be"),
        ("--seed-base -1", "--seed-base must be"),
        ("--plots {}", "--plots: cannot make"),
    ],
)
def test_bad_flags_are_one_sentence(flags, words, trace, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "simulate", lambda *_: pytest.fail("a run was started"))
    assert main(["simulate", *flags.format(trace()).split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# -- plots ----------------------------------------------------------------------------------------


def test_plots_of_each_setting_and_of_all(tiny, tmp_path):
    folders = [tmp_path / "new" / "one", tmp_path / "two"]
    for folder in folders:
        run(*tiny, "--seeds", "2", "--plots", str(folder))
    names = {f"{s}-{p}.svg" for s in ("tiny-a", "tiny-b") for p in ("ttft", "queue", "timelines")}
    assert {path.name for path in folders[0].iterdir()} == names | {"effective.svg"}
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
        assert "tokenflow" in path.read_text()
    assert "tiny-a, bound" in (folders[0] / "effective.svg").read_text()


def test_the_first_seed_is_plotted(tiny, tmp_path):
    run(*tiny, "--seed-base", "5", "--seeds", "2", "--plots", str(tmp_path / "two"))
    run(*tiny, "--seed-base", "5", "--plots", str(tmp_path / "one"))
    run(*tiny, "--seed-base", "6", "--plots", str(tmp_path / "next"))
    first, second, other = (
        (tmp_path / name / "tiny-a-ttft.svg").read_bytes() for name in ("two", "one", "next")
    )
    assert first == second != other


def test_matplotlib_is_missed_before_anything_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(jobs, "simulate", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ConfigError, match="pip install"):
        run(*tiny, "--plots", str(tmp_path))


def test_the_simulator_does_not_import_matplotlib():
    code = "import sys, tokenflow.replicas.simulator.command; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"False\n"


# -- runs, seeds and processes --------------------------------------------------------------------


def test_two_processes_give_what_one_gives(trace, tmp_path):
    flags = ("--trace", trace(), *SMALL, "--seeds", "2", "--rates", "5@1,40@1")
    one = report(tmp_path, *flags, "--plots", str(tmp_path / "one"))
    two = report(tmp_path, *flags, "--plots", str(tmp_path / "two"), "--jobs", "2")
    assert one["runs"] == two["runs"] and len(one["runs"]) == 4
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_an_error_in_a_worker_is_the_callers(trace):
    """Only a worker meets it: the command looks at machine and trace before."""
    setting = SETTINGS["rtx4090-a"]
    huge = [Arrival(0.0, 40_000, 1, 20.0)]
    job = jobs.Job("s", "fcfs", 1, setting.machine(), huge, None, False)
    with pytest.raises(ValueError, match="does not fit"), jobs.results([job] * 3, 2) as finished:
        list(finished)


class Killer:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_worker_is_one_sentence():
    job = jobs.Job("s", "fcfs", 1, Killer(), [], None, False)
    with pytest.raises(TokenFlowError, match="fewer --jobs"), jobs.results([job], 2) as finished:
        list(finished)


def test_seeds_start_at_the_base(tiny, tmp_path):
    got = report(tmp_path, *tiny, "--seed-base", "41", "--seeds", "2")
    assert got["seeds"] == [41, 42]
    assert [(r["setting"], r["seed"], r["policy"]) for r in got["runs"]][:5] == [
        ("tiny-a", 41, "fcfs"),
        ("tiny-a", 41, "tokenflow"),
        ("tiny-a", 42, "fcfs"),
        ("tiny-a", 42, "tokenflow"),
        ("tiny-b", 41, "fcfs"),
    ]


def test_the_report_says_what_made_it(tiny, tmp_path):
    got = report(tmp_path, *tiny)
    assert got["machine"]["cpus"] >= 1 and got["machine"]["processor"]
    assert {"python", "tokenflow-serve", "numpy"} == set(got["versions"])
    assert got["arguments"]["duration"] == 60.0 and got["arguments"]["trace"] is None


def test_the_p99_of_dry_seconds_is_over_the_readers():
    setting = SETTINGS["rtx4090-a"]
    arrivals = [Arrival(0.0, 512, 600, 15.0) for _ in range(60)]
    outcome = simulate(setting.machine(), make_policy("fcfs"), arrivals)
    dry = [record.playback().stall_s for record in outcome.records]
    got = jobs.figures(outcome)
    assert got["stall_p99_s"] == percentile(dry, 99) > 0
    assert got["stall_s"] == pytest.approx(sum(dry))


def test_the_spread_is_shown_for_more_than_one_seed(tiny, tmp_path):
    assert "min-max" not in run(*tiny)
    text = run(*tiny, "--seeds", "2")
    runs = report(tmp_path, *tiny, "--seeds", "2")["runs"]
    seen = [
        r["figures"]["effective_tok_s"]
        for r in runs
        if (r["setting"], r["policy"]) == ("tiny-a", "fcfs")
    ]
    assert f"{min(seen):.0f}-{max(seen):.0f}" in text
    assert "min-max" in text and "…" not in text


def test_the_dry_share_of_each_reading_speed_is_reported():
    def record(rate: float, times: list[float]) -> StreamRecord:
        return StreamRecord(rate, 0.0, arrivals=[(at, 1) for at in times])

    # Two tokens a second apart at 2 tokens/s: half a second dry in one and a half; none at 1.
    records = [record(2.0, [0.0, 1.0]), record(1.0, [0.0, 1.0]), record(math.inf, [0.0, 9.0])]
    shares = jobs._dry_shares(records)
    assert shares == {"dry_share_at_1": 0.0, "dry_share_at_2": pytest.approx(1 / 3)}


def test_limits_may_be_declared_higher_than_outputs_are(tmp_path, tiny):
    usual = report(tmp_path, *tiny)
    generous = report(tmp_path, *tiny, "--limit-factor", "4")
    assert generous["arguments"]["limit_factor"] == 4.0
    tokens = [[run["figures"]["tokens"] for run in got["runs"]] for got in (usual, generous)]
    assert tokens[0] == tokens[1]
    # Careful admission believes the limits.
    ttft = [got["runs"][0]["figures"]["ttft_mean_s"] for got in (usual, generous)]
    assert usual["runs"][0]["policy"] == "fcfs" and ttft[0] < ttft[1]
