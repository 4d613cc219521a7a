"""The servers that are compared: how each is started on the same checkpoint, with the same KV
memory in tokens and on the same cores, and stopped again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import yaml

MODEL = "m"
_BLOCK_TOKENS = 32
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Setup:
    """What all of them get."""

    checkpoint: Path
    kv_tokens: int
    dtype: str
    """Of weights and KV: bfloat16 or float32."""
    cores: frozenset[int]
    venvs: Mapping[str, Path | None]
    """Where the others are installed."""
    logs: Path
    host_kv_gib: float = 1.0
    """Of ours: host memory for preempted requests; the others have nothing like it."""
    threads: int | None = None
    """That compute, of each server; None: as many as it takes by itself, here one core less."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of our engine's configuration."""

    def omp(self) -> dict[str, str]:
        """Environment of every server: who waits for another thread leaves the core to whoever
        has something to do, the generator among them."""
        if self.threads is None:
            return {}
        return {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}

    def program(self, peer: str, name: str) -> str:
        """The path of a peer's program. Raises RuntimeError where it is not installed."""
        venv = self.venvs.get(peer)
        if venv is None:
            raise RuntimeError(
                f"{peer} needs --{peer}-venv; make it with benchmarks/peers/setup_{peer}.sh"
            )
        path = venv / "bin" / name
        if not path.exists():
            raise RuntimeError(f"{path} is missing; run benchmarks/peers/setup_{peer}.sh {venv}")
        return str(path)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers."""

    name: str
    url: str
    model: str
    exact_output: bool
    """Whether it takes min_tokens and ignore_eos."""


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(name: str, setup: Setup) -> Iterator[Server]:
    """One of PEERS, up and answering. Raises RuntimeError, which names its log, when it is not."""
    port = _port()
    command, environment, model = PEERS[name](setup, port)
    log = setup.logs / f"{name}.log"
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | setup.omp() | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, setup.cores),
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", name, log)
        yield Server(name, f"http://127.0.0.1:{port}/v1", model, name != "transformers")
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, name: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode} at its start; see {log}")
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(_POLL_S)
    raise RuntimeError(f"{name} did not answer within {_START_TIMEOUT_S:g} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        # Not an interrupt: in the background of a shell that is ignored.
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # The session is its own: this reaches its children, and nobody else.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ours(setup: Setup, port: int) -> tuple[list[str], dict[str, str], str]:
    config = {
        "model": {"path": str(setup.checkpoint), "served_name": MODEL},
        "engine": {
            "kv_tokens": setup.kv_tokens,
            "dtype": setup.dtype,
            "prefix_cache": False,
            "cpu_threads": setup.threads,
            **setup.engine,
        },
        "kvstore": {"host_kv_gib": setup.host_kv_gib},
        "ingress": {"port": port, "grpc_port": _port()},
    }
    file = setup.logs / "ours.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "tokenflow.cluster.cli", "serve", "--config", str(file)]
    return command, {"RAY_ADDRESS": "local"}, MODEL


def _vllm(setup: Setup, port: int) -> tuple[list[str], dict[str, str], str]:
    command = [
        setup.program("vllm", "vllm"), "serve", str(setup.checkpoint),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL,
        "--max-model-len", "2048", "--dtype", setup.dtype, "--block-size", str(_BLOCK_TOKENS),
        "--num-gpu-blocks-override", str(setup.kv_tokens // _BLOCK_TOKENS),
        "--no-enable-prefix-caching", "--enforce-eager",
    ]  # fmt: skip
    # Memory for KV is set in blocks; this is what it may reserve for them.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if setup.threads is not None:
        cores = sorted(setup.cores)[: setup.threads]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return command, environment, MODEL


def _transformers(setup: Setup, port: int) -> tuple[list[str], dict[str, str], str]:
    command = [
        setup.program("transformers", "transformers"), "serve", str(setup.checkpoint),
        "--continuous-batching", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
        "--dtype", setup.dtype, "--cb-block-size", str(_BLOCK_TOKENS),
        "--cb-num-blocks", str(setup.kv_tokens // _BLOCK_TOKENS), "--cb-max-batch-tokens", "1024",
    ]  # fmt: skip
    return command, {"HF_HUB_OFFLINE": "1"}, str(setup.checkpoint)


PEERS = {"tokenflow": _ours, "vllm": _vllm, "transformers": _transformers}


def versions(setup: Setup) -> dict[str, str]:
    """Of us, and of the peers that are installed."""
    found = {name: version(name) for name in ("tokenflow-serve", "torch", "ray")}
    for peer, venv in setup.venvs.items():
        if venv is not None:
            asked = f"import importlib.metadata as m; print(m.version({peer!r}))"
            answer = subprocess.run(
                [setup.program(peer, "python"), "-c", asked],
                capture_output=True, check=True, text=True,
            )  # fmt: skip
            found[peer] = answer.stdout.strip()
    return found
