"""The node store as a Ray actor: one per node, detached, found by name.

A thin wrapper: `NodeStore` does the work, this gives it a process, a name and a clock. The segment
is allocated when the first replica registers, not when the actor starts, so that a failure reaches
that replica as an error it can act on, and an actor restarted for nobody allocates nothing.

The actor never touches a device and never imports torch: a daemon that maps device memory would
keep the memory of a dead engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tokenflow.kvstore.block_fetch import Fetched
from tokenflow.kvstore.control import StoreHungError, StoreUnavailableError
from tokenflow.kvstore.exchange import Exchange
from tokenflow.kvstore.node import NodeStore, StoreConfig, StoreInfo
from tokenflow.kvstore.peer import Endpoint
from tokenflow.kvstore.segment import reap_orphans
from tokenflow.replicas.errors import KVStoreError

logger = logging.getLogger(__name__)

NAMESPACE = "tokenflow"
ACTOR_PREFIX = "tokenflow-kv:"
HUNG_AFTER_S = 10.0
"""A store that does not answer a call for so long hangs: the slowest takes milliseconds."""
_REGISTER_TIMEOUT_S = 600.0  # the first one allocates the segment, 0.25 s per GiB
_FETCH_GROUP = "fetch"
_FETCHES_AT_ONCE = 4
_LOOK_UP_TIMEOUT_S = 2.0


class KVStoreActor:
    """Runs on the node whose memory it hands out.

    Ray restarts it after a crash. It then adopts the segment that the replicas still map, and they
    go on with their leases, pins and blocks. If there is nothing to adopt, the next replica that
    registers makes it allocate a new segment; every call carries the epoch of the segment it is
    about, and one of an earlier epoch is refused. An old segment goes when the last replica unmaps
    it.
    """

    def __init__(self, name: str, config: StoreConfig) -> None:
        self._name = name
        self._config = config
        self._store = NodeStore.adopt(name, config)
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="kv-keeper", daemon=True)
        self._keeper.start()
        self._exchange_lock = threading.Lock()
        self._exchange: Exchange | None = None
        self._peers: dict[str, Endpoint] = {}
        """Where the stores of other nodes were when they were last asked."""

    def register(self, owner_id: str, pid: int) -> StoreInfo:
        """See `NodeStore.register`; the first call allocates the segment (0.25 s per GiB)."""
        if self._store is None and not self._stopping.is_set():
            self._store = NodeStore.open(self._name, self._config)
        return self._of_epoch(None).register(owner_id, pid)

    def unregister(self, owner_id: str, epoch: int) -> None:
        self._of_epoch(epoch).unregister(owner_id)

    def lease(self, owner_id: str, epoch: int, n: int) -> list[int]:
        return self._of_epoch(epoch).lease(owner_id, n)

    def release(self, owner_id: str, epoch: int, slots: Sequence[int]) -> None:
        self._of_epoch(epoch).release(owner_id, slots)

    def reattach(self, owner_id: str, epoch: int, held: Sequence[int]) -> int:
        return self._of_epoch(epoch).reattach(owner_id, held)

    def poll(self, epoch: int) -> None:
        self._of_epoch(epoch).poll()

    def info(self) -> StoreInfo | None:
        """None while no replica has registered."""
        return None if self._store is None else self._store.info()

    # -- other nodes ----------------------------------------------------------------------------

    def endpoint(self) -> Endpoint:
        """What another node's store needs to fetch from this one; opens the door at the first
        call. Raises KVStoreError while no replica has registered."""
        return self._door().endpoint

    def fetch(
        self, fetch_id: str, keys: Sequence[bytes], source_node: str, timeout_s: float
    ) -> Fetched:
        """Bring the blocks of a chain of keys here from the store of another node.

        Blocks, for `timeout_s` at most: to be called in the group `_FETCH_GROUP`, which has
        threads of its own, so that leases do not wait. Partial success is success (`Fetched`).
        Raises KVStoreError when a store is missing at either end, or cannot be asked.
        """
        deadline = time.monotonic() + timeout_s
        door = self._door()
        known = self._peers.get(source_node)
        for source in (known, None):
            if source is None:
                source = self._peers[source_node] = _endpoint_of(
                    source_node, min(timeout_s, _LOOK_UP_TIMEOUT_S)
                )
            left = max(0.01, deadline - time.monotonic())
            result = door.fetch(fetch_id, keys, source, left)
            if result.error is None or result.blocks or source is not known:
                break
            # Perhaps that store was restarted, and listens elsewhere now.
        if result.error is not None:
            self._peers.pop(source_node, None)
            logger.warning(
                "KV store: fetched %d blocks of %s, then: %s",
                result.blocks,
                source_node,
                result.error,
            )
        return result

    def cancel_fetch(self, fetch_id: str) -> None:
        """End a fetch; what it brought so far stays."""
        if self._exchange is not None:
            self._exchange.cancel(fetch_id)

    def _door(self) -> Exchange:
        with self._exchange_lock:
            if self._exchange is None:
                host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
                try:
                    self._exchange = Exchange(self._of_epoch(None), host)
                except OSError as error:
                    raise KVStoreError(
                        f"the KV store cannot listen on {host}: {error.strerror}; blocks cannot "
                        "be moved between this node and others"
                    ) from error
            return self._exchange

    def close(self) -> None:
        """Unlink the segment and stop; the actor is of no use afterwards."""
        self._stopping.set()
        self._keeper.join()
        with self._exchange_lock:
            if self._exchange is not None:
                self._exchange.close()
        if self._store is not None:
            self._store.close()

    def _of_epoch(self, epoch: int | None) -> NodeStore:
        store = self._store
        if store is None or (epoch is not None and epoch != store.epoch):
            raise KVStoreError(
                "the KV store was restarted or closed; its earlier leases are void, restart the "
                "replica to use the host tier again"
            )
        return store

    def _keep(self) -> None:
        """Poll the store, and now and then look for what the dead left behind."""
        reaped = time.monotonic()
        while not self._stopping.wait(self._config.poll_interval_s):
            try:
                if self._store is not None:
                    self._store.poll()
                if time.monotonic() - reaped >= self._config.reap_interval_s:
                    reaped = time.monotonic()
                    if self._store is not None:
                        self._store.reap_dead_owners()
                    reap_orphans(self._config.directory)
            except Exception:  # one failed round must not end the rounds after it
                logger.exception("KV store: cannot keep its tables")


def _endpoint_of(node_id: str, timeout_s: float) -> Endpoint:
    """Ask the store of another node where it lends its blocks. Raises KVStoreError."""
    try:
        handle: Any = ray.get_actor(f"{ACTOR_PREFIX}{node_id}", namespace=NAMESPACE)
        endpoint: Endpoint = ray.get(handle.endpoint.remote(), timeout=timeout_s)
        return endpoint
    except ValueError:
        raise KVStoreError(f"node {node_id} has no KV store (any more)") from None
    except ray.exceptions.RayError as error:
        raise KVStoreError(
            f"the KV store of node {node_id} does not answer: {type(error).__name__}"
        ) from error


class RayStoreFetch:
    """A replica's way to have its store fetch blocks; nothing here blocks an event loop."""

    def __init__(self, handle: ActorHandle[Any]) -> None:
        self._handle = handle

    async def fetch(self, keys: Sequence[bytes], source_node: str, timeout_s: float) -> Fetched:
        """See `KVStoreActor.fetch`. Raises KVStoreError, or TimeoutError after `timeout_s`; then,
        and when it is cancelled, what has come stays and the rest is not waited for."""
        fetch_id = uuid.uuid4().hex
        call: Any = self._handle.fetch.options(concurrency_group=_FETCH_GROUP)
        reference = call.remote(fetch_id, list(keys), source_node, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                result: Fetched = await reference
                return result
        except (asyncio.CancelledError, TimeoutError):
            self._handle.cancel_fetch.remote(fetch_id)
            raise
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, KVStoreError):
                raise error.cause from None
            raise KVStoreError(f"the KV store failed in fetch: {error.cause!r}") from error
        except ray.exceptions.RayError as error:
            raise KVStoreError(
                f"the KV store of this node ended in a fetch: {type(error).__name__}"
            ) from error


