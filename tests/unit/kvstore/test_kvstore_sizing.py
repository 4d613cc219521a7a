"""How much memory the store takes by default."""

import pytest

from tokenflow.kvstore.sizing import (
    available_memory_bytes,
    default_host_bytes,
    default_owner_fraction,
    free_bytes,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("available", "shm", "expected"),
    [
        (100 * GIB, 64 * GIB, 25 * GIB),
        (100 * GIB, 10 * GIB, 5 * GIB),
        (100 * GIB, 64 << 20, 32 << 20),  # Docker's default /dev/shm
        (0, 10 * GIB, 0),
        (-GIB, GIB, 0),
    ],
)
def test_a_quarter_of_memory_and_at_most_half_of_shm(available, shm, expected):
    assert default_host_bytes(available, shm) == expected


def test_the_limit_of_the_container_counts(tmp_path):
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 18}\n")
    assert available_memory_bytes(tmp_path) == (1 << 20) - (1 << 18)
    (tmp_path / "memory.current").write_text(f"{1 << 21}\n")
    assert available_memory_bytes(tmp_path) == 0


def test_without_a_limit_the_machine_counts(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       99 kB\nMemAvailable:   64 kB\nHugePages_Total:   0\n")
    assert available_memory_bytes(tmp_path, meminfo) == 64 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert available_memory_bytes(tmp_path, meminfo) == 64 * 1024
    assert available_memory_bytes() > 1 << 20


def test_free_bytes_is_within_the_file_system(tmp_path):
    assert 0 < free_bytes(str(tmp_path)) < 1 << 60


def test_one_replica_may_take_all_and_many_at_most_twice_their_share():
    assert [default_owner_fraction(n) for n in (1, 2, 4, 8)] == [1.0, 0.75, 0.5, 0.25]
