"""Products with a constant weight: the same as torch's own, in every form a model has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenflow.replicas.executor import linear
from tokenflow.replicas.executor.linear import (
    constant_linear,
    padded_rows,
    use_constant_linear,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_it_is_the_linear_layer(dtype, bias, rows):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(96, 40, generator=generator).to(dtype)
    offset = torch.randn(96, generator=generator).to(dtype) if bias else None
    x = torch.randn(2, rows, 40, generator=generator).to(dtype)
    out = constant_linear(weight, offset)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, F.linear(x, weight, offset))


def test_products_are_made_for_few_numbers_of_rows():
    numbers = [padded_rows(n) for n in range(1, 2049)]
    assert numbers[:16] == list(range(1, 17))
    assert all(n <= p <= 1.125 * n for n, p in enumerate(numbers, 1))
    assert len(set(numbers)) == 16 + 7 * 8


def test_a_strided_input_is_read_in_its_own_order():
    weight = torch.randn(16, 8)
    x = torch.randn(8, 5).t()
    torch.testing.assert_close(constant_linear(weight, None)(x), F.linear(x, weight))


def test_a_module_lets_its_weight_go_and_a_tied_one_stays():
    embedding = torch.nn.Embedding(32, 8)
    head = torch.nn.Linear(8, 32, bias=False)
    head.weight = embedding.weight
    head.requires_grad_(False)
    x = torch.randn(3, 8)
    expected = F.linear(x, embedding.weight)
    use_constant_linear(head)
    torch.testing.assert_close(head(x), expected)
    assert not hasattr(head, "weight")
    assert embedding.weight.shape == (32, 8)


def test_a_torch_without_the_operators_is_served_by_its_own_layer(monkeypatch):
    monkeypatch.setattr(linear, "_has_packed_linear", lambda: False)
    head = torch.nn.Linear(8, 32).requires_grad_(False)
    x = torch.randn(3, 8)
    expected = F.linear(x, head.weight, head.bias)
    use_constant_linear(head)
    assert torch.equal(head(x), expected)
    assert torch.equal(constant_linear(head.weight, head.bias)(x), expected)
