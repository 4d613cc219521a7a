"""One cluster for the whole test session: HTTP, gRPC, two replicas of a small model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tokenflow.cluster.config import ClusterConfig, load_config
from tokenflow.cluster.local import LocalCluster, free_port

KV_TOKENS = 8 * 256
"""Device KV of a replica: about eight requests of 256 tokens."""


@dataclass
class Server:
    cluster: LocalCluster
    config: ClusterConfig

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
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        text = httpx.get(f"{self.url}/metrics").text
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith((name + "{", name + " ")) and all(w in line for w in wanted)
        )

    def wait_for_metric(self, name: str, value: float, timeout_s: float) -> float:
        """Poll until a metric has a value; returns the seconds it took."""
        begun = time.monotonic()
        while (seen := self.metric(name)) != value:
            if time.monotonic() - begun > timeout_s:
                raise AssertionError(f"{name} is {seen}, not {value}, after {timeout_s} s")
            time.sleep(0.02)
        return time.monotonic() - begun


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    config = load_config(
        None,
        {
            "ingress.port": free_port(),
            "ingress.grpc_port": free_port(),
            "engine.kv_tokens": KV_TOKENS,
            "engine.max_num_seqs": 32,
            "engine.cpu_threads": 1,
            "kvstore.host_kv_gib": 0.25,
            "replicas.count": 1,
        },
    )
    with LocalCluster(config) as cluster:
        cluster.serve()
        yield Server(cluster, config)
