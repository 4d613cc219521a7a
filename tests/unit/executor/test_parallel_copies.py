"""KV that is divided over ranks goes to the host and comes back, or its copy has failed as a whole.

A two-rank replica on a store in real shared memory: its other rank is a process that maps the same
segment.
"""

from __future__ import annotations

import math
import os
import signal
import time

import numpy as np
import pytest
import torch
import xxhash

from tests.support.chaos import Chaos
from tests.support.engines import answers, make_request
from tests.support.one_node import Node
from tests.support.tiny_models import make_checkpoint, reference
from tests.unit.executor.test_parallel import prompts
from tokenflow.kvstore.tables import SlotState
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.executor.base import CopyDone, KVLayout, ScheduledSequence
from tokenflow.replicas.executor.block_copies import Reports
from tokenflow.replicas.executor.checkpoint import inspect_checkpoint
from tokenflow.replicas.executor.parallel.copies import DividedCopies
from tokenflow.replicas.executor.parallel.messages import Load, Offload, Step
from tokenflow.replicas.factory import build_executor, private_host_memory
from tokenflow.replicas.sampling.params import SamplingParams

TOKENS = 24
BLOCKS = 36


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """`engines[0]` has two ranks."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")
    node = Node(checkpoint, tmp_path_factory.mktemp("shm"), slots=160)
    node.replica("divided", blocks=BLOCKS, policy=Chaos("a"), ranks=2, verify_loads="full")
    yield node
    node.close()


@pytest.fixture(scope="module")
def expected(node):
    return {f"{i}": reference(node.checkpoint, p, TOKENS) for i, p in enumerate(prompts())}


def ask_all(engine):
    """Everything that is cached is on the host, if anywhere."""
    engine.kv.pool.clear()
    return answers(
        engine, [make_request(f"{i}", p, TOKENS, rate=2.0) for i, p in enumerate(prompts())]
    )


def committed(node):
    tables = node.store.tables
    return [s for s in range(tables.num_slots) if tables.state[s] == SlotState.COMMITTED]


def collect(executor, reports=1):
    done = []
    while len(done) < reports:
        more = executor.poll_transfers(5.0)
        assert more, f"{len(done)} of {reports} reports"
        done += more
    return done


def test_streams_leave_and_come_back_through_the_host(node, expected):
    engine = node.engines[0]
    assert ask_all(engine) == expected
    stats = engine.stats
    for name in ("preempted_offload", "resumes", "loaded_bytes", "written_through_bytes"):
        assert getattr(stats, name) > 0, name
    hits = stats.prefix_host_hit_tokens
    assert ask_all(engine) == expected
    assert stats.prefix_host_hit_tokens > hits
    assert stats.corrupt_blocks == stats.transfer_errors == 0


def test_a_slot_is_summed_like_any_other_but_never_taken_for_that_of_a_whole_model(node, expected):
    assert ask_all(node.engines[0]) == expected
    memory, tables = node.segments[0].tensor(), node.store.tables
    slots = committed(node)
    assert slots
    for slot in slots:
        assert tables.checksum[slot] == xxhash.xxh3_64_intdigest(memory[slot].numpy())
        halves = memory[slot].view(2, -1)
        assert halves[0].any() and halves[1].any()
    whole = node.replica("whole", blocks=200, policy=Chaos("b", 0.0), verify_loads="full")
    assert ask_all(whole) == expected
    assert whole.stats.prefix_host_hit_tokens == whole.stats.corrupt_blocks == 0


def test_what_is_no_number_in_the_part_of_another_rank_never_changes_a_text(node, expected):
    engine = node.engines[0]
    assert ask_all(engine) == expected
    memory = node.segments[0].tensor()
    for slot in committed(node):
        memory[slot].view(torch.float32)[-1] = math.nan
    assert ask_all(engine) == expected
    assert engine.stats.corrupt_blocks > 0
    node.store.drop_cache()  # what nobody happened to load


def test_a_step_reads_no_block_into_which_another_is_loaded():
    spec = inspect_checkpoint("random:tiny", dtype="float32")
    config = EngineConfig(cpu_threads=1, max_num_seqs=4)
    executor = build_executor(spec, config, num_blocks=6)
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1)

    def share(slot, blocks, start, tokens):
        table = np.array(blocks, np.int32)
        return ScheduledSequence(slot, tokens, start, table, True, params, (1,), ())

    executor.execute([share(0, [1, 2, 3], 0, [5] * 40), share(1, [4], 0, [6] * 3)])
    step = [share(0, [1, 2, 3], 40, [7]), share(1, [4], 3, [8])]
    expected = executor.execute(step)
    for block in (0, 5):
        executor._pool.data[block] = math.nan
    assert executor.execute(step) == expected
    executor.close()


def test_steps_ahead_keep_the_order_of_steps_and_copies(node, expected):
    engine = node.another_engine(0, policy=Chaos("c"), async_scheduling=True)
    node.store.drop_cache()
    assert ask_all(engine) == expected
    assert engine.stats.preempted_offload > 0 and engine.stats.loaded_bytes > 0
    assert engine.stats.corrupt_blocks == engine.stats.transfer_errors == 0


def test_a_copy_that_fails_on_one_rank_has_failed(node, expected, monkeypatch):
    engine = node.another_engine(0, policy=Chaos("d"))
    executor = engine.executor
    tell, told = executor._tell, [0]

    def tell_wrong(command):
        if not isinstance(command, Step):
            told[0] += 1
            if told[0] % 3 == 0:
                command = type(command)([(-1, -1), *command.pairs[1:]])
        tell(command)

    monkeypatch.setattr(executor, "_tell", tell_wrong)
    assert ask_all(engine) == expected
    assert engine.stats.transfer_errors > 0
    for command, start in ((Offload, executor.offload), (Load, executor.load)):
        monkeypatch.setattr(executor, "_tell", lambda c, command=command: tell(command([(-1, 0)])))
        job = start([(0, 0)])
        (done,) = collect(executor)
        assert (done.job_id, done.checksums) == (job, ())
        assert isinstance(done.error, KVStoreError)
        assert str(done.error).startswith("on rank 1: IndexError")


def test_a_copy_has_ended_when_the_last_rank_has_done_its_part(node):
    executor = node.engines[0].executor
    (pid,) = executor.processes
    os.kill(pid, signal.SIGSTOP)
    try:
        job = executor.offload([(0, 0), (1, 1)])
        begun = time.monotonic()
        assert executor.poll_transfers() == []
        assert executor.poll_transfers(0.2) == []
        assert time.monotonic() - begun >= 0.2
    finally:
        os.kill(pid, signal.SIGCONT)
    done, summed = collect(executor, 2)
    assert (done.job_id, done.error, done.checksums) == (job, None, None)
    memory = node.segments[0].tensor()
    sums = tuple(xxhash.xxh3_64_intdigest(memory[slot].numpy()) for slot in (0, 1))
    assert (summed.job_id, summed.checksums) == (job, sums)


def test_parts_become_one_report():
    reports = Reports()
    copies = DividedCopies(3, None, reports)
    assert copies.oldest_s == 0
    copies.begin(7, [(0, 4), (1, 5), (2, 6), (3, 9)], to_host=False)
    copies.begin(8, [(4, 0)], to_host=True)
    for done in (
        CopyDone(7, None, 0.2, (), (3,)),
        CopyDone(8, None, 0.1),
        CopyDone(8, KVStoreError("broken"), 0.0),
        CopyDone(7, None, 0.5),
    ):
        reports.put(done)
    assert copies.poll(0.0) == []
    time.sleep(0.01)
    assert copies.oldest_s >= 0.01
    reports.put(CopyDone(8, None, 0.3))
    (failed,) = copies.poll(0.0)
    assert (failed.job_id, str(failed.error)) == (8, "broken")
    reports.put(CopyDone(7, None, 0.1))
    assert copies.poll(0.0) == [CopyDone(7, None, 0.5, (), (3,))]
    assert copies.take_corrupt() == [9]
    assert copies.take_corrupt() == []
    assert copies.oldest_s == 0
    copies.close()


def test_private_memory_is_shared_by_the_ranks_and_leaves_no_file():
    layout = KVLayout(1, 4, 2, 8, "float32")
    segment = private_host_memory(4, layout, ranks=2)
    memory, path = segment.tensor(), segment.path
    assert memory.shape == (4, layout.block_bytes) and os.path.exists(path)
    del segment
    assert not os.path.exists(path)
    memory[3, -1] = 1
