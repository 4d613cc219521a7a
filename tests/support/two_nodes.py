"""A cluster of two nodes on this machine, a replica and a store on each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from tests.support.cluster_fixture import Server
from tokenflow.cluster.config import load_config
from tokenflow.cluster.local import LocalCluster, free_port


class TwoNodes(Server):
    """A `Server` of which the nodes are known."""

    def kill_node(self, node_id: str) -> None:
        assert self.cluster.nodes is not None
        self.cluster.nodes.kill(node_id)

    @property
    def node_ids(self) -> list[str]:
        assert self.cluster.nodes is not None
        return self.cluster.nodes.node_ids

    def actors(self, class_name: str) -> list[str]:
        """The nodes on which live actors of a class run."""
        return [
            actor["Address"]["NodeID"]
            for actor in ray._private.state.actors().values()
            if actor["ActorClassName"] == class_name and actor["State"] == "ALIVE"
        ]


@contextmanager
def two_nodes(**overrides: Any) -> Iterator[TwoNodes]:
    """Serve the embedded model with the configuration keys `overrides`, "." written as "__"."""
    config = load_config(
        None,
        {
            "ingress.port": free_port(),
            "ingress.grpc_port": free_port(),
            "engine.cpu_threads": 1,
            "kvstore.host_kv_gib": 0.1,
            "replicas.count": 2,
            "replicas.cpus_each": 1,
            **{key.replace("__", "."): value for key, value in overrides.items()},
        },
    )
    with LocalCluster(config, nodes=2) as cluster:
        cluster.serve()
        yield TwoNodes(cluster, config)
