"""The kill test in short: everything but a whole node, once each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


def test_no_stream_is_lost_whatever_is_killed(tmp_path):
    out = tmp_path / "kill.json"
    command = [sys.executable, "-m", "benchmarks.cluster.kill", "--json", str(out), "--nodes", "1"]
    command += ["--duration", "40", "--every", "7", "--http", "4", "--grpc", "4"]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    result = json.loads(out.read_text())
    assert all(result["kills"].values()), result["kills"]
    assert result["streams"] >= 8
