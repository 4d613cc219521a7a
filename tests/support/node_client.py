"""Runs the Node programs of examples/node-client. Tests skip, with the reason, where there is no
Node or its packages cannot be had."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import npm

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "node-client"
PROTO = ROOT / "cluster" / "rpc" / "inference.proto"


def bare() -> list[str]:
    """The command of the client without packages."""
    return [_node(), str(EXAMPLE / "bare.mjs")]


def installed() -> tuple[str, ...]:
    """The command of the client with its packages, which are installed into the user's cache."""
    folder = npm.installed(EXAMPLE)
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
