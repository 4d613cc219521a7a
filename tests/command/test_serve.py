"""`tokenflow serve` as a user runs it."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import grpc
import httpx
import pytest

from tests.support.certificates import make_certificate
from tests.support.guarded import KeyRing
from tests.support.processes import processes_of
from tokenflow.cluster.local import free_port

pytestmark = pytest.mark.cluster


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("tokenflow-*")}


def ray_refuses_strangers(commands: Iterable[str]) -> bool:
    """Whether Ray's own control service asks for a token."""
    address = next(m[1] for c in commands if (m := re.search(r"--gcs-address=(\S+)", c)))
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_and_stops_without_a_trace(number, tmp_path):
    """The second time with TLS and API keys."""
    marker = uuid.uuid4().hex
    before = segments()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as ray_files:
        # The cluster of the other tests has set variables of its own in this process.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": ray_files, "RAY_ADDRESS": "local", "TOKENFLOW_TEST": marker}
        command = [sys.executable, "-m", "tokenflow.cluster.cli", "serve", "--port", str(port)]
        command += ["--grpc-port", str(free_port()), "--kv-tokens", "2048", "--host-kv-gib", "0.1"]
        scheme, headers, trusted = "http", {}, True
        if number == signal.SIGTERM:
            ring = KeyRing(tmp_path / "keys.yaml")
            ring.add("me", "me")
            tls = make_certificate(tmp_path, "front")
            command += ["--api-keys", str(ring.path)]
            command += ["--tls-cert", tls.certificate, "--tls-key", tls.key]
            scheme, headers = "https", ring.headers("me")
            trusted = ssl.create_default_context(cafile=tls.certificate)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("Ctrl-C"):
                    break
            # Serve's proxy restarts itself with each change it hears of, late on a busy machine.
            connect = httpx.HTTPTransport(verify=trusted, retries=4)
            with httpx.Client(transport=connect, timeout=60) as client:
                url = f"{scheme}://127.0.0.1:{port}/v1/completions"
                asked = {"model": "tokenflow-books", "prompt": "Hello", "max_tokens": 3}
                assert client.post(url, json=asked, headers=headers).status_code == 200
                stranger = client.post(url, json=asked)
                assert stranger.status_code == (401 if headers else 200)
            assert segments() - before
            processes = processes_of(ray_files, marker)
            assert len(processes) > 5
            assert ray_refuses_strangers(processes.values())
            process.send_signal(number)
            rest = process.stdout.read()
            assert process.wait(60) == 0, rest
            assert "Stopped." in rest
            assert "Traceback" not in rest
        finally:
            process.kill()
            process.wait()
        deadline = time.monotonic() + 10
        while (left := processes_of(ray_files, marker)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left
    assert segments() == before


def test_serve_refuses_a_ray_cluster_that_serves_already(server):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "tokenflow.cluster.cli", "serve"]
    command += ["--port", str(free_port()), "--grpc-port", str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Ray Serve already runs on this Ray cluster" in done.stderr
    assert "Traceback" not in done.stderr
    assert httpx.get(f"{server.url}/health").status_code == 200
