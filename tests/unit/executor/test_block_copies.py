"""Copies of blocks: the right bytes in the right places, and faults reported."""

import random
from typing import NamedTuple

import pytest
import torch
import xxhash

from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.executor import block_copies, host_memory
from tokenflow.replicas.executor.block_copies import CopyThread, Reports, runs
from tokenflow.replicas.executor.parallel.sharding import Shard

SIZE = 4096


@pytest.fixture
def memory():
    generator = torch.Generator().manual_seed(1)
    device, host = (
        torch.randint(0, 256, (40, SIZE), generator=generator, dtype=torch.uint8) for _ in range(2)
    )
    return device, host


@pytest.fixture
def copies(memory, monkeypatch):
    """Copies by the thread, however small."""
    monkeypatch.setattr(block_copies, "_INLINE_BYTES", -1)
    thread = CopyThread(*memory)
    yield thread
    thread.close()


def wait(copies, reports=1):
    done = []
    while len(done) < reports:
        more = copies.poll(5.0)
        assert more, f"{len(done)} of {reports} reports"
        done += more
    return done


def test_neighbours_on_both_sides_are_joined():
    pairs = [(3, 7), (4, 8), (5, 9), (7, 10), (8, 12), (9, 13), (2, 14)]
    assert list(runs(pairs)) == [(3, 7, 3), (7, 10, 1), (8, 12, 2), (2, 14, 1)]
    assert list(runs([])) == []


def test_runs_cover_every_pair_once():
    rng = random.Random(2)
    for _ in range(200):
        pairs = [(rng.randrange(4), rng.randrange(4)) for _ in range(rng.randrange(8))]
        covered = [(a + i, b + i) for a, b, n in runs(pairs) for i in range(n)]
        assert covered == pairs


def test_blocks_go_both_ways(memory, copies):
    device, host = memory
    before = host.clone()
    rng = random.Random(3)
    out = list(zip(rng.sample(range(40), 12), rng.sample(range(40), 12), strict=True))
    out += [(36, 30), (37, 31), (38, 32)] if not {30, 31, 32} & {s for _, s in out} else []
    first = copies.to_host(out)
    done, summed = wait(copies, 2)
    assert (done.job_id, done.error, done.checksums) == (first, None, None)
    assert done.seconds > 0
    for block, slot in out:
        assert torch.equal(host[slot], device[block])
    untouched = [s for s in range(40) if s not in {slot for _, slot in out}]
    assert torch.equal(host[untouched], before[untouched])
    assert summed.job_id == first
    assert summed.checksums == tuple(
        xxhash.xxh3_64_intdigest(device[block].numpy()) for block, _ in out
    )
    wanted = [host[slot].clone() for _, slot in out]
    back = [(slot, i) for i, (_, slot) in enumerate(out)]
    second = copies.to_device(back, summed.checksums)
    (done,) = wait(copies)
    assert (done.job_id, done.error, done.corrupt) == (second, None, ())
    for i, content in enumerate(wanted):
        assert torch.equal(device[i], content)


def test_one_flipped_bit_is_found_where_it_is_looked_for(memory, copies):
    _, host = memory
    sums = [xxhash.xxh3_64_intdigest(host[i].numpy()) for i in range(4)]
    host[1, 77] ^= 1
    host[3, 5] ^= 128
    pairs = [(i, i) for i in range(4)]
    copies.to_device(pairs, sums)
    copies.to_device(pairs, [sums[0], None, sums[2], sums[3]])
    copies.to_device(pairs, ())
    assert [done.corrupt for done in wait(copies, 3)] == [(1, 3), (3,), ()]


def test_a_copy_from_or_to_nowhere_is_an_error_and_the_next_one_runs(memory, copies):
    device, host = memory
    copies.to_host([(0, 40)])
    copies.to_device([(-1, 3)], ())
    copies.to_host([(5, 6)])
    done = wait(copies, 4)
    assert [type(d.error) for d in done] == [IndexError, IndexError, type(None), type(None)]
    assert torch.equal(host[6], device[5])


def test_without_host_memory_the_error_says_so(memory):
    copies = CopyThread(memory[0], None)
    with pytest.raises(KVStoreError, match="no host memory"):
        copies.to_host([(0, 0)])
    copies.close()


def test_copies_go_before_checksums_but_those_come_all(memory, copies):
    jobs = [copies.to_host([(i % 40, i % 40)]) for i in range(600)]
    done = wait(copies, 1200)
    copied = [d.job_id for d in done if d.checksums is None]
    summed = [d.job_id for d in done if d.checksums is not None]
    assert copied == summed == jobs
    # However many copies wait, some of the checksums come in between.
    assert done.index(next(d for d in done if d.job_id == jobs[0] and d.checksums)) < 600


