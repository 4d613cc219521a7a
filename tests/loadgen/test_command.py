"""`tokenflow bench` as it is typed: good runs, and everything that can go wrong on the way."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenflow.cluster.cli import main
from tokenflow.loadgen.report import load_report
from tokenflow.loadgen.runner import INTERRUPTED
from tokenflow.loadgen.stub import Script, StubServer, paced


@contextmanager
def stub(script: Callable[[dict[str, Any]], Script], **fields: Any) -> Iterator[str]:
    """A stub in a thread of its own; the thread ends with the context."""
    started: list[Any] = []
    ready = threading.Event()

    async def serve() -> None:
        stop = asyncio.Event()
        async with StubServer(script, **fields).running() as url:
            started.extend([url, asyncio.get_running_loop(), stop])
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    url, loop, stop = started
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def quick(body: dict[str, Any]) -> Script:
    return paced(0.02, 0.002, body["max_tokens"])


def bench(*words: str) -> int:
    return main(["bench", *words])


def run(url: str, out: Path, *words: str) -> int:
    return bench("run", "--url", url, "--out", str(out), "--arrivals", "burst:6",
                 "--output", "10", "--quiet", *words)  # fmt: skip


# -- good runs ------------------------------------------------------------------------------------


def test_a_run_is_printed_and_saved(tmp_path, capsys):
    out = tmp_path / "run"
    with stub(quick) as url:
        code = run(
            url, out, "--name", "first", "--repeats", "2", "--seed", "5", "--rate", "read@1,max"
        )
    assert code == 0
    said = capsys.readouterr().out
    assert f"first: stub at {url}" in said and "mean of 2, 95 % interval" in said
    assert f"open {out / 'report.html'}" in said
    report = load_report(out)
    assert (report.name, report.complete, report.model) == ("first", True, "stub")
    assert [repeat.seed for repeat in report.repeats] == [5, 6]
    assert report.summary["tokens"].value == 60 and report.summary["failed"].value == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "report.html", "report.json", "requests-5.jsonl", "requests-6.jsonl",
        "workload-5.jsonl", "workload-6.jsonl",
    ]  # fmt: skip
    assert len((out / "requests-5.jsonl").read_text().splitlines()) == 6


def test_a_saved_workload_is_served_again(tmp_path):
    with stub(quick) as url:
        assert run(url, tmp_path / "a", "--rate", "read@1,fast@1", "--input", "uniform:3,30") == 0
        saved = tmp_path / "a" / "workload-1.jsonl"
        assert run(url, tmp_path / "b", "--workload", str(saved), "--name", "again") == 0
    one, two = load_report(tmp_path / "a").repeats[0], load_report(tmp_path / "b").repeats[0]
    assert one.workload_sha256 == two.workload_sha256
    assert [r.token_rate for r in one.requests] == [r.token_rate for r in two.requests]
    assert (tmp_path / "b" / "workload-1.jsonl").read_text() == saved.read_text()


def test_a_file_describes_a_run_and_flags_change_it(tmp_path, capsys):
    with stub(quick) as url:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({
            "name": "file", "target": {"kind": "openai", "url": url},
            "arrivals": {"kind": "poisson", "per_s": 20, "duration_s": 0.5},
            "output": {"kind": "fixed", "tokens": 4}, "readers": [{"token_rate": "listen"}],
        }))  # fmt: skip
        assert bench("run", str(path), "--no-save", "--output", "7", "--quiet") == 0
    assert "file: stub" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]


def test_conditions_fail_a_run(tmp_path, capsys):
    with stub(quick) as url:
        assert run(url, tmp_path / "a", "--fail-if", "ttft_p99>30,failed>0") == 0
        assert run(url, tmp_path / "b", "--fail-if", "ttft_p99>0.001,failed>0") == 1
    assert "Failed: ttft_p99>0.001: TTFT P99 is" in capsys.readouterr().out
    assert load_report(tmp_path / "b").complete


def test_two_runs_are_compared(tmp_path, capsys):
    slow = lambda body: replace(quick(body), messages=((0.4, 10),))  # noqa: E731
    with stub(quick) as url:
        assert run(url, tmp_path / "a", "--repeats", "3", "--name", "quick") == 0
    with stub(slow) as url:
        assert run(url, tmp_path / "b", "--repeats", "3", "--name", "slow") == 0
    capsys.readouterr()
    a, b, html = str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "both.html"
    assert bench("compare", a, b, "--html", str(html)) == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if "TTFT mean" in x)
    assert row.rstrip().endswith("worse")
    assert "quick" in html.read_text() and "slow" in html.read_text()
    assert bench("compare", a, b, "--fail-if", "ttft_mean>+50%") == 1
    assert bench("compare", b, a, "--fail-if", "ttft_mean>+50%") == 0
    assert bench("report", a, b, "--html", str(tmp_path / "again.html")) == 0
    assert bench("report", a, "--html", str(tmp_path / "no" / "where.html")) == 2


def test_the_selftest_passes(tmp_path, capsys):
    path = tmp_path / "selftest.json"
    assert bench("selftest", "--exact-only", "--json", str(path)) == 0
    assert json.loads(path.read_text())["exact"]["wrong"] == 0
    assert "46 of 46 figures exact" in capsys.readouterr().out


def test_the_simulator_needs_no_server(tmp_path, capsys):
    code = bench("run", "--simulator", "--policy", "fcfs", "--arrivals", "burst:10",
                 "--output", "50", "--out", str(tmp_path / "run"))  # fmt: skip
    assert code == 0 and "policy fcfs" in capsys.readouterr().out
    assert load_report(tmp_path / "run").summary["tokens"].value == 500


def test_the_example_without_a_server_runs(tmp_path):
    example = Path(__file__).resolve().parents[2] / "examples" / "bench" / "simulated.yaml"
    assert bench("run", str(example), "--out", str(tmp_path / "run"), "--repeats", "1") == 0
    assert load_report(tmp_path / "run").summary["requests"].value == 100


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "has no target: give --url"),
        (["--url", "http://127.0.0.1:1", "--grpc", "h:1"], "--url and --grpc exclude each other"),
        (["--grpc", "h:1", "--model", "m"], "--model goes with --url"),
        (["--url", "ftp://h"], "no http:// or https:// address"),
        (["--engine", "--arrivals", "flood:1"], "--arrivals: 'flood:1' is none of"),
        (["--engine", "--input", "x"], "--input: 'x' is none of"),
        (["--engine", "--rate", "slow"], "--rate: 'slow'"),
        (["--engine", "--think", "2"], "--think needs --turns or --users"),
        (["--engine", "--fail-if", "x"], "--fail-if: 'x' is not"),
        (["--engine", "--repeats", "0"], "repeats"),
        (["--engine", "/nowhere"], "/nowhere"),
        (["--engine", "--arrivals", "trace:/nowhere.csv"], "cannot read the trace /nowhere.csv"),
        (["--engine", "--workload", "/nowhere"], "cannot read the trace /nowhere"),
        (["/nowhere.yaml"], "cannot read the run description /nowhere.yaml"),
        (["--simulator", "abacus:x"], "GPU:MODEL"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(words, said, capsys, tmp_path):
    assert bench("run", *words, "--no-save") == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenflow: ") and said in error and error.count("\n") == 1


def test_a_broken_trace_names_its_line(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,5,5\n1,five,5\n")
    assert bench("run", "--engine", "--arrivals", f"trace:{path}", "--no-save") == 2
    assert f"{path}:3: input_tokens is 'five'" in capsys.readouterr().err


def test_an_unreachable_server(tmp_path, capsys):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert run(url, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"cannot reach {url}/v1" in error and "Is the server running there?" in error
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("error event", "The engine has failed."),
        ("garbage", "not an OpenAI stream: JSONDecodeError"),
        ("cut", "ClientPayloadError|ClientOSError|ServerDisconnectedError"),
        ("no finish", "the stream ended without a finish reason"),
        ("refusal", "HTTP 429: The queue is full."),
    ],
)
def test_failures_in_mid_stream_are_counted_and_saved(tmp_path, capsys, fault, said):
    def script(body: dict[str, Any]) -> Script:
        whole = quick(body)
        odd = body["max_tokens"] == 10 and body["seed"] % 2
        return replace(whole, messages=whole.messages[:4], fault=fault) if odd else whole

    with stub(script) as url:
        assert run(url, tmp_path / "run") == 1
    report = load_report(tmp_path / "run")
    (repeat,) = report.repeats
    failed = [row for row in repeat.requests if row.error is not None]
    good = [row for row in repeat.requests if row.error is None]
    assert failed and good and report.complete
    assert all(re.search(said, row.error) for row in failed)
    assert {row.tokens for row in good} == {10}
    assert {row.tokens for row in failed} <= ({0} if fault == "refusal" else {0, 1, 2, 3, 4})
    assert repeat.figures["failed"] == len(failed)
    assert f"{len(failed)} of 6 requests failed" in capsys.readouterr().out.replace("\n", " ")
    assert "failed" in (tmp_path / "run" / "report.html").read_text()


def test_a_server_without_usage(tmp_path, capsys):
    with stub(lambda body: replace(quick(body), usage="none")) as url:
        assert run(url, tmp_path / "a") == 2
        assert "sends no usage; give --tokenizer" in capsys.readouterr().err
        from tokenflow.cluster.config import embedded_model

        assert run(url, tmp_path / "b", "--tokenizer", str(embedded_model())) == 0
    assert load_report(tmp_path / "b").summary["tokens"].value >= 6


def test_usage_at_the_end_is_said_to_be_so(tmp_path, capsys):
    with stub(lambda body: replace(quick(body), usage="final")) as url:
        assert run(url, tmp_path / "run") == 0
    assert load_report(tmp_path / "run").summary["tokens"].value == 60


def test_a_server_that_dies_in_the_middle(tmp_path, capsys):
    """The first answers are there, the rest is refused; all of it is reported."""
    out = tmp_path / "run"
    with stub(lambda body: paced(0.05, 0.02, body["max_tokens"])) as url:
        words = ["run", "--url", url, "--out", str(out), "--arrivals", "poisson:10,duration_s=4"]
        words += ["--output", "10", "--timeout", "3", "--quiet"]
        # Signals stay with the main thread; `main` sets one, so it needs a process of its own.
        process = subprocess.Popen(
            [sys.executable, "-m", "tokenflow.cluster.cli", "bench", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_for(lambda: done(out) >= 5)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    report = load_report(out)
    errors = [row.error for row in report.repeats[0].requests if row.error]
    good = [row for row in report.repeats[0].requests if row.error is None]
    assert len(good) >= 5 and len(errors) >= 5
    assert any("ClientConnectorError" in error for error in errors)


def done(out: Path) -> int:
    """Requests that were saved as finished."""
    return sum(len(p.read_text().splitlines()) for p in out.glob("requests-*.jsonl"))


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _heed_interrupts() -> None:
    """Where tests run in the background of a shell, interrupts are ignored, and by children too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_as_far_as_it_came(tmp_path, number):
    out = tmp_path / "run"
    with stub(lambda body: paced(0.02, 0.02, body["max_tokens"])) as url:
        process = subprocess.Popen(
            [sys.executable, "-m", "tokenflow.cluster.cli", "bench", "run", "--url", url,
             "--out", str(out), "--arrivals", "poisson:10,duration_s=60", "--output", "20"],
            preexec_fn=_heed_interrupts,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_for(lambda: done(out) >= 5)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    report = load_report(out)
    assert not report.complete and "Traceback" not in said
    rows = report.repeats[0].requests
    assert sum(row.error is None for row in rows) >= 5
    assert any(row.error == INTERRUPTED for row in rows)
    assert report.repeats[0].planned > len(rows)


def test_a_full_disk_is_told_and_the_figures_are_printed(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    os.symlink("/dev/full", out / "requests-1.jsonl")
    with stub(quick) as url:
        assert run(url, out) == 2
    said = capsys.readouterr()
    assert "TTFT P99" in said.out and "requests-1.jsonl: No space left on device" in said.err
    assert load_report(out).summary["failed"].value == 0


def test_a_folder_is_not_written_over(tmp_path, capsys):
    with stub(quick) as url:
        assert run(url, tmp_path / "run") == 0
        assert run(url, tmp_path / "run") == 2
    assert "holds a run already" in capsys.readouterr().err


def test_compare_wants_reports(tmp_path, capsys):
    (tmp_path / "report.json").write_text("{}")
    assert bench("compare", str(tmp_path), str(tmp_path)) == 2
    assert "is no report of this version" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--streams", "0"], ["--overlap", "0"]])
def test_selftests_that_make_no_sense(words, capsys):
    assert bench("selftest", *words) == 2


def test_the_stub_serves_what_it_is_told(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenflow.cluster.cli", "bench", "stub", "--port", str(port),
         "--ttft", "0.1", "--per-token", "0.005", "--each", "4"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and f":{port}/v1" in process.stdout.readline()
        assert run(f"http://127.0.0.1:{port}", tmp_path / "run", "--output", "9") == 0
        assert bench("stub", "--port", str(port)) == 2
    finally:
        process.terminate()
        process.wait(10)
    found = load_report(tmp_path / "run").summary
    assert found["tokens"].value == 54 and found["ttft_p50_s"].value >= 0.1
