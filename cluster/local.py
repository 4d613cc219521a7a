"""A whole cluster on this machine: what `tokenflow serve`, the demo and the tests start and stop.

Uses the Ray cluster that is running, or starts its own and takes it down again. Checks everything
that can be checked before any replica starts.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenflow.cluster.api_keys import load_keys
from tokenflow.cluster.config import ClusterConfig, TLSConfig
from tokenflow.cluster.local_nodes import LocalNodes
from tokenflow.cluster.tls_front import Route, TLSFront, read_certificate
from tokenflow.replicas.errors import ConfigError, TokenFlowError
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.factory import free_memory_bytes, inspect_model, plan_blocks, resolve_device
from tokenflow.replicas.tokenizer import check_tokenizer

HEADER_TIMEOUT_S = 10
"""Longest time that the head of a request may take; then its connection is closed."""
_ANSWER_TIMEOUT_S = 60.0
_STEADY_S = 2.0
_PORTS = 100
"""Kept for the servers of one cluster's ingresses."""
_PORT_RANGE = (20_000, 30_000)
SERVE_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers run at 15 by default: any other process would come before the model.
    "RAY_worker_niceness": "0",
    # Requests go from HAProxy straight to the ingress, frames over gRPC handles.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A HAProxy that died is started again after three of these, by default after 30 s:
    # that is as long as a resumable request waits for its client.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A gRPC client has one connection for all its streams; beyond this many, and Ray says
    # 100, they would wait for each other's end without a word.
    "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": "10000",
    # Serve sets no limit on how long the head of a request may take and has no variable for it;
    # this one is the last line of its HAProxy's defaults, so another may follow.
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": (
        f"leastconn\n    timeout http-request {HEADER_TIMEOUT_S}s"
    ),
    # Log lines are to be in their file when they are written, not a thousand lines later.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
}
"""What every process of Ray needs, on this machine and wherever else it is started (deploy/)."""


class ServingError(TokenFlowError):
    """The cluster was started and does not serve."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the checks before start found out."""

    spec: ModelSpec
    device: str
    num_blocks: int
    gpus_each: float


def preflight(config: ClusterConfig) -> Preflight:
    """Check model, memory and ports. Raises CheckpointError or ConfigError, one sentence each."""
    device = resolve_device(config.engine.device)
    spec = inspect_model(config.model.directory, config.engine, device)
    check_tokenizer(config.model.directory)
    if (keys := config.security.keys_path) is not None:
        load_keys(keys)
    if config.security.tls is not None:
        read_certificate(config.security.tls)
    gpus_each = _gpus_each(config, device)
    sharers = config.replicas.most if gpus_each == 0 else 1
    blocks = plan_blocks(
        spec,
        config.engine,
        available_bytes=free_memory_bytes(device, config.engine.tensor_parallel),
        sharers=sharers,
    )
    for key, port in (
        ("ingress.port", config.ingress.port),
        ("ingress.grpc_port", config.ingress.grpc_port),
    ):
        _check_port(key, config.ingress.host, port)
    if config.tracing.endpoint is not None:
        from tokenflow.cluster.tracing import otlp_exporter

        otlp_exporter(config.tracing.endpoint)
    if config.ingress.port == config.ingress.grpc_port:
        raise ConfigError("ingress.port and ingress.grpc_port must differ.")
    return Preflight(spec, device, blocks, gpus_each)


def _gpus_each(config: ClusterConfig, device: str) -> float:
    """GPUs that Ray gives a replica; all on one node, as one process asks for them."""
    if config.replicas.gpus_each is not None:
        return config.replicas.gpus_each
    return float(config.engine.tensor_parallel) if device.startswith("cuda") else 0.0


def _check_port(key: str, host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"{key}: cannot listen on {host}:{port}: {error.strerror}.") from None


def _serve_runs() -> bool:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


@contextlib.contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Undo what Ray does to SIGTERM, which would then crash the process without any clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _free_ports() -> int:
    """The first of `_PORTS` ports in a row that nobody listens on right now."""
    blocks = list(range(*_PORT_RANGE, _PORTS))
    random.shuffle(blocks)
    for first in blocks:
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + _PORTS):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise ServingError(f"no {_PORTS} free ports in a row between {_PORT_RANGE}.")


