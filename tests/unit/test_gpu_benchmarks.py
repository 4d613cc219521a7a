"""Every piece of the GPU benchmarks runs to its end in the smallest size, on the CPU: a mistake in
a script is not to be found when the GPU is there."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


def run(piece: str, out: Path, monkeypatch, *flags: str) -> dict:
    """The results of a piece, run in this process."""
    monkeypatch.syspath_prepend(str(GPU))
    script = str(GPU / f"{piece}.py")
    argv = [script, "--out", str(out), "--device", "cpu", "--tiny", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    before = set(sys.modules)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        for name in ("common", "paper"):
            if name not in before:
                sys.modules.pop(name, None)
    found = {}
    for path in out.glob("gpu-*.json"):
        report = json.loads(path.read_text())
        if "results" in report:
            assert report["measured"] is False
            found |= report["results"]
    return found


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_steps_are_set_beside_their_bounds(tmp_path, monkeypatch):
    found = run("decode", tmp_path, monkeypatch)
    for size in (1, 3):
        row = found[f"as configured, batch {size}"]
        assert row["fraction"] == pytest.approx(row["bound_ms"] / row["ms"])
    found = run("prefill", tmp_path, monkeypatch)
    assert found["2 x 16"]["fraction"] > 0


def test_copies_are_set_beside_the_link(tmp_path, monkeypatch):
    found = run("transfers", tmp_path, monkeypatch)
    assert found["write-through"]["gb_s"] > 0
    assert found["resume of 64 tokens, idle"]["copies_times"] > 0
    assert found["resume of 64 tokens, beside decode steps"]["seen_times"] > 0


def test_throughput_is_set_beside_transformers(tmp_path, monkeypatch):
    found = run("throughput", tmp_path, monkeypatch, "--attention", "paged|sdpa")
    assert found["tokenflow"]["output_tok_s"] > 0
    assert found["transformers, paged|sdpa"]["output_tok_s"] > 0


def test_a_setting_goes_on_where_the_last_call_ended(tmp_path, monkeypatch, capsys):
    first = run("paper", tmp_path, monkeypatch, "a", "--policy", "fcfs")
    both = run("paper", tmp_path, monkeypatch, "a", "--policy", "fcfs,slack")
    key = "seed 101, 60 s, tiny"
    assert both[f"fcfs, {key}"] == first[f"fcfs, {key}"]
    assert both[f"slack, {key}"]["failed"] == 0
    capsys.readouterr()
    run("paper", tmp_path, monkeypatch, "a", "--policy", "fcfs,slack")
    assert "has every policy" in capsys.readouterr().out
    run("calibrate", tmp_path, monkeypatch)
    errors = run("calibrate", tmp_path, monkeypatch, "--compare")
    assert errors["a, slack"]["raw_tok_s"] is not None
    assert errors["b"] == "no runs to compare with"


def test_a_scaled_setting_is_as_short_of_memory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    paper = runpy.run_path(str(GPU / "paper.py"))
    whole, quarter = (paper["scaled"]("a", scale) for scale in (1, 4))
    assert (quarter.output_mean, quarter.kv_tokens) == (whole.output_mean // 4, 198_000 // 4)
    assert quarter.prompt_mean == whole.prompt_mean and quarter.burst == whole.burst
    sys.modules.pop("common", None)


def test_the_script_runs_a_piece_from_the_checkout_alone(tmp_path):
    """As where the package is not installed: everything comes from the checkout."""
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    call = ["sh", str(GPU / "run.sh"), "simulate", "ceilings", "--device", "cpu", "--tiny"]
    ran = subprocess.run(call, env=env, timeout=200, cwd=tmp_path, capture_output=True, text=True)
    # There is no calibration to simulate with; the other piece ran nevertheless.
    assert ran.returncode == 1 and "failed: simulate\n" in ran.stderr
    report = json.loads((tmp_path / "gpu-ceilings.json").read_text())
    assert report["results"]["memory_gb_s"] > 0
    late = subprocess.run(call, env={**env, "LIMIT": "5"}, capture_output=True, text=True)
    assert "simulate (out of time) ceilings (out of time)" in late.stderr
    unknown = subprocess.run(["sh", str(GPU / "run.sh"), "nothing"], env=env, capture_output=True)
    assert unknown.returncode == 2 and b"no such piece" in unknown.stderr


def test_flash_attn_is_put_together_from_its_binary_and_its_sources(tmp_path):
    """The sources have two folders of that name, of which one is no Python."""
    for name in ("csrc/flash_attn", "flash_attn", "flash_attn.egg-info"):
        (tmp_path / "fa-2" / name).mkdir(parents=True)
    (tmp_path / "fa-2/flash_attn/__init__.py").write_text("import flash_attn_2_cuda\n")
    (tmp_path / "fa-2/flash_attn.egg-info/PKG-INFO").write_text(
        "Name: flash_attn\nVersion: 2.8.3\n"
    )
    (tmp_path / "fa2.so").write_bytes(b"")
    for archive, content in (("source.tar", "fa-2"), ("binary.tar", "fa2.so")):
        subprocess.run(["tar", "-cf", archive, content], cwd=tmp_path, check=True)
    seen = tmp_path / "seen.sh"
    seen.write_text(
        f"#!/bin/sh\ncase $* in *ceilings.py*) ls $(echo $PYTHONPATH | tr : ' ');; "
        f'*) exec {sys.executable} "$@";; esac\n'
    )
    seen.chmod(0o755)
    env = {
        **os.environ,
        "PYTHON": str(seen),
        "OUT": str(tmp_path),
        "FLASH_ATTN_BINARY": str(tmp_path / "binary.tar"),
        "FLASH_ATTN_SOURCE": str(tmp_path / "source.tar"),
    }
    call = ["sh", str(GPU / "run.sh"), "ceilings"]
    ran = subprocess.run(call, env=env, check=True, capture_output=True, text=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {"flash_attn", "flash_attn.egg-info", f"flash_attn_2_cuda{suffix}"} <= set(
        ran.stdout.split()
    )