class RayStoreControl:
    """A replica's way to its node's store (a `StoreControl`); every call blocks for the answer."""

    def __init__(self, handle: ActorHandle[Any], owner_id: str, *, slot_bytes: int) -> None:
        """Register this process as `owner_id`, a name never used before (say, a uuid).

        Raises KVStoreError if the store cannot allocate, is gone, or has slots of another size.
        """
        self._handle = handle
        self._owner_id = owner_id
        self.info: StoreInfo = self._call("register", owner_id, os.getpid())
        self.owner_index = self.info.owners[owner_id].index
        if self.info.slot_bytes != slot_bytes:
            raise KVStoreError(
                f"the KV store of this node has slots of {self.info.slot_bytes} bytes, "
                f"{owner_id} needs {slot_bytes}; serve one model, block size and dtype per node, "
                "or switch the host tier off with kvstore.host_kv_gib: 0 (--host-kv-gib 0)"
            )

    def lease(self, n: int) -> list[int]:
        slots: list[int] = self._call("lease", self._owner_id, self.info.epoch, n)
        return slots

    def release(self, slots: Sequence[int]) -> None:
        self._call("release", self._owner_id, self.info.epoch, slots)

    def reattach(self, held: Sequence[int]) -> None:
        self._call("reattach", self._owner_id, self.info.epoch, held)

    def poll(self) -> None:
        self._call("poll", self.info.epoch)

    def unregister(self) -> None:
        self._call("unregister", self._owner_id, self.info.epoch)

    def _call(self, method: str, *args: object) -> Any:
        # A call given up on may still be carried out, but before the one that follows it: Ray
        # keeps the order of one caller's calls, and `reattach` is the next.
        timeout_s = _REGISTER_TIMEOUT_S if method == "register" else HUNG_AFTER_S
        try:
            return ray.get(getattr(self._handle, method).remote(*args), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise StoreHungError(
                f"the KV store has not answered {method} for {timeout_s:g} s; it is taken to hang"
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, KVStoreError):
                raise error.cause from None
            raise KVStoreError(f"the KV store failed in {method}: {error.cause!r}") from error
        except ray.exceptions.RayActorError as error:
            raise StoreUnavailableError(
                f"the KV store actor ended before it answered {method} "
                f"({type(error).__name__}); if it does not come back, restart the replica to use "
                "the host tier again"
            ) from error
        except ray.exceptions.RayError as error:
            raise KVStoreError(
                f"the KV store cannot be asked for {method}: {type(error).__name__}; restart the "
                "replica to use the host tier again"
            ) from error


def store_for_this_node(config: StoreConfig) -> ActorHandle[Any]:
    """The store actor of the node this process runs on; made if there is none yet.

    Many replicas may call this at once and get the same actor. `config` counts only for the call
    that makes it. The actor is detached: it outlives its callers, until `shutdown_stores`.
    """
    node_id = ray.get_runtime_context().get_node_id()
    # Fetches have threads of their own; everything else keeps the order of its calls.
    options: dict[str, Any] = {"concurrency_groups": {_FETCH_GROUP: _FETCHES_AT_ONCE}}
    actor: Any = ray.remote(**options)(KVStoreActor)
    # Part of the node id is enough to keep the files of two nodes on one machine apart.
    handle: ActorHandle[Any] = actor.options(
        name=f"{ACTOR_PREFIX}{node_id}",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(node_id[:16], config)
    return handle


def shutdown_stores(timeout_s: float = 10.0) -> int:
    """Close and kill every store actor of this cluster; returns how many there were.

    For a clean stop, after the replicas: a replica still running keeps the memory it maps. A store
    that does not answer in `timeout_s` (its node may be gone) is killed all the same; its file is
    then an orphan, which the next store on that node removes.
    """
    names = [
        str(actor["name"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(ACTOR_PREFIX)
    ]
    for name in names:
        try:
            handle = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            continue  # ended meanwhile
        try:
            ray.get(handle.close.remote(), timeout=timeout_s)
        except ray.exceptions.RayError as error:
            logger.warning("KV store %s did not close: %s", name, type(error).__name__)
        ray.kill(handle, no_restart=True)
    return len(names)