class LocalCluster:
    """Starts a cluster and serves one application at a time on it. A context manager.

    `serve` may be called again with another configuration (same ports): the application is
    replaced.
    """

    def __init__(
        self, config: ClusterConfig, *, env: dict[str, str] | None = None, nodes: int = 0
    ) -> None:
        """With `nodes`, an own Ray of so many nodes (`LocalNodes`), whatever runs on this machine;
        replicas that reserve a CPU each are then placed one to a node."""
        self.config = config
        self.nodes: LocalNodes | None = None
        self._wanted_nodes = nodes
        self._env = env or {}
        self._own_ray = False
        self._connected = False
        """Whether this object has called ray.init."""
        self._serving = False
        self._deployed = False
        self._front: TLSFront | None = None
        self._plain_ports: tuple[int, int] | None = None
        """HTTP and gRPC, behind the TLS front."""
        self._scratch: Path | None = None
        self._set_keys: list[str] = []

    @property
    def url(self) -> str:
        scheme = "http" if self.config.security.tls is None else "https"
        return f"{scheme}://{self._shown_host}:{self.config.ingress.port}"

    @property
    def grpc_target(self) -> str:
        return f"{self._shown_host}:{self.config.ingress.grpc_port}"

    @property
    def _shown_host(self) -> str:
        """An address at which a client on this machine reaches it."""
        host = self.config.ingress.host
        if host in ("0.0.0.0", "::"):
            return "127.0.0.1"
        return f"[{host}]" if ":" in host else host

    def _serve_at(self) -> tuple[str, int, int]:
        """Where Serve itself listens: host, HTTP port, gRPC port."""
        ingress = self.config.ingress
        if self._plain_ports is not None:
            return ("127.0.0.1", *self._plain_ports)
        return ingress.host, ingress.port, ingress.grpc_port

    def prepare(self) -> None:
        """Set the environment that Ray's processes need; before any of them is started. `start`
        does it for a Ray of its own."""
        if self._scratch is None:
            # Unix sockets go in here below a folder of 57 characters that Serve adds; their paths
            # may have 97, whatever TMPDIR is.
            self._scratch = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
            self._set_environment(self._scratch)

    def start(self) -> None:
        """Start Ray (when none runs) and Serve's HTTP and gRPC fronts."""
        self.prepare()
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

        from tokenflow.cluster.app import GRPC_SERVICERS

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if not ray.is_initialized():
            self._connected = True
            with _kept_signal_handlers():
                self._own_ray = self._init_ray()
        if not self._own_ray and _serve_runs():
            raise ServingError(
                "Ray Serve already runs on this Ray cluster, with its own ports and applications. "
                "Deploy tokenflow.cluster.app:app there, or set RAY_ADDRESS=local to start apart "
                "from it."
            )
        if self.config.security.tls is not None:
            self._start_front(self.config.security.tls)
        host, port, grpc_port = self._serve_at()
        serve.start(
            http_options=HTTPOptions(
                host=host,
                port=port,
                request_timeout_s=None,
                # Several nodes on one machine cannot all have the port.
                location=ProxyLocation.HeadOnly if self._own_ray else ProxyLocation.EveryNode,
            ),
            grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=GRPC_SERVICERS),
        )
        # Deploying is announced by whoever uses this, in their own words.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._serving = True

    def _start_front(self, tls: TLSConfig) -> None:
        ingress = self.config.ingress
        assert self._scratch is not None
        self._plain_ports = free_port(), free_port()
        routes = [
            Route("http", ingress.host, ingress.port, self._plain_ports[0]),
            Route("grpc", ingress.host, ingress.grpc_port, self._plain_ports[1], http2_only=True),
        ]
        self._front = TLSFront(tls, routes, self._scratch, HEADER_TIMEOUT_S)
        self._front.start()

    def _init_ray(self) -> bool:
        """Connect to a running Ray, or start one; True when it is ours. RAY_ADDRESS as in Ray:
        an address to use, or "local" to start one in any case."""
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._wanted_nodes:
            self.nodes = LocalNodes(self._wanted_nodes)
            ray.init(address=self.nodes.address, **options)
            return True
        wanted = os.environ.get("RAY_ADDRESS")
        if wanted != "local":
            try:
                ray.init(address="auto", **options)
                return False
            except ConnectionError:
                if wanted:
                    raise ServingError(f"no Ray cluster answers at RAY_ADDRESS={wanted}.") from None
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=max(8, os.cpu_count() or 1),
            object_store_memory=128 << 20,
            _node_ip_address="127.0.0.1" if self._loopback else None,
            **options,
        )
        return True

    @property
    def _loopback(self) -> bool:
        # Behind a front of our own nothing else needs to be reached from elsewhere.
        inside = self.config.security.tls is not None
        return inside or self.config.ingress.host in ("127.0.0.1", "localhost")

    def _set_environment(self, scratch: Path) -> None:
        """Serve reads these in the processes that Ray starts; what the user has set wins."""
        values = {
            **SERVE_ENVIRONMENT,
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            # Two clusters on one machine must not share sockets or ports.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
            # The ingresses' own servers: gRPC would share a port with those of another cluster,
            # and each get a part of the other's requests.
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first := _free_ports()),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _PORTS // 2),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + _PORTS // 2 + 1),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + _PORTS - 1),
        }
        if self._loopback:
            # Keeps Ray on 127.0.0.1 instead of the first network interface.
            values["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        values.update(self._env)
        for key, value in values.items():
            if key not in os.environ:
                os.environ[key] = value
                self._set_keys.append(key)

    def serve(self, config: ClusterConfig | None = None) -> None:
        """Deploy the application and return when it answers."""
        from ray import serve

        from tokenflow.cluster.app import APP_NAME
        from tokenflow.kvstore.actor import shutdown_stores

        if self._deployed:
            # The next application may have another model: its store starts afresh.
            serve.delete(APP_NAME)
            shutdown_stores()
        self.config = config or self.config
        self._deploy()

    def update(self, config: ClusterConfig) -> None:
        """Go over to another configuration of the same model, on the same ports, without dropping a
        stream: replicas are replaced, or their number changes, one after the other under load.
        Returns when all is as configured."""
        self.config = config
        self._deploy()

    def _deploy(self) -> None:
        from ray import serve

        from tokenflow.cluster.app import APP_NAME, build_app

        gpus = _gpus_each(self.config, resolve_device(self.config.engine.device))
        self._deployed = True
        try:
            serve.run(build_app(self.config, gpus_each=gpus), name=APP_NAME, route_prefix="/")
        except RuntimeError as error:
            raise ServingError(f"{error} See {self._log_directory()}.") from error
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        """Serve says "ready" before its HAProxy has settled: it is restarted with each change of
        its configuration, and for a moment of that may refuse. So it has to answer for a while."""
        import grpc
        import httpx

        host, port, grpc_port = self._serve_at()
        if self._plain_ports is None:
            host = self._shown_host
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        steady_since: float | None = None
        while steady_since is None or time.monotonic() - steady_since < _STEADY_S:
            if time.monotonic() > deadline:
                raise ServingError(f"{self.url} does not answer; see {self._log_directory()}.")
            try:
                # A new connection each time, as a new client would make it.
                with httpx.Client(trust_env=False, timeout=5) as client:
                    healthy = client.get(f"http://{host}:{port}/health").status_code == 200
            except httpx.TransportError:
                healthy = False
            if not healthy:
                steady_since = None
            elif steady_since is None:
                steady_since = time.monotonic()
            time.sleep(0.05)
        with grpc.insecure_channel(f"{host}:{grpc_port}") as channel:
            try:
                ready = grpc.channel_ready_future(channel)
                ready.result(timeout=max(1.0, deadline - time.monotonic()))
            except grpc.FutureTimeoutError:
                raise ServingError(f"{self.grpc_target} does not answer gRPC.") from None

    @staticmethod
    def _log_directory() -> str:
        import ray

        return f"{ray._private.worker.global_worker.node.get_session_dir_path()}/logs/serve"

    def stop(self) -> None:
        """Take everything down that `start` and `serve` brought up."""
        import ray

        if self._front is not None:
            self._front.stop()
            self._front = self._plain_ports = None
        # The controller ends by killing itself, and Ray prints that as a task's failure.
        with contextlib.redirect_stdout(io.StringIO()):
            if self._serving:
                from ray import serve

                from tokenflow.kvstore.actor import shutdown_stores

                serve.shutdown()
                shutdown_stores()
            if self._connected:
                ray.shutdown()
            if self.nodes is not None:
                self.nodes.stop()
                self.nodes = None
        self._serving = self._deployed = self._own_ray = self._connected = False
        while self._set_keys:
            os.environ.pop(self._set_keys.pop(), None)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
