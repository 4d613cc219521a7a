"""A node's store in a real segment, and replicas of one checkpoint on it, in this process."""

from __future__ import annotations

from tests.support.tiny_models import make_tokenizer
from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.kvstore.segment import Segment
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.executor.checkpoint import inspect_checkpoint
from tokenflow.replicas.factory import build_executor, processes_of
from tokenflow.replicas.prefix import checkpoint_fingerprint

BLOCK = 8


class Node:
    """`ranks` of a replica but the first are processes of their own."""

    def __init__(self, checkpoint, directory, slots):
        self.checkpoint = checkpoint
        self.spec = inspect_checkpoint(checkpoint)
        size = self.spec.kv_layout(BLOCK).block_bytes
        self.config = StoreConfig(
            slots * size, size, max_owner_fraction=0.75, grace_s=0.0, directory=str(directory)
        )
        self.store = NodeStore.open("identity", self.config)
        self.controls: list[LocalStoreControl] = []
        self.engines: list[Engine] = []
        self.segments: list[Segment] = []

    def replica(self, name, *, blocks, policy, ranks=1, **options):
        control = LocalStoreControl(self.store, name)
        segment = Segment.attach(control.info.path)
        host = HostSlots(control, segment.tables(), control.info.owner_quota, background=False)
        config = EngineConfig(
            block_size=BLOCK,
            max_num_seqs=16,
            max_batch_tokens=64,
            cpu_threads=1,
            tensor_parallel=ranks,
            **options,
        )
        executor = build_executor(self.spec, config, host_memory=segment, num_blocks=blocks)
        host.add_members(processes_of(executor))
        engine = self._engine(executor, policy, host, config)
        self.controls.append(control)
        self.segments.append(segment)
        self.engines.append(engine)
        return engine

    def another_engine(self, replica, *, policy, **options):
        """On the executor and the slots of a replica without work."""
        engine = self.engines[replica]
        config = engine.config.model_copy(update=options)
        return self._engine(engine.executor, policy, engine.kv.host, config)

    def _engine(self, executor, policy, host, config):
        return Engine(
            executor,
            policy,
            host,
            config,
            tokenizer=make_tokenizer(),
            eos_ids=(),
            max_model_len=self.spec.max_model_len,
            model=checkpoint_fingerprint(self.checkpoint),
        )

    def restart_store(self):
        """As after a crash of its process: the next one finds the tables as they are."""
        old = self.store
        self.store = NodeStore(old.tables, self.config, epoch=old.epoch, segment=self.segments[0])
        for control in self.controls:
            control._store = self.store

    def run(self, restart_every=0):
        out: dict[str, list[int]] = {}
        steps = 0
        while any(engine.has_work for engine in self.engines):
            for engine in self.engines:
                if engine.has_work and not engine.step():
                    engine.wait_for_transfers(0.01)
                for event in engine.take_events():
                    if event.token_id >= 0:
                        out.setdefault(event.request_id, []).append(event.token_id)
            steps += 1
            if restart_every and steps % restart_every == 0:
                self.restart_store()
        return out

    def close(self):
        for engine in self.engines:
            engine.executor.close()
            assert engine.kv.host.stats().held == 0
            assert engine.kv.pool.free_blocks == engine.kv.pool.num_blocks
            engine.kv.host.close()
        info = self.store.info()
        assert info.pinned == info.leased == 0
        self.store.drop_cache()
        assert self.store.info().free == info.num_slots
        self.store.close()
