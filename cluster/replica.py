"""The replica deployment: an engine loop behind Serve. Everything about serving a model is in
`replicas/`; here are only the doors: submit, cancel, one frame stream per ingress, statistics."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve

from tokenflow.cluster.autoscaling import measures
from tokenflow.cluster.config import ClusterConfig, parse_config
from tokenflow.cluster.wire import Frame, LoadNews, Submission, pack
from tokenflow.kvstore.actor import RayStoreControl, store_for_this_node
from tokenflow.kvstore.client import HostSlots, NullHostSlots
from tokenflow.kvstore.node import StoreConfig
from tokenflow.kvstore.segment import SHM_DIRECTORY, Segment
from tokenflow.kvstore.sizing import (
    available_memory_bytes,
    default_host_bytes,
    default_owner_fraction,
    free_bytes,
)
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.factory import (
    build_engine,
    free_memory_bytes,
    inspect_model,
    plan_blocks,
    resolve_device,
)
from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.loop import EngineLoop
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import Request

logger = logging.getLogger("ray.serve")

_BEAT_S = 2.0
"""An idle replica says that often that it still is."""


class WrongReplicaError(Exception):
    """A call meant for another replica arrived here: that one is gone."""


class _Subscriber:
    """Events for one ingress that it has not fetched yet."""

    __slots__ = ("events", "ready", "requests", "told", "unreported")

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.ready = asyncio.Event()
        self.requests: set[str] = set()
        self.unreported: dict[str, int] = {}
        """Its requests that no load it was sent knew of: the how-manieth each was of all."""
        self.told = 0
        """The number of the load report it was sent last."""

    def news(self, report: LoadReport) -> LoadNews | None:
        """The load, when it has not been sent yet."""
        if report.number <= self.told:
            return None
        self.told = report.number
        known = tuple(r for r, nth in self.unreported.items() if nth <= report.requests)
        for request_id in known:
            del self.unreported[request_id]
        return LoadNews(report, known)


class Replica:
    """One engine. Methods run on the replica's event loop, the engine on its own thread."""

    def __init__(self, config_tree: dict[str, Any], sharers: int) -> None:
        config = parse_config(config_tree)
        self._config = config
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._node_id = ray.get_runtime_context().get_node_id()
        self._loop = asyncio.get_event_loop()
        self._subscribers: dict[str, _Subscriber] = {}
        self._owner: dict[str, str] = {}
        self._submitted = 0
        device = resolve_device(config.engine.device)
        spec = inspect_model(config.model.directory, config.engine, device)
        num_blocks = plan_blocks(
            spec, config.engine, available_bytes=free_memory_bytes(device), sharers=sharers
        )
        self._host, self._segment, memory = self._attach_store(config, spec, sharers)
        engine = build_engine(
            config.model.directory,
            config.engine,
            self._host,
            host_memory=memory,
            device=device,
            num_blocks=num_blocks,
            sharers=sharers,
        )
        self._max_model_len = engine.max_model_len
        self._vocab_size = spec.vocab_size
        self._engine = EngineLoop(engine, self._emit, self._on_death)
        self._engine.start()

    def _attach_store(
        self, config: ClusterConfig, spec: Any, sharers: int
    ) -> tuple[Any, Segment | None, Any]:
        """This node's store: (host slots, mapped segment, its memory as a tensor)."""
        gib = config.kvstore.host_kv_gib
        if gib == 0:
            return NullHostSlots(), None, None
        slot_bytes = spec.kv_layout(config.engine.block_size).block_bytes
        try:
            total = int((gib or 0) * 2**30) or default_host_bytes(
                available_memory_bytes(), free_bytes(SHM_DIRECTORY)
            )
            store = store_for_this_node(
                StoreConfig(total, slot_bytes, max_owner_fraction=default_owner_fraction(sharers))
            )
            control = RayStoreControl(store, uuid.uuid4().hex, slot_bytes=slot_bytes)
        except KVStoreError as error:
            if gib is not None:
                raise
            # Nobody asked for host memory and there is none: preemption recomputes instead.
            logger.warning("serving without host KV: %s", error)
            return NullHostSlots(), None, None
        segment = Segment.attach(control.info.path, slot_bytes=slot_bytes)
        slots = HostSlots(control, segment.tables(), control.info.owner_quota)
        return slots, segment, segment.tensor()

    # -- from the engine ------------------------------------------------------------------------

    def _emit(self, events: list[TokenEvent]) -> None:
        """Engine thread: one hand-over per step."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[TokenEvent]) -> None:
        for event in events:
            owner = self._owner.get(event.request_id)
            subscriber = self._subscribers.get(owner) if owner else None
            if subscriber is None:
                continue
            subscriber.events.append(event)
            subscriber.ready.set()
            if event.finish_reason is not None:
                self._drop(event.request_id)

    def _on_death(self, error: BaseException) -> None:
        """Engine thread: end every frame stream, so that each ingress resubmits its requests."""
        self._loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        for subscriber in self._subscribers.values():
            subscriber.ready.set()

    def _drop(self, request_id: str) -> None:
        owner = self._owner.pop(request_id, None)
        subscriber = self._subscribers.get(owner) if owner else None
        if subscriber is not None:
            subscriber.requests.discard(request_id)

    # -- doors ----------------------------------------------------------------------------------

    async def submit(self, submission: Submission, *, target: str | None = None) -> str:
        """Take a request; its events go to the frame stream of `submission.ingress_id`.

        Returns this replica's id. Raises InvalidRequestError, CapacityError or EngineDeadError.
        `target` is for the router only.
        """
        self._engine.submit(
            Request(
                request_id=submission.request_id,
                prompt_ids=submission.prompt_ids,
                params=submission.params,
                token_rate=submission.token_rate,
                resumed_ids=submission.resumed_ids,
                cache_salt=submission.cache_salt,
                arrival_s=time.monotonic() - submission.waited_s,
            )
        )
        subscriber = self._subscribers.setdefault(submission.ingress_id, _Subscriber())
        subscriber.requests.add(submission.request_id)
        self._submitted += 1
        subscriber.unreported[submission.request_id] = self._submitted
        self._owner[submission.request_id] = submission.ingress_id
        return self._replica_id

    async def cancel(self, request_ids: list[str], *, target: str) -> None:
        """End requests early; ids that are not here are ignored."""
        for request_id in request_ids:
            self._engine.cancel(request_id)

    async def frames(self, ingress_id: str, *, target: str) -> AsyncIterator[Frame]:
        """The event stream of one ingress; lives as long as the ingress.

        The first frame has no events: the subscription stands. When the ingress goes, its requests
        are cancelled. Raises WrongReplicaError, EngineDeadError.
        """
        if target != self._replica_id:
            raise WrongReplicaError(f"{target} is gone; this is {self._replica_id}")
        subscriber = self._subscribers.setdefault(ingress_id, _Subscriber())
        try:
            yield pack([], subscriber.news(self._engine.load))
            while True:
                await subscriber.ready.wait()
                subscriber.ready.clear()
                events, subscriber.events = subscriber.events, []
                if events:
                    yield pack(events, subscriber.news(self._engine.load))
                self._engine.raise_if_dead()
        finally:
            for request_id in list(subscriber.requests):
                self._engine.cancel(request_id)
                self._drop(request_id)
            if self._subscribers.get(ingress_id) is subscriber:
                del self._subscribers[ingress_id]

    async def info(self) -> dict[str, Any]:
        """What the ingress must know before it takes requests."""
        return {
            "replica_id": self._replica_id,
            "max_model_len": self._max_model_len,
            "vocab_size": self._vocab_size,
        }

    async def stats(self, *, target: str) -> dict[str, Any]:
        """The engine's counters. Raises WrongReplicaError."""
        if target != self._replica_id:
            raise WrongReplicaError(f"{target} is gone; this is {self._replica_id}")
        store = None
        if self._segment is not None:
            host = self._host.stats()
            store = {
                "slots": self._segment.tables().counts(),
                "calls": host.calls,
                "lost": host.lost,
            }
        return {
            "replica_id": self._replica_id,
            "node_id": self._node_id,
            "pid": os.getpid(),
            "store": store,
            **self._engine.stats.to_dict(),
        }

    # -- Serve's hooks --------------------------------------------------------------------------

    def record_replica_metadata(self) -> dict[str, Any]:
        return {"node_id": self._node_id}

    def record_routing_stats(self) -> dict[str, Any]:
        """For routers without a subscription here. The beat is news even when nothing else is."""
        return {
            "load": self._engine.load.to_wire(),
            "beat": int(time.monotonic() / _BEAT_S),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        return measures(self._engine.load)

    def check_health(self) -> None:
        """Raises EngineDeadError, upon which Serve replaces the replica."""
        self._engine.raise_if_dead()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()
        host = getattr(self, "_host", None)
        if host is not None:
            host.close()
