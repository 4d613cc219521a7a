"""The node store as a Ray actor: one per node, detached, found by name.

A thin wrapper: `NodeStore` does the work, this gives it a process, a name and a clock. The segment
is allocated when the first replica registers, not when the actor starts, so that a failure reaches
that replica as an error it can act on, and an actor restarted for nobody allocates nothing.

The actor never touches a device and never imports torch: a daemon that maps device memory would
keep the memory of a dead engine.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tokenflow.kvstore.control import StoreUnavailableError
from tokenflow.kvstore.node import NodeStore, StoreConfig, StoreInfo
from tokenflow.kvstore.segment import reap_orphans
from tokenflow.replicas.errors import KVStoreError

logger = logging.getLogger(__name__)

NAMESPACE = "tokenflow"
ACTOR_PREFIX = "tokenflow-kv:"


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

    def close(self) -> None:
        """Unlink the segment and stop; the actor is of no use afterwards."""
        self._stopping.set()
        self._keeper.join()
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
        # No timeout: only the background thread waits here, and a call given up on could still
        # be carried out, after the one that follows it. A dead actor ends the wait with an error.
        try:
            return ray.get(getattr(self._handle, method).remote(*args))
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
    actor: Any = ray.remote(KVStoreActor)
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
