"""Padding to buckets, without graphs: what is replayed sees the same batch whatever its size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tokenflow.replicas.executor.graphs import DecodeGraphs, graph_buckets, replayed
from tokenflow.replicas.executor.transfer import Download, pack, unpack, upload

CPU = torch.device("cpu")
SPARE = 99


@pytest.mark.parametrize("most", [1, 2, 3, 8, 20, 128, 300])
def test_buckets_ascend_to_the_most(most):
    buckets = graph_buckets(most)
    assert buckets[-1] == most
    assert buckets == sorted(set(buckets))
    # A padded batch is at most twice as large, and from 64 on a third larger.
    for small, large in pairwise(buckets):
        assert large <= 2 * small and (small < 64 or 3 * large <= 4 * (small + 1))


class Calls:
    """Stands for the model: remembers what it saw, and puts out a mix of its inputs."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[int], list[list[int]]]] = []

    def __call__(self, ids, positions, tables):
        self.seen.append((ids.tolist(), positions.tolist(), tables.tolist()))
        return torch.stack([ids, positions, tables[:, 0]], 1).float()


def make(run, most=6):
    return DecodeGraphs(
        run,
        replayed,
        most=most,
        width=3,
        hidden_size=3,
        dtype=torch.float32,
        spare_block=SPARE,
        device=CPU,
    )


def batch(*rows):
    ids, positions, tables = zip(*rows, strict=True)
    return torch.tensor(ids), torch.tensor(positions), torch.tensor(tables, dtype=torch.int32)


def test_rows_of_padding_use_the_spare_block_only():
    run = Calls()
    graphs = make(run)
    full = batch(*((i, 10 + i, (i, i + 1, i + 2)) for i in range(6)))
    assert graphs.run(*full).tolist() == [[i, 10 + i, i] for i in range(6)]
    assert graphs.run(*batch((7, 5, (4, 3)), (8, 6, (5, 2)), (9, 2, (6, 1)))).tolist() == [
        [7, 5, 4],
        [8, 6, 5],
        [9, 2, 6],
    ]
    ids, positions, tables = run.seen[-1]
    assert len(ids) == 4 and ids[:3] == [7, 8, 9]
    assert positions == [5, 6, 2, 0]
    assert [row[:2] for row in tables[:3]] == [[4, 3], [5, 2], [6, 1]]
    assert tables[3][0] == SPARE
    assert graphs.fits(6) and not graphs.fits(7)


def test_each_bucket_is_captured_once_the_largest_first():
    captured = []

    def capture(run):
        run()
        captured.append(len(calls.seen[-1][0]))
        return run

    calls = Calls()
    DecodeGraphs(
        calls,
        capture,
        most=9,
        width=1,
        hidden_size=3,
        dtype=torch.float32,
        spare_block=SPARE,
        device=CPU,
    )
    assert captured == [9, 8, 4, 2, 1]
    assert all(set(p) == {0} and {r[0] for r in t} == {SPARE} for _, p, t in calls.seen)


def test_arrays_go_over_in_one_piece():
    arrays = [
        np.arange(5, dtype=np.int64),
        np.zeros(0, np.int64),
        np.arange(6, dtype=np.int32).reshape(2, 3)[:, 1:],
        np.array([0.5, -1.0, 3.0], np.float32),
    ]
    packed = torch.from_numpy(pack(arrays))
    unpacked = unpack(packed, arrays)
    for views in (unpacked, upload(arrays, CPU)):
        for view, array in zip(views, arrays, strict=True):
            assert np.array_equal(view.numpy(), array) and view.numpy().dtype == array.dtype
    assert all(
        v.data_ptr() % 16 == packed.data_ptr() % 16 for v in unpack(packed, arrays) if len(v)
    )
    assert [t.tolist() for t in Download(upload(arrays, CPU)).wait()] == [
        a.tolist() for a in arrays
    ]
