"""Serve's request router for the replica deployment.

Calls that carry `target=` go to that replica and no other; `submit` goes where `routing.rank`
says. An exception here would hang the request for ever, so every path ends in some order.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

logger = logging.getLogger("ray.serve")


class BurstRouter(RequestRouter):
    """Strict order: one replica per rank, since Serve reorders within a rank by queue length."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        # Imported here: the class is pickled by value, the registry must be the process's own.
        from tokenflow.cluster.replica_registry import REGISTRY

        super().update_replicas(replicas)
        REGISTRY.update({r.replica_id.unique_id: r.node_id or "" for r in replicas})

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        try:
            return self._order(candidate_replicas, pending_request)
        except Exception:
            logger.exception("routing failed; using the default order")
            return [[replica] for replica in candidate_replicas]

    def _order(
        self, candidates: list[RunningReplica], pending: PendingRequest | None
    ) -> list[list[RunningReplica]]:
        from tokenflow.cluster.replica_registry import REGISTRY

        kwargs: dict[str, Any] = pending.kwargs if pending is not None else {}
        by_id = {replica.replica_id.unique_id: replica for replica in candidates}
        target = kwargs.get("target")
        route = kwargs.get("route")
        if target is not None and target not in by_id:
            # A replica that is gone: any other one answers "not me" at once, nothing waits.
            target = None
        elif target is not None and route is None:
            return [[by_id[target]]]
        if route is None:
            return [[replica] for replica in candidates]
        request_id, rate = route
        order = REGISTRY.assign(request_id, rate, by_id if target is None else [target])
        return [[by_id[replica_id]] for replica_id in order]
