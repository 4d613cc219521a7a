"""Servers for the demo: one local cluster, the application replaced from policy to policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from tokenflow.cluster.config import load_config
from tokenflow.cluster.local import LocalCluster, free_port, preflight

if TYPE_CHECKING:
    from tokenflow.cluster.demo import DemoOptions


class DemoServer:
    """What the demo sees of a server."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model


@contextmanager
def demo_servers(
    options: DemoOptions,
) -> Iterator[Callable[[str], AbstractContextManager[DemoServer]]]:
    """A factory of servers by policy name, on one cluster that lives as long as this context."""
    overrides = {
        "ingress.port": free_port(),
        "ingress.grpc_port": free_port(),
        "engine.kv_tokens": options.kv_tokens,
        "kvstore.host_kv_gib": 0.5,
    }
    config = load_config(None, overrides)
    preflight(config)
    cluster = LocalCluster(config)

    @contextmanager
    def server(policy: str) -> Iterator[DemoServer]:
        cluster.serve(load_config(None, {**overrides, "engine.policy": policy}))
        yield DemoServer(cluster.url, config.model.name)

    try:
        cluster.start()
        yield server
    finally:
        cluster.stop()
