"""Several Ray nodes on this machine, for tests and measurements of what happens between nodes.

To Ray, and so to everything above it, they are as many machines, each with a KV store of its own;
only memory, processors and the network are shared. Not for serving: it gains nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class LocalNodes:
    """A head without CPUs, which holds Ray's own services, and `count` nodes of one CPU each."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        # Ray notes the address there, and fails when the folder is missing.
        Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray").mkdir(parents=True, exist_ok=True)
        options = {"include_dashboard": False, "object_store_memory": 80 << 20}
        self._cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0})
        self._nodes: dict[str, Any] = {}
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        """For `ray.init`."""
        address: str = self._cluster.address
        return address

    @property
    def node_ids(self) -> list[str]:
        """Of the nodes that live, without the head."""
        return list(self._nodes)

    def add(self) -> str:
        """Start one more; its id."""
        node = self._cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        self._nodes[node.node_id] = node
        node_id: str = node.node_id
        return node_id

    def workers(self, node_id: str) -> set[int]:
        """The processes that Ray runs actors and tasks in there. Raises KeyError."""
        raylets = {info.process.pid for info in self._nodes[node_id].all_processes["raylet"]}
        return {
            int(folder.name)
            for folder in Path("/proc").iterdir()
            if folder.name.isdigit() and _parent(folder) in raylets
        }

    def kill(self, node_id: str) -> None:
        """End a node's processes without a warning, as a power cut would. Raises KeyError for one
        that is not there."""
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)

    def stop(self) -> None:
        """End all of them; after `ray.shutdown`."""
        self._nodes.clear()
        self._cluster.shutdown()


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None  # it has just ended
