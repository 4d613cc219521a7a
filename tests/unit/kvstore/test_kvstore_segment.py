"""Segments within one process: layout, errors, and memory that outlives `close`."""

import mmap
import os

import pytest
import torch

from tokenflow.kvstore.segment import TABLES_OFFSET, Segment, reap_orphans, segment_bytes
from tokenflow.kvstore.sizing import free_bytes
from tokenflow.kvstore.tables import Tables
from tokenflow.replicas.errors import KVStoreError


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path)


def make(directory, name="a", slot_bytes=48, num_slots=5, epoch=7):
    return Segment.create(
        name, slot_bytes=slot_bytes, num_slots=num_slots, epoch=epoch, directory=directory
    )


def test_header_and_layout_survive_the_trip_through_the_file(directory):
    created = make(directory)
    attached = Segment.attach(created.path, slot_bytes=48)
    assert attached.header == created.header
    assert attached.header.creator_pid == os.getpid()
    assert attached.header.epoch == 7
    assert os.path.basename(created.path) == "tokenflow-kv-a"
    header = created.header
    assert header.data_offset >= TABLES_OFFSET + Tables.nbytes(5, header.max_owners)
    assert header.data_offset % mmap.PAGESIZE == 0
    assert os.stat(created.path).st_size == header.file_bytes == header.data_offset + 5 * 48
    assert os.stat(created.path).st_mode & 0o777 == 0o600


def test_slots_are_zero_at_first_contiguous_and_shared_without_a_copy(directory):
    created = make(directory)
    ours, theirs = created.tensor(), Segment.attach(created.path).tensor()
    assert ours.shape == (5, 48) and ours.dtype == torch.uint8 and ours.is_contiguous()
    assert not ours.any()
    theirs[3] = torch.arange(48, dtype=torch.uint8)
    assert ours[3].tolist() == list(range(48))
    assert not ours[[0, 1, 2, 4]].any()
    assert ours.data_ptr() % mmap.PAGESIZE == 0


def test_the_tables_are_shared_apart_from_the_data_and_zero_at_first(directory):
    created = make(directory)
    ours, theirs = created.tables(), Segment.attach(created.path).tables()
    assert (ours.num_slots, ours.max_owners) == (5, created.header.max_owners)
    assert not any(column.any() for column in vars(ours).values() if hasattr(column, "any"))
    for name, column in vars(theirs).items():
        if hasattr(column, "fill"):
            column.fill(b"x" if name == "owner_id" else 1)
    assert ours.state.all() and ours.pins.all() and ours.cells.all() and ours.store.all()
    assert not created.tensor().any()
    assert Segment.attach(created.path).header == created.header
    created.tensor().fill_(255)
    assert theirs.store.tolist() == [1, 1, 1]


def test_tables_outlive_close(directory):
    segment = make(directory)
    tables = segment.tables()
    segment.close()
    tables.state[:] = 1  # a closed mapping would end the process here
    assert reap_orphans(directory) == []
    del tables
    assert reap_orphans(directory) == [segment.path]


def test_a_kernel_that_cannot_prefault_is_no_error(directory, monkeypatch):
    segment = make(directory)
    monkeypatch.setattr("tokenflow.kvstore.segment._MADV_POPULATE_WRITE", 12345)  # EINVAL
    assert not Segment.attach(segment.path).tensor().any()


def test_attach_prefaults_every_page_unless_told_not_to(directory):
    """Counted by the kernel: resident shared memory of this process."""

    def resident():
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Rss:")) << 10

    size = 64 << 20
    segment = make("/dev/shm", f"test-fault-{os.getpid()}", slot_bytes=size, num_slots=1)
    try:
        before = resident()
        lazy = Segment.attach(segment.path, prefault=False)
        assert resident() - before < size / 2
        eager = Segment.attach(segment.path)
        assert resident() - before > size / 2
        lazy.close()
        eager.close()
    finally:
        segment.unlink()


def test_a_slot_can_be_viewed_as_a_block_of_another_dtype(directory):
    segment = make(directory, slot_bytes=2 * 2 * 4 * 2 * 8 * 2)
    block = segment.tensor()[2].view(torch.bfloat16).view(2, 2, 4, 2, 8)
    block.fill_(1.5)
    assert Segment.attach(segment.path).tensor()[2].view(torch.bfloat16).eq(1.5).all()


