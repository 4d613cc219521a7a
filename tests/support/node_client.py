"""Runs the Node programs of examples/node-client. Tests skip, with the reason, where there is no
Node or its packages cannot be had."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "node-client"
PROTO = ROOT / "cluster" / "rpc" / "inference.proto"
_INSTALL_TIMEOUT_S = 120


def bare() -> list[str]:
    """The command of the client without packages."""
    return [_node(), str(EXAMPLE / "bare.mjs")]


@cache
def installed() -> tuple[str, ...]:
    """The command of the client with its packages, which are installed into the user's cache."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    lock = (EXAMPLE / "package-lock.json").read_bytes()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenflow-tests"
    folder = base / f"node-client-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not folder.exists():
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as scratch:
            made = Path(scratch) / "client"
            made.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(EXAMPLE / name, made)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            try:
                subprocess.run(
                    command, cwd=made, check=True, capture_output=True, timeout=_INSTALL_TIMEOUT_S
                )
            except subprocess.CalledProcessError as error:
                pytest.skip(f"npm ci failed: {error.stderr.decode(errors='replace')[:300]}")
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm ci took more than {_INSTALL_TIMEOUT_S} s")
            if not folder.exists():
                made.rename(folder)
    script = folder / "stream.mjs"
    shutil.copy(EXAMPLE / "stream.mjs", script)
    return _node(), str(script), "--proto", str(PROTO)


async def run(*command: str, timeout_s: float = 60) -> tuple[int, str, dict[str, Any] | str]:
    """(exit status, stdout, the last line of stderr: an object where it is JSON)."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    last = (err.decode().splitlines() or [""])[-1]
    assert process.returncode is not None
    return process.returncode, out.decode(), json.loads(last) if last.startswith("{") else last


def _node() -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    return node
