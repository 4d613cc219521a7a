"""What this process knows of the replicas: shared by the router (its own thread) and the ingress.

Serve pickles the router class by value, so state lives in this module, imported where it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from tokenflow.cluster.routing import Load, counted_rate, rank


class ReplicaRegistry:
    """Live replicas, and this process's own work on each, exactly. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: tuple[str, ...] = ()
        self._nodes: dict[str, str] = {}
        self._loads: dict[str, Load] = {}
        self._assigned: dict[str, tuple[str, float]] = {}
        self._avoided: set[str] = set()

    def update(self, nodes: Mapping[str, str]) -> None:
        """Serve's present set of running replicas, and the node of each."""
        with self._lock:
            self._replicas = tuple(sorted(nodes))
            self._nodes.update(nodes)

    @property
    def replicas(self) -> tuple[str, ...]:
        return self._replicas

    def avoid(self, replica_id: str) -> None:
        """Give it no request while there is another, until `trust`."""
        with self._lock:
            self._avoided.add(replica_id)

    def trust(self, replica_id: str) -> None:
        with self._lock:
            self._avoided.discard(replica_id)

    def avoids(self, replica_id: str) -> bool:
        return replica_id in self._avoided

    def where(self, request_id: str) -> str | None:
        """The replica a request is counted on."""
        assigned = self._assigned.get(request_id)
        return assigned[0] if assigned else None

    def node_of(self, replica: str) -> str:
        """The node that a replica runs, or ran, on; empty if unknown."""
        return self._nodes.get(replica, "")

    def assign(self, request_id: str, rate: float, candidates: Iterable[str]) -> list[str]:
        """Rank the candidates for a request and count it on the best one from now on. `rate` in
        tokens/s; infinite = no reader.

        Counting at the moment of choice keeps a burst from landing on one replica.
        """
        with self._lock:
            self._remove(request_id)
            order = rank(candidates, self._loads, rate)
            order.sort(key=self._avoided.__contains__)
            if order:
                counted = counted_rate(rate)
                self._assigned[request_id] = (order[0], counted)
                load = self._loads.setdefault(order[0], Load())
                load.streams += 1
                load.rate += counted
            return order

    def finish(self, request_id: str) -> None:
        """A request ended or left its replica."""
        with self._lock:
            self._remove(request_id)

    def _remove(self, request_id: str) -> None:
        assigned = self._assigned.pop(request_id, None)
        if assigned is None:
            return
        replica_id, rate = assigned
        load = self._loads[replica_id]
        load.streams -= 1
        load.rate -= rate
        if load.streams == 0:
            del self._loads[replica_id]


REGISTRY = ReplicaRegistry()
