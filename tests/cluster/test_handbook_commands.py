"""What the documentation tells to type at a running server, typed at one: README.md and docs/."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.handbook import ADDRESS, ROOT, asks_a_server, blocks, commands
from tests.support.missing import missing

pytestmark = pytest.mark.cluster

SMALLER = (("burst:40", "burst:4"), ("--output 256", "--output 16"))
"""A burst that two cores serve in a moment."""
COMMANDS = [(block.where, command) for block, command in commands() if asks_a_server(command)]
LIVE = "tokenflow top --url"
"""Runs until it is stopped, and needs a terminal; with --once it does not."""


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_a_command(server, where, command, tmp_path):
    if shutil.which("curl") is None and "curl" in command:
        missing("curl is not installed")
    text = command.replace(ADDRESS, server.url.removeprefix("http://"))
    for long, short in SMALLER:
        text = text.replace(long, short)
    if LIVE in text and "--once" not in text:
        text += " --once"
    # `tokenflow` is the one under test.
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "tokenflow"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tokenflow.cluster.cli "$@"\n')
    program.chmod(0o755)
    text = text.replace(".venv/bin/tokenflow", "tokenflow").replace("curl ", "curl -sS --fail ")
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{where}: {done.stdout}{done.stderr}"
    if "-N" in text:
        assert "data: [DONE]" in done.stdout
    assert done.stdout.strip()


def test_headers_of_an_answer(server):
    """As docs/api.md has them."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        asked = {"model": server.model, "prompt": "The sea", "max_tokens": 2, "stream": True}
        mine = client.post("/v1/completions", json=asked, headers={"X-Request-Id": "mine"})
        other = client.post("/v1/completions", json=asked)
        assert mine.headers["x-request-id"] == "mine" and '"id":"mine"' in mine.text
        assert f'"id":"{other.headers["x-request-id"]}"' in other.text
        assert mine.headers["cache-control"] == "no-cache"
        assert mine.headers["x-accel-buffering"] == "no"
        for name in ("X-Request-Timeout-S", "X-Token-Rate", "X-Resumable"):
            wrong = client.post("/v1/completions", json=asked, headers={name: "soon"})
            assert wrong.status_code == 400
            assert f"The header {name}" in wrong.json()["error"]["message"]


async def test_the_python_of_the_front_page(server, capsys):
    (code,) = [block.text for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert ADDRESS in code
    code = code.replace(ADDRESS, server.url.removeprefix("http://"))
    await asyncio.to_thread(exec, compile(code, str(Path("README.md")), "exec"), {})
    assert len(capsys.readouterr().out) > 20
