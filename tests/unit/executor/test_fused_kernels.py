"""Kernels in place of several operators give what those give; interpreted, on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.triton_interpreter import interpret
from tokenflow.replicas.sampling.sampler import gumbel


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    interpret()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [8, 5])
def test_rotary_embedding_in_place_of_strided_heads(dtype, heads):
    from tokenflow.replicas.executor.fused_kernels import rotate

    packed = normal(6, heads + 3, 32, dtype=dtype)
    angles = normal(6, 1, 16)
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    qk, value = packed.split([heads, 3], 1)
    expected = (qk.float() * cos + qk.float().roll(16, -1) * sin).to(dtype)
    before = value.clone()
    rotate(qk, cos, sin)
    torch.testing.assert_close(qk, expected)
    assert torch.equal(value, before)


@pytest.mark.parametrize("width", [7, 1024, 1500])
def test_the_gated_activation(width):
    from tokenflow.replicas.executor.fused_kernels import silu_and_multiply

    gate_up = 8 * normal(2, 3, 2 * width)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(silu_and_multiply(gate_up), F.silu(gate) * up)


@pytest.mark.parametrize("vocab", [5, 4096, 10_000])
def test_the_same_token_is_drawn_by_noise_that_is_never_in_memory(vocab):
    from tokenflow.replicas.executor.fused_kernels import noisy_argmax

    bases = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 77])
    scores = 2 * normal(6, vocab)
    scores[5] = float("-inf")
    scores[5, vocab - 1] = 0.0
    expected = (scores + gumbel(bases, vocab)).argmax(-1)
    assert noisy_argmax(scores, bases).tolist() == expected.tolist()
    assert expected[5] == vocab - 1