def test_a_small_job_is_done_at_once_unless_others_wait(memory):
    device, host = memory
    copies = CopyThread(device, host)
    job = copies.to_host([(1, 2), (2, 3)])
    assert torch.equal(host[2:4], device[1:3])
    (done,) = copies.poll(0.0)
    assert (done.job_id, done.error) == (job, None)
    assert done.checksums == tuple(xxhash.xxh3_64_intdigest(host[i].numpy()) for i in (2, 3))
    host[3, 0] ^= 1
    copies.to_device([(2, 5), (3, 6)], done.checksums)
    assert [d.corrupt for d in copies.poll(0.0)] == [(1,)]
    assert torch.equal(device[5], host[2])
    assert not device[6].any()
    large = copies.to_host([(i % 40, i % 40) for i in range(300)])
    small = copies.to_host([(0, 1)])
    done = wait(copies, 4)
    assert [d.job_id for d in done if d.checksums is None] == [large, small]
    copies.close()


@pytest.mark.parametrize("inline_bytes", [-1, block_copies._INLINE_BYTES])
def test_each_rank_copies_its_part_of_a_slot(inline_bytes, monkeypatch):
    monkeypatch.setattr(block_copies, "_INLINE_BYTES", inline_bytes)
    generator = torch.Generator().manual_seed(4)
    devices = torch.randint(1, 256, (3, 8, SIZE), generator=generator, dtype=torch.uint8)
    before = devices.clone()
    host = torch.zeros(8, 3 * SIZE, dtype=torch.uint8)
    reports = Reports()
    ranks = [CopyThread(devices[rank], host, Shard(rank, 3), reports) for rank in range(3)]
    assert [rank.to_host([(1, 5), (2, 6), (7, 0)]) for rank in ranks] == [1, 1, 1]
    # Of whole slots nobody here knows when they are filled.
    assert [d.checksums for d in wait(ranks[0], 3)] == [(), (), ()]
    for block, slot in ((1, 5), (2, 6), (7, 0)):
        assert torch.equal(host[slot], before[:, block].flatten())
    assert not host[[1, 2, 3, 4, 7]].any()
    sums = [xxhash.xxh3_64_intdigest(host[slot].numpy()) for slot in (5, 6)]
    host[6, -1] ^= 1
    for rank in ranks:
        rank.to_device([(5, 0), (6, 3)], sums if rank is ranks[0] else ())
    assert sorted(d.corrupt for d in wait(ranks[1], 3)) == [(), (), (1,)]
    assert torch.equal(devices[:, 0], before[:, 1])
    assert not devices[0, 3].any()
    assert devices[1, 3].any() and devices[2, 3].any()  # their ranks are told by the first one
    untouched = [1, 2, 4, 5, 6, 7]
    assert torch.equal(devices[:, untouched], before[:, untouched])
    for rank in ranks:
        rank.close()


def test_slots_without_room_for_all_parts_are_refused(memory):
    device, host = memory
    with pytest.raises(KVStoreError, match="do not hold the 4096 bytes that each of 2 ranks has"):
        CopyThread(device, host, Shard(1, 2))


class PyBindError(NamedTuple):
    """An enumeration's member as some builds of torch make it, others make plain numbers."""

    value: int


@pytest.mark.parametrize("kind", [int, PyBindError])
def test_memory_that_cannot_be_page_locked_is_said_and_used(monkeypatch, caplog, kind):
    answers = iter([0, 0, 2])
    asked = []

    class Cudart:
        @staticmethod
        def cudaHostRegister(address, size, flags):
            asked.append((address, size, flags))
            return kind(next(answers))

        @staticmethod
        def cudaHostUnregister(address):
            asked.append(address)
            return kind(next(answers))

    def refused(*_, **__):
        raise RuntimeError("CUDA error: out of memory")  # what the failed call has left behind

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart)
    monkeypatch.setattr(torch, "zeros", refused)
    host = torch.empty(4, SIZE, dtype=torch.uint8)
    assert host_memory.pin(host) is host
    host_memory.unpin(host)
    assert asked == [(host.data_ptr(), 4 * SIZE, 0), host.data_ptr()]
    assert not caplog.records
    assert host_memory.pin(host) is None
    assert "CUDA error 2" in caplog.text and "memlock" in caplog.text
