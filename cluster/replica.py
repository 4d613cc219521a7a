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
from tokenflow.cluster.kv_fetch import FetchStats, KVFetcher
from tokenflow.cluster.logs import REQUEST_ID, adopt_engine_logs
from tokenflow.cluster.outbox import Outboxes
from tokenflow.cluster.tenancy import tenant_of
from tokenflow.cluster.wire import Frame, Holding, Submission
from tokenflow.kvstore.actor import RayStoreControl, RayStoreFetch, store_for_this_node
from tokenflow.kvstore.client import HostSlots, NullHostSlots
from tokenflow.kvstore.node import StoreConfig
from tokenflow.kvstore.segment import Segment
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
    processes_of,
    resolve_device,
)
from tokenflow.replicas.loop import EngineLoop
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange, Request

logger = logging.getLogger("ray.serve")

_HEARTBEATS = 3
"""Per silence at which an ingress gives a replica up."""
_STUCK_S = 30.0
"""A step that lasts longer is taken for one that never ends."""
_BEAT_S = 2.0
"""An idle replica says that often that it still is."""


class WrongReplicaError(Exception):
    """A call meant for another replica arrived here: that one is gone."""


class Replica:
    """One engine. Methods run on the replica's event loop, the engine on its own thread."""

    def __init__(self, config_tree: dict[str, Any], sharers: int) -> None:
        config = parse_config(config_tree)
        adopt_engine_logs()
        self._config = config
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._node_id = ray.get_runtime_context().get_node_id()
        self._loop = asyncio.get_event_loop()
        device = resolve_device(config.engine.device)
        spec = inspect_model(config.model.directory, config.engine, device)
        num_blocks = plan_blocks(
            spec,
            config.engine,
            available_bytes=free_memory_bytes(device, config.engine.tensor_parallel),
            sharers=sharers,
        )
        self._store: Any = None
        self._host, self._segment = self._attach_store(config, spec, sharers)
        engine = build_engine(
            config.model.directory,
            config.engine,
            self._host,
            host_memory=self._segment,
            device=device,
            num_blocks=num_blocks,
            sharers=sharers,
        )
        self._host.add_members(processes_of(engine.executor))
        self._max_model_len = engine.max_model_len
        self._vocab_size = spec.vocab_size
        self._engine = EngineLoop(engine, self._emit, self._on_death)
        self._outboxes = Outboxes(
            self._engine,
            grace_s=config.ingress.reconnect_grace_s,
            heartbeat_s=config.ingress.replica_silence_s / _HEARTBEATS,
            load=lambda: self._engine.load,
            healthy=lambda: self._engine.step_age_s < _STUCK_S,
        )
        self._fetcher: KVFetcher | None = None
        if self._store is not None and config.engine.offload:
            self._fetcher = KVFetcher(
                RayStoreFetch(self._store),
                self._host,
                self._engine.cost,
                block_size=config.engine.block_size,
                others=lambda: self._engine.stats.now_running,
            )
        self._engine.start()

    def _attach_store(
        self, config: ClusterConfig, spec: Any, sharers: int
    ) -> tuple[HostSlots | NullHostSlots, Segment | None]:
        """This node's store: (host slots, mapped segment)."""
        gib = config.kvstore.host_kv_gib
        if gib == 0:
            return NullHostSlots(), None
        slot_bytes = spec.kv_layout(config.engine.block_size).block_bytes
        directory = config.kvstore.directory
        try:
            total = int((gib or 0) * 2**30) or default_host_bytes(
                available_memory_bytes(), free_bytes(directory)
            )
            store = store_for_this_node(
                StoreConfig(
                    total,
                    slot_bytes,
                    max_owner_fraction=default_owner_fraction(sharers),
                    directory=directory,
                )
            )
            control = RayStoreControl(store, uuid.uuid4().hex, slot_bytes=slot_bytes)
        except KVStoreError as error:
            if gib is not None:
                raise
            # Nobody asked for host memory and there is none: preemption recomputes instead.
            logger.warning("serving without host KV: %s", error)
            return NullHostSlots(), None
        self._store = store
        segment = Segment.attach(control.info.path, slot_bytes=slot_bytes)
        return HostSlots(control, segment.tables(), control.info.owner_quota), segment

    # -- from the engine ------------------------------------------------------------------------

    def _emit(self, events: list[TokenEvent]) -> None:
        """Engine thread: one hand-over per step."""
        self._loop.call_soon_threadsafe(self._outboxes.dispatch, events)

    def _on_death(self, error: BaseException) -> None:
        """Engine thread: end every frame stream, so that each ingress resubmits its requests."""
        self._loop.call_soon_threadsafe(self._outboxes.wake)

    # -- doors ----------------------------------------------------------------------------------

    async def submit(self, submission: Submission, *, target: str | None = None) -> str:
        """Take a request; its events go to the frame stream of `submission.ingress_id`.

        Returns this replica's id. Raises InvalidRequestError, CapacityError, EngineDeadError, or
        WrongReplicaError when it was for `target`.
        """
        if target is not None:
            self._check_target(target)
        REQUEST_ID.set(submission.client_id)
        request = Request(
            request_id=submission.request_id,
            prompt_ids=submission.prompt_ids,
            params=submission.params,
            token_rate=submission.token_rate,
            resumed_ids=submission.resumed_ids,
            consumed=submission.consumed,
            paused=submission.paused,
            cache_salt=submission.cache_salt,
            tenant=tenant_of(submission.client_id),
            arrival_s=time.monotonic() - submission.waited_s,
            traced=submission.traced,
        )
        with self._outboxes.expecting(request.request_id):
            await self._fetch_kv(request, submission.kv_source)
        self._engine.submit(request)
        self._outboxes.take(submission)
        return self._replica_id

    async def _fetch_kv(self, request: Request, source: str | None) -> None:
        """Bring the KV that a request has on another node to this one, if that is worth it."""
        if self._fetcher is None or source is None or source == self._node_id:
            return
        # The last token is run in any case, so a block that it ends is not loaded.
        known = len(request.prompt_ids) + len(request.resumed_ids)
        blocks = (known - 1) // self._config.engine.block_size
        await self._fetcher.bring(self._engine.keys(request)[:blocks], source)

    async def cancel(self, request_ids: list[str], *, target: str) -> None:
        """End requests early; ids that are not here are ignored."""
        self._outboxes.cancel(request_ids)

    async def change(self, request_id: str, change: ReaderChange, *, target: str) -> None:
        """The owner's word about a request's reader; an id that is not here is ignored."""
        self._outboxes.change(request_id, change)

    async def control(self, client_id: str, change: ReaderChange | None, *, target: str) -> bool:
        """`Outboxes.control`. Raises WrongReplicaError, InvalidRequestError."""
        self._check_target(target)
        return self._outboxes.control(client_id, change)

    async def adopt(self, client_id: str, ingress_id: str, *, target: str) -> list[Holding]:
        """`Outboxes.adopt`. Raises WrongReplicaError."""
        self._check_target(target)
        return self._outboxes.adopt(client_id, ingress_id)

    async def frames(self, ingress_id: str, *, target: str) -> AsyncIterator[Frame]:
        """The event stream of one ingress; lives as long as the ingress, see `Outboxes.frames`.

        Raises WrongReplicaError, EngineDeadError.
        """
        self._check_target(target)
        frames = self._outboxes.frames(ingress_id, self._engine.raise_if_dead)
        try:
            async for frame in frames:
                yield frame
        finally:
            await frames.aclose()

    def _check_target(self, target: str) -> None:
        if target != self._replica_id:
            raise WrongReplicaError(f"{target} is gone; this is {self._replica_id}")

    async def info(self) -> dict[str, Any]:
        """What the ingress must know before it takes requests."""
        return {
            "replica_id": self._replica_id,
            "max_model_len": self._max_model_len,
            "vocab_size": self._vocab_size,
        }

    async def stats(self, *, target: str) -> dict[str, Any]:
        """The engine's counters. Raises WrongReplicaError."""
        self._check_target(target)
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
            "overload": self._engine.overload,
            "fetch": (self._fetcher.stats if self._fetcher else FetchStats()).to_dict(),
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
