"""What this process knows of the replicas: shared by the router (its own thread), the ingress and
whoever moves streams. Knowing is here, choosing is in `routing.py`.

Serve pickles the router class by value, so state lives in this module, imported where it is used.
Reports come two ways, and the newer one counts: on the frames of a subscription, tens of
milliseconds old, and from Serve's statistics, some tenths of a second old.
"""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from tokenflow.cluster.locality import PrefixMap
from tokenflow.cluster.routing import (
    ROUTERS,
    Ask,
    Outlook,
    ReplicaView,
    Work,
    foresee,
    kept_rates,
)
from tokenflow.replicas.load import LoadReport

_REMEMBERED = 4096
"""Replicas that are gone, and requests that ended before they were placed, that are remembered."""


@dataclass(slots=True)
class _Assigned:
    replica: str
    ask: Ask
    reported: bool = False


class ReplicaRegistry:
    """Live replicas, their reports, and this process's own work on each, exactly. Thread-safe.

    `clock` in seconds, monotonic; `rng` takes ties by lot.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        router: str = "burst",
    ) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._rng = rng or random.Random()
        self._router = ROUTERS[router](self._rng)
        self._replicas: tuple[str, ...] = ()
        self._views: dict[str, ReplicaView] = {}
        self._served: dict[str, Mapping[str, Any]] = {}
        """Serve's latest statistics of each replica."""
        self._nodes: OrderedDict[str, str] = OrderedDict()
        self._assigned: dict[str, _Assigned] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._prefixes = PrefixMap()
        self._reserved = Work()
        self._avoided: set[str] = set()

    def use(self, router: str) -> None:
        """Choose by that router from now on. Raises KeyError for a name not in ROUTERS."""
        with self._lock:
            self._router = ROUTERS[router](self._rng)

    # -- what is known of them ------------------------------------------------------------------

    def update(self, nodes: Mapping[str, str]) -> None:
        """Serve's present set of running replicas, and the node of each."""
        with self._lock:
            self._replicas = tuple(sorted(nodes))
            for name, node in nodes.items():
                self._view(name).node = node
                self._nodes[name] = node
                self._nodes.move_to_end(name)
            while len(self._nodes) > max(_REMEMBERED, len(nodes)):
                self._nodes.popitem(last=False)
            for name in [n for n in self._views if n not in nodes]:
                self._drop_if_idle(name)

    @property
    def replicas(self) -> tuple[str, ...]:
        return self._replicas

    def node_of(self, replica: str) -> str:
        """The node that a replica runs, or ran, on; empty if unknown."""
        return self._nodes.get(replica, "")

    def avoid(self, replica: str) -> None:
        """Give it no request while there is another, until `trust`."""
        with self._lock:
            self._avoided.add(replica)

    def trust(self, replica: str) -> None:
        with self._lock:
            self._avoided.discard(replica)

    def avoids(self, replica: str) -> bool:
        return replica in self._avoided

    def report(self, replica: str, report: LoadReport, request_ids: Iterable[str] = ()) -> None:
        """News from the replica itself; it knows of `request_ids`, which are this process's own."""
        with self._lock:
            view = self._view(replica)
            self._take(view, report)
            for request_id in request_ids:
                assigned = self._assigned.get(request_id)
                if assigned is not None and assigned.replica == replica and not assigned.reported:
                    assigned.reported = True
                    view.unreported.add(assigned.ask, -1)

    def confirm(self, replica: str) -> None:
        """The replica has spoken and has no news: what it reported last still holds."""
        with self._lock:
            view = self._views.get(replica)
            if view is not None:
                view.received_s = self._clock()

    def report_from_serve(self, replica: str, stats: Mapping[str, Any]) -> None:
        """What a replica's `record_routing_stats` gave: it comes again and again, and is news only
        when it changes. Raises TypeError when it holds no report."""
        with self._lock:
            if not stats or self._served.get(replica) == stats:
                return
            self._served[replica] = stats
            self._take(self._view(replica), LoadReport.from_wire(tuple(stats["load"])))

    def _take(self, view: ReplicaView, report: LoadReport) -> None:
        if report.number >= view.report.number:
            view.report = report
            view.received_s = self._clock()

    def snapshot(self) -> dict[str, ReplicaView]:
        """Copies of all views, by replica id: node, latest report with the time it came (on this
        registry's clock), this process's own work there. Live replicas only."""
        with self._lock:
            return {name: copy.deepcopy(self._view(name)) for name in self._replicas}

    # -- placing requests -----------------------------------------------------------------------

    def assign(
        self,
        request_id: str,
        ask: Ask,
        candidates: Iterable[str],
        keys: Seq[bytes] = (),
    ) -> list[str]:
        """Rank the candidates for a request and count it on the best one from now on. `keys` are
        the `prefix_keys` of its text.

        Counting at the moment of choice keeps a burst from landing on one replica.
        """
        with self._lock:
            self._remove(request_id)
            replica, tokens = self._prefixes.find(keys)
            if tokens:
                ask = replace(ask, cached_on=replica, cached_tokens=tokens)
                if not ask.kv_node:
                    ask = replace(ask, kv_node=self.node_of(replica), kv_tokens=tokens)
            names = list(candidates)
            # Before ranking: of a trusted one nothing may be known yet.
            trusted = [name for name in names if name not in self._avoided]
            order = self._router.rank(ask, trusted or names, self._views, self._clock())
            if order and request_id not in self._ended:
                self._count(request_id, ask, order[0])
                self._prefixes.remember(keys, order[0])
            return order

    def where(self, request_id: str) -> str | None:
        """The replica a request is counted on."""
        assigned = self._assigned.get(request_id)
        return assigned.replica if assigned else None

    def move(self, request_id: str, replica: str) -> None:
        """A request went to another replica than the one it is counted on."""
        with self._lock:
            assigned = self._assigned.get(request_id)
            if assigned is None or assigned.replica == replica:
                return
            ask = assigned.ask
            self._remove(request_id)
            self._count(request_id, ask, replica)

    def finish(self, request_id: str) -> None:
        """A request ended or left its replica, or will not be placed any more."""
        with self._lock:
            self._remove(request_id)
            self._ended[request_id] = None
            if len(self._ended) > _REMEMBERED:
                self._ended.popitem(last=False)

    def foresee(self, ask: Ask) -> Outlook | None:
        """What a request may expect where it is best off, after those that have been reserved for;
        None while nothing is known of any replica."""
        with self._lock:
            ahead = self._reserved.share(max(1, len(self._replicas)))
            trusted = [name for name in self._replicas if name not in self._avoided]
            ranked = foresee(ask, trusted, self._views, self._clock(), self._rng, ahead=ahead)
            return ranked[0][0] if ranked else None

    def capacity(self) -> float:
        """Tokens/s that all replicas together may promise; 0 while nothing is measured."""
        with self._lock:
            known = (self._views[name].report for name in self._replicas if name in self._views)
            return sum(map(kept_rates, known))

    @contextlib.contextmanager
    def reserve(self, asks: Iterable[Ask]) -> Iterator[None]:
        """Count requests that have been admitted and have no replica yet: of a thousand that come
        in one moment, the last is judged by the 999 before it. (For the short time between its
        choice and the replica's answer a request counts twice.)"""
        asks = list(asks)
        with self._lock:
            for ask in asks:
                self._reserved.add(ask)
        try:
            yield
        finally:
            with self._lock:
                for ask in asks:
                    self._reserved.add(ask, -1)

    def _view(self, name: str) -> ReplicaView:
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = ReplicaView(name, self._nodes.get(name, ""))
        return view

    def _count(self, request_id: str, ask: Ask, replica: str) -> None:
        self._assigned[request_id] = _Assigned(replica, ask)
        view = self._view(replica)
        view.own.add(ask)
        view.unreported.add(ask)

    def _remove(self, request_id: str) -> None:
        assigned = self._assigned.pop(request_id, None)
        if assigned is None:
            return
        view = self._views[assigned.replica]
        view.own.add(assigned.ask, -1)
        if not assigned.reported:
            view.unreported.add(assigned.ask, -1)
        self._drop_if_idle(assigned.replica)

    def _drop_if_idle(self, name: str) -> None:
        """Forget a replica that is gone, once none of this process's requests is counted on it."""
        if name not in self._replicas and not self._views[name].own.streams:
            del self._views[name]
            self._served.pop(name, None)


REGISTRY = ReplicaRegistry()
