"""The backends for GPUs against the float32 reference: Triton's kernels interpreted, flash-attn by
a stand-in that checks what it is called with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from tests.support import fake_flash_attn
from tests.support.paged import CPU, RAGGED, Setup
from tests.support.triton_interpreter import interpret
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.executor.attention.choice import choose_backend, obstacle
from tokenflow.replicas.executor.attention.sdpa import SdpaAttention
from tokenflow.replicas.executor.base import KVLayout

LONG = [(0, 70), (130, 20), (333, 1), (64, 1), (1, 1)]


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    interpret()


def triton_backend(group, processors=1):
    from tokenflow.replicas.executor.attention.triton_backend import TritonAttention

    return partial(TritonAttention, group=group, processors=processors)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, block_size, window, lengths",
    [
        (2, 2, 64, 16, None, RAGGED),
        (8, 2, 128, 16, None, LONG),
        (7, 1, 64, 64, None, LONG),
        (8, 2, 64, 4, 6, RAGGED),
        (4, 1, 64, 16, 100, LONG),
    ],
)
def test_triton_equals_plain_attention(heads, kv_heads, head_dim, block_size, window, lengths):
    setup = Setup(
        lengths,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        window=window,
        backend=triton_backend(heads // kv_heads),
    )
    torch.testing.assert_close(setup.run(), setup.expected(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 600])
def test_triton_merges_the_splits_of_long_contexts(window):
    setup = Setup(
        [(0, 3), (1100, 1), (40, 1)],
        heads=4,
        kv_heads=1,
        head_dim=64,
        block_size=16,
        window=window,
        backend=triton_backend(4, processors=64),
    )
    assert setup.backend.prepare(setup.step()).splits == (4 if window is None else 2)
    torch.testing.assert_close(setup.run(), setup.expected(), atol=2e-5, rtol=1e-4)


def test_triton_in_half_precision():
    setup = Setup(RAGGED, head_dim=64, dtype="float16", window=12, backend=triton_backend(2))
    torch.testing.assert_close(setup.run().float(), setup.expected(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("processors", [1, 64])
def test_a_batch_from_device_memory_is_the_same(processors):
    lengths = [(700, 1), (16, 1), (1, 1), (33, 1)]
    for backend in (triton_backend(2, processors), SdpaAttention):
        setup = Setup(lengths, head_dim=64, block_size=16, backend=backend)
        torch.testing.assert_close(setup.decode(), setup.expected(), atol=2e-5, rtol=1e-4)


def test_triton_takes_strided_views():
    setup = Setup(RAGGED, heads=4, kv_heads=2, head_dim=64, backend=triton_backend(2))
    setup.fill_context(0)
    packed = [
        torch.cat([getattr(s, name)[s.context :] for s in setup.sequences])
        for name in ("query", "key", "value")
    ]
    query, key, value = torch.cat(packed, 1).split([4, 2, 2], 1)
    out = setup.backend.prepare(setup.step()).attend(query, key, value, 0, setup.scale)
    torch.testing.assert_close(out, setup.expected(), atol=2e-5, rtol=1e-4)


def test_offsets_into_a_large_pool_are_of_64_bits():
    """A pool on an H200 has more than 2^31 elements. Of this one nearly all is never touched."""
    from tokenflow.replicas.executor.attention import triton_kernels as kernels

    block_stride = 3 << 30  # of blocks, the second one starts beyond 2^31
    pool = torch.empty(block_stride + 64, dtype=torch.float16)
    key = torch.randn(1, 1, 64).half()
    places = torch.tensor([16])
    kernels.store_kv[(1,)](
        *(key, key, pool, pool, places, 64, 64, 64, 64, block_stride, 64, 64),
        HEADS=1,
        HEAD_ROWS=1,
        HEAD_DIM=64,
        BLOCK_SIZE=16,
    )
    assert torch.equal(pool[block_stride:], key.flatten())
    table, one, zero = torch.tensor([1]).int(), torch.tensor([0, 1]).int(), torch.zeros(1).int()
    query, out = torch.randn(1, 1, 64).half(), torch.empty(1, 1, 64).half()
    kernels.attend[(1, 1, 1)](
        *(query, pool, pool, out, out, out, out, table, one, one[1:], zero, zero, 0.125, 0, 0),
        *(64, 64, block_stride, 64, 64, 64, 64, 1, 1, 1),
        GROUP=1,
        HEAD_DIM=64,
        BLOCK_SIZE=16,
        QUERIES=1,
        ROWS=16,
        KEYS=64,
        SPLIT=False,
        WINDOW=0,
    )
    torch.testing.assert_close(out, key, atol=1e-3, rtol=1e-3)


def test_splits_keep_the_device_busy_but_are_not_small():
    from tokenflow.replicas.executor.attention.triton_backend import decode_splits, query_tiles

    assert decode_splits(256, 8, 100_000, 132) == 1
    assert decode_splits(1, 8, 100_000, 132) == 32
    assert decode_splits(4, 8, 100_000, 132) == 8
    assert decode_splits(1, 8, 1024, 132) == 4
    assert decode_splits(1, 8, 20, 132) == 1
    assert query_tiles([5, 2], 4) == ([0, 0, 1], [4, 0, 0])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [[(0, 300), (260, 5), (500, 1), (3, 1)], [(0, 9)], [(9, 1)]])
def test_flash_attn_is_called_as_it_must_be(monkeypatch, lengths, window):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    from tokenflow.replicas.executor.attention.flash import FlashAttention

    setup = Setup(
        lengths,
        heads=8,
        kv_heads=2,
        head_dim=64,
        block_size=256,
        window=window,
        dtype="float16",
        backend=FlashAttention,
    )
    torch.testing.assert_close(setup.run().float(), setup.expected(), atol=1e-2, rtol=1e-2)
    if lengths == [(9, 1)]:
        torch.testing.assert_close(setup.decode().float(), setup.expected(), atol=1e-2, rtol=1e-2)


CUDA = torch.device("cuda")


def layout(block_size=16, head_dim=128, dtype="bfloat16"):
    return KVLayout(2, block_size, 2, head_dim, dtype)


def test_the_fastest_backend_that_can_is_chosen(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    found = {"triton": object()}
    find = "tokenflow.replicas.executor.attention.choice.importlib.util.find_spec"
    monkeypatch.setattr(find, found.get)
    assert choose_backend("auto", layout(), CPU) == "sdpa"
    assert choose_backend("auto", layout(), CUDA) == "triton"
    assert choose_backend("auto", layout(256), CUDA) == "triton"
    found["flash_attn"] = object()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert choose_backend("auto", layout(256), CUDA) == "triton"
    assert "cannot be imported" in (obstacle("flash_attn", layout(256), CUDA) or "")
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    assert choose_backend("auto", layout(256), CUDA) == "flash_attn"
    assert choose_backend("auto", layout(), CUDA) == "triton"
    assert choose_backend("auto", layout(256, dtype="float32"), CUDA) == "triton"
    assert choose_backend("auto", layout(256, head_dim=96), CUDA) == "sdpa"
    assert choose_backend("sdpa", layout(256), CUDA) == "sdpa"
    found.clear()
    assert choose_backend("auto", layout(256), CUDA) == "sdpa"
    assert "not installed" in (obstacle("triton", layout(), CUDA) or "")


@pytest.mark.parametrize("name", ["flash_attn", "triton"])
def test_a_backend_that_cannot_run_is_refused(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"attention_backend.*GPU.*cpu"):
        choose_backend(name, layout(), CPU)


def test_the_kernels_compile_for_an_h200():
    made = json.loads(
        subprocess.run(
            [sys.executable, "-m", "tests.support.compile_kernels"],
            check=True,
            capture_output=True,
            timeout=250,
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        ).stdout
    )
    assert all(kernel["cubin_bytes"] > 0 for kernel in made.values())
    # What one multiprocessor of an H200 has.
    assert all(kernel["shared_bytes"] <= 227 << 10 for kernel in made.values())
    assert made["prefill, llama3-8b"]["wgmma"] > 0 and made["prefill, head_dim 256"]["wgmma"] > 0
    assert made["decode, llama3-8b"]["mma"] > 0
