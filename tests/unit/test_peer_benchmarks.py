"""The benchmark beside other servers: what it starts them with, and that it goes on where it ended.
Without any server."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.report import load_report, make_repeat
from tokenflow.loadgen.targets.base import Opened
from tokenflow.loadgen.workload import make_workload
from tokenflow.replicas.errors import ConfigError

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, with servers that are not there and repeats that took no time."""
    monkeypatch.syspath_prepend(str(PEERS))
    import run
    import servers

    @contextlib.contextmanager
    def running(name, setup):
        yield servers.Server(name, f"http://{name}/v1", "m", exact_output=True)

    def serve(server, args, seed, console):
        description = run.describe(server, args, seed)
        workload = make_workload(description, seed)
        records = [StreamRecord(a.token_rate, 0.0, index=a.index) for a in workload.asks]
        for record in records:
            record.sent_s, record.arrivals = 0.0, [(1.0, 2), (2.0, 3)]
            record.finished_s, record.finish_reason = 2.0, "length"
        repeat = make_repeat(records, workload, seed, description.objectives, "")
        return SimpleNamespace(
            repeats=[repeat], opened=Opened(server.url, "m"), description=description
        )

    monkeypatch.setattr(run, "running", running)
    monkeypatch.setattr(run, "serve", serve)
    monkeypatch.setattr(run, "versions", lambda setup: {})
    # Without a tokenizer nothing must be read.
    common = run.common
    monkeypatch.setattr(
        run, "common", lambda s, a: common(s, a) | {"target": {"kind": "openai", "url": s.url}}
    )

    def start(out, *flags):
        flags = ("--checkpoint", "CKPT", "--peers", "tokenflow,vllm", "--out", str(out), *flags)
        monkeypatch.setattr(sys, "argv", ["run.py", *flags])
        assert run.main() == 0
        return {name: load_report(out / f"{name}.json") for name in ("tokenflow", "vllm")}

    yield start
    for name in ("run", "servers"):
        sys.modules.pop(name, None)


def seeds(reports):
    return {name: [repeat.seed for repeat in report.repeats] for name, report in reports.items()}


def test_a_comparison_goes_on_where_it_ended(bench, tmp_path):
    bench(tmp_path, "--requests", "3", "--repeats", "2", "--seed", "5")
    reports = bench(tmp_path, "--requests", "3", "--repeats", "1", "--resume")
    assert seeds(reports) == {"tokenflow": [5, 6, 7], "vllm": [5, 6, 7]}
    assert reports["vllm"].summary["raw_tok_s"].samples == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["figures"]["tokenflow"]["ttft_p99_s"]["samples"] == 3


def test_without_resume_it_begins_anew(bench, tmp_path):
    bench(tmp_path, "--requests", "3", "--repeats", "2")
    assert seeds(bench(tmp_path, "--requests", "3", "--repeats", "1"))["vllm"] == [1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--requests", "4"], "the arrivals of"),
        (["--requests", "3", "--rate", "12"], "the readers of"),
        (["--requests", "3", "--kv-tokens", "2048"], "was measured with"),
        (["--requests", "3", "--threads", "2"], "was measured with"),
    ],
)
def test_another_comparison_is_not_gone_on_with(bench, tmp_path, flags, words):
    bench(tmp_path, "--requests", "3", "--repeats", "1")
    with pytest.raises(ConfigError, match=words):
        bench(tmp_path, "--resume", "--repeats", "1", *flags)


def test_there_is_nothing_to_go_on_with(bench, tmp_path):
    with pytest.raises(ConfigError, match="cannot read the report"):
        bench(tmp_path, "--resume", "--repeats", "1")


def test_peers_with_unequal_repeats_are_not_compared(bench, tmp_path):
    bench(tmp_path, "--requests", "3", "--repeats", "2")
    report = load_report(tmp_path / "vllm.json")
    report.repeats.pop()
    (tmp_path / "vllm.json").write_text(report.model_dump_json())
    with pytest.raises(ConfigError, match="not the same number of repeats"):
        bench(tmp_path, "--requests", "3", "--resume", "--repeats", "1")


@pytest.mark.parametrize("threads", [None, 2])
def test_all_servers_compute_with_the_threads_asked_for(bench, tmp_path, threads):
    import servers

    program = tmp_path / "venv" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.touch()
    setup = servers.Setup(
        checkpoint=tmp_path,
        kv_tokens=4096,
        dtype="bfloat16",
        cores=frozenset({3, 1, 2}),
        venvs={"vllm": tmp_path / "venv"},
        logs=tmp_path,
        threads=threads,
    )
    servers.PEERS["tokenflow"](setup, 1)
    ours = yaml.safe_load((tmp_path / "ours.yaml").read_text())["engine"]
    _, environment, _ = servers.PEERS["vllm"](setup, 1)
    assert ours["cpu_threads"] == threads
    assert environment.get("VLLM_CPU_OMP_THREADS_BIND") == (None if threads is None else "1,2")
    assert setup.omp().get("OMP_NUM_THREADS") == (None if threads is None else "2")
