"""One cluster for all tests in this folder: HTTP, gRPC, two replicas of the embedded model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.support.processes import replica_pids
from tokenflow.cluster.config import ClusterConfig, load_config
from tokenflow.cluster.local import LocalCluster, free_port

KV_TOKENS = 4 * 256
"""Device KV of each of the two replicas: together about eight requests of 256 tokens."""


@dataclass
class Server:
    cluster: LocalCluster
    config: ClusterConfig
    traces_port: int = 0
    """Where traces of requests go whose clients want them; nobody listens."""

    @property
    def url(self) -> str:
        return self.cluster.url

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def model(self) -> str:
        return self.config.model.name

    @property
    def grpc(self) -> str:
        return self.cluster.grpc_target

    def metric(self, name: str, **labels: str) -> float:
        """A metric summed over the labels that are not given."""
        return _sum(self._scrape(), name, labels)

    def by_replica(self, name: str) -> dict[str, float]:
        """A metric of each living replica."""
        lines = [line for line in self._scrape().splitlines() if line.startswith(name + "{")]
        return {line.split('replica="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}

    def busiest(self) -> int:
        """The process of the replica that runs most requests."""
        running = self.by_replica("tokenflow_running_requests")
        return replica_pids()[max(running, key=running.__getitem__)]

    def wait_idle(self, timeout_s: float = 10) -> float:
        """Wait until every device block is free; returns the seconds it took."""
        begun = time.monotonic()
        while True:
            text = self._scrape()
            free = _sum(text, "tokenflow_kv_free_blocks", {})
            total = _sum(text, "tokenflow_kv_total_blocks", {})
            if free == total > 0:
                return time.monotonic() - begun
            if time.monotonic() - begun > timeout_s:
                raise AssertionError(f"{total - free:g} blocks still held after {timeout_s} s")
            time.sleep(0.02)

    def _scrape(self) -> str:
        return httpx.get(f"{self.url}/metrics").text


def _sum(text: str, name: str, labels: dict[str, str]) -> float:
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((name + "{", name + " ")) and all(w in line for w in wanted)
    )


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    traces_port = free_port()
    config = load_config(
        None,
        {
            "ingress.port": free_port(),
            "ingress.grpc_port": free_port(),
            "engine.kv_tokens": KV_TOKENS,
            "engine.max_num_seqs": 32,
            "engine.cpu_threads": 1,
            "kvstore.host_kv_gib": 0.25,
            "replicas.count": 2,
            "logging.format": "json",
            "tracing.endpoint": f"http://127.0.0.1:{traces_port}/v1/traces",
            "tracing.sample_ratio": 0,
        },
    )
    with LocalCluster(config) as cluster:
        cluster.serve()
        yield Server(cluster, config, traces_port)
