"""A Ray head as KubeRay starts one: `ray start --head --block` with token authentication, and its
dashboard, through which Serve is configured. On loopback, with ports and folders of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.processes import processes_of
from tokenflow.cluster.app import APP_NAME
from tokenflow.cluster.local import SERVE_ENVIRONMENT, free_port

_START_TIMEOUT_S = 90
_STOP_TIMEOUT_S = 30


@dataclass
class RayHead:
    """Where it is, and how it is spoken to."""

    dashboard_port: int = field(default_factory=free_port)
    agent_port: int = field(default_factory=free_port)
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def agent(self) -> str:
        return f"http://127.0.0.1:{self.agent_port}"

    def environment(self, scratch: Path) -> dict[str, str]:
        ports = {
            f"RAY_SERVE_{name}_PORT": str(free_port())
            for name in (
                "HAPROXY_STATS",
                "HAPROXY_METRICS",
                "FALLBACK_PROXY_HTTP",
                "FALLBACK_PROXY_GRPC",
            )
        }
        files = {
            "CONFIG_FILE_LOC": "haproxy.cfg",
            "SOCKET_PATH": "admin.sock",
            "METRICS_SOCKET_PATH": "metrics.sock",
            "SERVER_STATE_BASE": "",
            "SERVER_STATE_FILE": "server-state",
        }
        return {
            **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            **SERVE_ENVIRONMENT,
            **ports,
            **{f"RAY_SERVE_HAPROXY_{key}": str(scratch / name) for key, name in files.items()},
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }

    def call(self, method: str, path: str, *, token: bool = True, **options: Any) -> httpx.Response:
        """A request to the dashboard, as the operator makes it."""
        headers = {"x-ray-authorization": f"Bearer {self.token}"} if token else {}
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.request(method, f"{self.dashboard}{path}", headers=headers, **options)

    def serve_deploy(self, config: Path) -> None:
        """`serve deploy`, until what it deploys is served."""
        command = [_program("serve"), "deploy", str(config), "--address", self.dashboard]
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        done = subprocess.run(
            command, env=os.environ | token, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        self.wait_until_served(APP_NAME)

    def wait_until_served(self, application: str, timeout_s: float = 120) -> None:
        """Until Serve says RUNNING. Raises AssertionError with Serve's own words."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.call("GET", "/api/serve/applications/").json()
            found = status["applications"].get(application, {})
            if found.get("status") == "RUNNING":
                return
            failed = found.get("status") in ("DEPLOY_FAILED", "UNHEALTHY")
            assert not failed and time.monotonic() < deadline, found
            time.sleep(0.5)


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@contextlib.contextmanager
def ray_head() -> Iterator[RayHead]:
    """Starts it, and ends every process it has started."""
    head = RayHead()
    # Unix sockets below it may have short paths only.
    scratch = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
    ports = {
        "port": free_port(),
        "dashboard-port": head.dashboard_port,
        "dashboard-agent-listen-port": head.agent_port,
        "dashboard-agent-grpc-port": free_port(),
        "metrics-export-port": free_port(),
        "ray-client-server-port": free_port(),
    }
    command = [
        _program("ray"),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={scratch}",
        "--num-cpus=8",
        f"--object-store-memory={80 << 20}",
        "--disable-usage-stats",
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    with (scratch / "output").open("w") as output:
        process = subprocess.Popen(
            command, env=head.environment(scratch), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if head.call("GET", "/api/version").status_code == 200:
                    break
            text = (scratch / "output").read_text()
            assert process.poll() is None and time.monotonic() < deadline, text[-2000:]
            time.sleep(0.3)
        yield head
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        for pid in processes_of(str(scratch)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
