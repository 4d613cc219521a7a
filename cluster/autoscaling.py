"""How many replicas there should be: by the rates that are promised and by predicted waiting.

Serve calls the policy in its control loop and keeps to its bounds and delays; what a replica says
of itself comes from its load report. Requests per replica, which Serve scales on by itself, tell
little here: a stream that reads slowly or waits in host memory costs next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from tokenflow.cluster.routing import Ask, ReplicaView, outlook
from tokenflow.replicas.load import LoadReport

UTILISATION, TTFT = "tokenflow_utilisation", "tokenflow_predicted_ttft_s"
_NOTHING = Ask(prompt_tokens=0, output_tokens=0, rate=0.0)


def measures(report: LoadReport) -> dict[str, float]:
    """What a replica reports for scaling: the share of what it may promise that is promised, above
    1 when readers wait for others to end; and the seconds a new request waits for its rate. Both
    0 while it has measured nothing."""
    seen = outlook(ReplicaView(report=report), _NOTHING)
    if not seen.measured:
        return {UTILISATION: 0.0, TTFT: 0.0}
    return {UTILISATION: seen.utilisation, TTFT: seen.promised_s}


def wanted(
    utilisations: Seq[float],
    ttfts_s: Seq[float],
    current: int,
    *,
    target_utilisation: float,
    max_ttft_s: float,
) -> int:
    """Replicas that bring the utilisation to the target; one more than now, at least, while even
    the best one keeps requests waiting longer than `max_ttft_s`. Replicas that say nothing are
    taken to be like the others; `current` when none says anything."""
    if not utilisations:
        return current
    load = sum(utilisations) * current / len(utilisations)
    count = max(1, math.ceil(load / target_utilisation - 1e-9))
    if ttfts_s and min(ttfts_s) > max_ttft_s:
        count = max(count, current + 1)
    return count


class UtilisationPolicy:
    """Serve's hook: called with its AutoscalingContext."""

    def __init__(self, target_utilisation: float, max_ttft_s: float) -> None:
        self._target_utilisation = target_utilisation
        self._max_ttft_s = max_ttft_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        count = wanted(
            list(metrics.get(UTILISATION, {}).values()),
            list(metrics.get(TTFT, {}).values()),
            context.current_num_replicas,
            target_utilisation=self._target_utilisation,
            max_ttft_s=self._max_ttft_s,
        )
        return count, {}
