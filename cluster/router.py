"""Serve's request router for the replica deployment.

Calls that carry `target=` go to that replica and no other; `submit` goes where the registry's
router (`routing.py`) says. An exception here would hang the request for ever, so every path ends in
some order.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from tokenflow.cluster.wire import Submission

logger = logging.getLogger("ray.serve")


class BurstRouter(RequestRouter):
    """Strict order: one replica per rank, since Serve reorders within a rank by queue length."""

    def initialize_state(self, *, router: str = "burst", **_: Any) -> None:
        # Imported here: the class is pickled by value, the registry must be the process's own.
        from tokenflow.cluster.replica_registry import REGISTRY

        REGISTRY.use(router)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        from tokenflow.cluster.replica_registry import REGISTRY

        super().update_replicas(replicas)
        try:
            REGISTRY.update({r.replica_id.unique_id: r.node_id or "" for r in replicas})
            for replica in replicas:
                REGISTRY.report_from_serve(replica.replica_id.unique_id, replica.routing_stats)
        except Exception:
            logger.exception("the replicas' statistics are not understood")

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
        from tokenflow.cluster.placing import place

        kwargs: dict[str, Any] = pending.kwargs if pending is not None else {}
        by_id = {replica.replica_id.unique_id: replica for replica in candidates}
        target = kwargs.get("target")
        if target is not None and target not in by_id:
            # A replica that is gone: any other one answers "not me" at once, nothing waits.
            return [[replica] for replica in candidates]
        submission = _submission(pending)
        if submission is not None:
            order = place(submission, by_id if target is None else [target])
        else:
            order = list(by_id) if target is None else [target]
        return [[by_id[replica_id]] for replica_id in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Serve may have had to take another than the first."""
        from tokenflow.cluster.replica_registry import REGISTRY

        submission = _submission(pending_request)
        if submission is not None:
            REGISTRY.move(submission.request_id, replica_id.unique_id)


def _submission(pending: PendingRequest | None) -> Submission | None:
    """The request that a call brings, if it is one."""
    if pending is None or not pending.args:
        return None
    first = pending.args[0]
    # By name: in the pickled copy of this module the class may be another object.
    return first if type(first).__name__ == Submission.__name__ else None