def test_a_tensor_outlives_close_and_keeps_the_lock(directory):
    segment = make(directory)
    tensor = segment.tensor()
    segment.close()
    segment.close()
    tensor.fill_(9)  # a closed mapping would end the process here
    assert reap_orphans(directory) == []
    del tensor
    assert reap_orphans(directory) == [segment.path]


def test_a_closed_segment_refuses_a_new_tensor(directory):
    segment = make(directory)
    segment.close()
    with pytest.raises(KVStoreError, match="closed"):
        segment.tensor()


def test_unlink_takes_the_name_only(directory):
    segment = make(directory)
    other = Segment.attach(segment.path)
    segment.unlink()
    segment.unlink()
    assert os.listdir(directory) == []
    segment.tensor()[0] = 1
    assert other.tensor()[0].eq(1).all()
    with pytest.raises(KVStoreError, match="cannot open"):
        Segment.attach(segment.path)


def test_a_name_in_use_is_refused_and_left_alone(directory):
    first = make(directory)
    first.tensor().fill_(5)
    with pytest.raises(KVStoreError, match="File exists"):
        make(directory)
    assert Segment.attach(first.path).tensor().eq(5).all()


def test_no_room_says_what_was_asked_what_is_free_and_what_to_set():
    statvfs = os.statvfs("/dev/shm")
    whole = statvfs.f_blocks * statvfs.f_frsize
    with pytest.raises(KVStoreError) as caught:
        Segment.create(
            f"test-{os.getpid()}", slot_bytes=1 << 20, num_slots=(whole >> 20) + 1024, epoch=1
        )
    message = str(caught.value)
    assert f"asked for {(whole + (1 << 30)) / 2**30:.1f}" in message
    assert f"{free_bytes('/dev/shm') / 2**30:.0f}"[:-1] in message
    for word in ("--host-kv-gib", "/dev/shm", "--shm-size", "emptyDir", "medium: Memory"):
        assert word in message
    assert not os.path.exists(f"/dev/shm/tokenflow-kv-test-{os.getpid()}")


def test_a_segment_of_no_slots_is_refused(directory):
    with pytest.raises(KVStoreError, match="at least one slot"):
        make(directory, num_slots=0)
    assert os.listdir(directory) == []


def test_attach_refuses_slots_of_another_size(directory):
    segment = make(directory)
    with pytest.raises(KVStoreError, match=r"48 bytes.*needs 64"):
        Segment.attach(segment.path, slot_bytes=64)


def test_attach_refuses_what_is_not_a_finished_segment(directory):
    segment = make(directory)
    with open(segment.path, "r+b") as file:
        file.write(b"\0")
    with pytest.raises(KVStoreError, match="not a finished KV segment"):
        Segment.attach(segment.path)
    empty = os.path.join(directory, "tokenflow-kv-empty")
    open(empty, "wb").close()
    with pytest.raises(KVStoreError, match="not a finished KV segment"):
        Segment.attach(empty)


def test_attach_refuses_another_version_and_a_truncated_file(directory):
    segment = make(directory)
    os.truncate(segment.path, segment.header.data_offset + 1)
    with pytest.raises(KVStoreError, match="truncated"):
        Segment.attach(segment.path)
    with open(segment.path, "r+b") as file:
        file.seek(8)
        file.write(b"\x63\0\0\0")
    with pytest.raises(KVStoreError, match="version 99"):
        Segment.attach(segment.path)


def test_the_reaper_takes_orphans_of_its_prefix_only(directory):
    live = make(directory, "node1-live")
    dead = make(directory, "node1-dead")
    dead.close()
    elsewhere = make(directory, "node2-dead")
    elsewhere.close()
    stranger = os.path.join(directory, "something-else")
    open(stranger, "wb").close()
    assert segment_bytes(directory, "tokenflow-kv-node1-") == 2 * live.header.file_bytes
    assert reap_orphans(directory, "tokenflow-kv-node1-") == [dead.path]
    assert reap_orphans(directory) == [elsewhere.path]
    assert sorted(os.listdir(directory)) == sorted([os.path.basename(live.path), "something-else"])


def test_the_reaper_follows_no_link(directory, tmp_path_factory):
    target = tmp_path_factory.mktemp("outside") / "precious"
    target.write_bytes(b"data")
    os.symlink(target, os.path.join(directory, "tokenflow-kv-link"))
    assert reap_orphans(directory) == []
    assert target.read_bytes() == b"data"
