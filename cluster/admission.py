"""Whether a request is taken now: by when its first token is predicted to come, and its rate.

Beyond a bound it is refused with a time after which it is worth another try, so that no queue grows
without end, and what streams already keeps its rate: a replica promises rates only up to its
capacity, and memory that is spoken for counts like rates (`routing.outlook`). A queue that one
tenant makes is not held against the others. Judging is a pure function; the predictions are the
router's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

from tokenflow.cluster.replica_registry import REGISTRY, ReplicaRegistry
from tokenflow.cluster.routing import Ask, Outlook
from tokenflow.replicas.errors import CapacityError
from tokenflow.replicas.scheduler.fairness import fair_share


def favoured(tenant: str, rate: float, rates: Mapping[str, float], capacity: float) -> bool:
    """Whether a request is to be taken however long the queue is: tenants ask for more than there
    is, and its own, with this request's `rate`, for no more than an equal share. Replicas serve it
    before those who ask for more. `rates`: sums by tenant; all in tokens/s."""
    own = rates.get(tenant, 0.0) + rate
    share = fair_share([*(r for name, r in rates.items() if name != tenant), own], capacity)
    return len(rates.keys() - {tenant}) > 0 and own <= share < math.inf


def judge(
    seen: Outlook | None,
    *,
    max_ttft_s: float | None,
    max_stall_s: float | None = None,
    time_left_s: float | None = None,
) -> None:
    """Raises CapacityError when a request is not predicted to have its first token and its rate
    within `max_ttft_s` seconds, when rates would be asked for that cannot be promised within
    `max_stall_s` (None: no bound), or when its first token would come after the client's own
    deadline in `time_left_s`. Nothing is refused while nothing is measured, or nothing known
    (`seen` is None).

    Backlog drains by a second per second at best: the time to wait is what is above the bound.
    """
    if seen is None or not seen.measured:
        return
    served, paused = "you would be served in", "your text would pause for"
    for wait_s, bound, what, whose in (
        (seen.promised_s, max_ttft_s, served, "the limit is"),
        (seen.short_s, max_stall_s, paused, "the limit is"),
        (seen.ttft_s, time_left_s, served, "your timeout leaves"),
    ):
        if bound is not None and wait_s > bound:
            raise CapacityError(
                f"The cluster is overloaded: {what} {wait_s:.1f} s, "
                f"{whose} {max(bound, 0):.1f} s; try again later.",
                retry_after_s=max(1.0, wait_s - max(bound, 0.0)),
            )


@contextlib.contextmanager
def admitted(
    asks: Seq[Ask],
    *,
    max_ttft_s: float | None,
    max_stall_s: float | None = None,
    time_left_s: float | None = None,
    in_any_case: bool = False,
    registry: ReplicaRegistry = REGISTRY,
) -> Iterator[None]:
    """Judge requests that come together, unless they are taken `in_any_case`, and, while they are
    being placed, count them for those that come after them. Raises CapacityError."""
    with registry.reserve(asks[1:]):
        if not in_any_case:
            judge(
                registry.foresee(asks[0]),
                max_ttft_s=max_ttft_s,
                max_stall_s=max_stall_s,
                time_left_s=time_left_s,
            )
        with registry.reserve(asks[:1]):
            yield
