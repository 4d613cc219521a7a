"""Paged attention over scattered blocks is plain attention over each sequence's own tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paged import RAGGED, Sequence, Setup, plain_attention
from tokenflow.replicas.executor.attention import sdpa
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.attention.sdpa import chunk_mask, like_lengths
from tokenflow.replicas.executor.base import KVLayout

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 1, 6, 100])
def test_a_ragged_batch_equals_plain_attention(heads, head_dim, window):
    setup = Setup(RAGGED, heads=heads, kv_heads=2, head_dim=head_dim, window=window)
    torch.testing.assert_close(setup.run(), setup.expected(), atol=2e-5, rtol=1e-4)


lengths = st.lists(
    st.one_of(
        st.tuples(st.just(0), st.integers(1, 20)),
        st.tuples(st.integers(1, 30), st.integers(2, 12)),
        st.tuples(st.integers(1, 30), st.just(1)),
    ),
    min_size=1,
    max_size=5,
).map(lambda pairs: sorted(pairs, key=lambda p: p[0] > 0 and p[1] == 1))


@settings(max_examples=40, deadline=None)
@given(
    lengths,
    st.sampled_from([(1, 1), (2, 1), (4, 1), (6, 3)]),
    st.sampled_from([1, 3, 8, 16]),
    st.none() | st.integers(1, 40),
    st.integers(0, 1000),
)
def test_any_batch_equals_plain_attention(lengths, heads, block_size, window, seed):
    setup = Setup(
        lengths,
        heads=heads[0],
        kv_heads=heads[1],
        block_size=block_size,
        window=window,
        seed=seed,
    )
    torch.testing.assert_close(setup.run(), setup.expected(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_the_float32_reference(dtype):
    setup = Setup(RAGGED, dtype=dtype, window=12)
    out = setup.run()
    assert out.dtype == getattr(torch, dtype)
    torch.testing.assert_close(out.float(), setup.expected(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("scores", [1, 100, 1 << 21])
def test_a_bfloat16_chunk_is_the_same_in_any_tiles(scores, monkeypatch):
    monkeypatch.setattr(sdpa, "_TILE_SCORES", scores)
    for window in (None, 5):
        setup = Setup([(0, 40), (17, 23), (3, 2)], heads=6, dtype="bfloat16", window=window)
        out = setup.run().float()
        torch.testing.assert_close(out, setup.expected(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("chunks", [[23], [1] * 23, [8, 8, 7], [22, 1], [1, 22], [5, 1, 1, 16]])
def test_a_prompt_in_chunks_equals_the_prompt_at_once(chunks, window):
    whole = Setup([(0, 23)], window=window)
    sequence = whole.sequences[0]
    query, key, value = sequence.query, sequence.key, sequence.value
    expected = plain_attention(sequence, whole.scale, window)
    parts, start = [], 0
    for n in chunks:
        end = start + n
        whole.sequences = [
            Sequence(query[:end], key[:end], value[:end], n, n == 1 and start > 0, sequence.blocks)
        ]
        batch = whole.backend.prepare(whole.step())
        parts.append(
            batch.attend(query[start:end], key[start:end], value[start:end], 0, whole.scale)
        )
        start = end
    torch.testing.assert_close(torch.cat(parts), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("least", [0, 3, 1000])
@pytest.mark.parametrize("window", [None, 7])
def test_decodes_may_be_padded_in_groups_of_like_lengths(least, window, monkeypatch):
    monkeypatch.setattr(sdpa, "_GROUP_BLOCKS", least)
    contexts = [3, 90, 5, 41, 88, 1, 40]
    setup = Setup([(0, 6), (9, 4), *((n, 1) for n in contexts)], kv_heads=2, window=window)
    torch.testing.assert_close(setup.run(), setup.expected(), atol=2e-5, rtol=1e-4)


def padded(blocks: list[int], group_blocks: int) -> int:
    groups = like_lengths(np.array(blocks), group_blocks)
    assert sorted(np.concatenate(groups)) == list(range(len(blocks)))
    return sum(max(blocks[i] for i in group) * len(group) for group in groups)


def test_groups_are_made_where_they_save_more_than_they_cost():
    assert [list(g) for g in like_lengths(np.array([5, 4, 5, 3]), 8)] == [[0, 1, 2, 3]]
    assert padded([2, 50, 3, 50, 2], 20) == 100 + 9
    assert padded([2, 50, 3, 50, 2], 500) == 250
    assert padded([1, 10, 100, 10, 1], 5) == 100 + 20 + 2
    assert padded([7], 0) == 7


def test_two_sequences_read_the_same_cached_prefix():
    setup = Setup([(8, 5), (8, 1)])
    first, second = setup.sequences
    second.blocks[:2] = first.blocks[:2]
    second.key[:8], second.value[:8] = first.key[:8], first.value[:8]
    torch.testing.assert_close(setup.run(), setup.expected(), atol=2e-5, rtol=1e-4)


def test_only_the_steps_own_places_are_written():
    setup = Setup(RAGGED)
    setup.fill_context(0)
    before = setup.pool.data.clone()
    setup.run(layer=0)
    expected = before
    for s in setup.sequences:
        for position in range(s.context, len(s.key)):
            block, offset = setup.place(s, position)
            expected[block, 0, 0, :, offset] = s.key[position]
            expected[block, 0, 1, :, offset] = s.value[position]
    assert torch.equal(setup.pool.data, expected)


def test_inputs_may_be_strided_views():
    setup = Setup(RAGGED)
    setup.fill_context(0)
    packed = [
        torch.cat([getattr(s, name)[s.context :] for s in setup.sequences])
        for name in ("query", "key", "value")
    ]
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in packed]
    fused = torch.cat(packed, 1).split([4, 2, 2], 1)
    assert not any(x.is_contiguous() for x in (*heads_first, *fused))
    for query, key, value in (heads_first, fused):
        out = setup.backend.prepare(setup.step()).attend(query, key, value, 0, setup.scale)
        torch.testing.assert_close(out, setup.expected(), atol=2e-5, rtol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.none() | st.integers(1, 30))
def test_the_mask_is_causal_and_no_wider_than_the_window(chunk, context, window):
    mask = chunk_mask(chunk, context, window, CPU)
    expected = torch.tensor(
        [
            [
                seen <= context + i and (window is None or seen > context + i - window)
                for seen in range(context + chunk)
            ]
            for i in range(chunk)
        ]
    )
    if mask is None:
        assert context == 0
        mask = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    assert torch.equal(mask, expected)


def test_one_block_of_all_layers_is_one_run_of_bytes():
    layout = KVLayout(3, 4, 2, 16, "bfloat16")
    pool = KVPool(layout, 5, CPU)
    view = pool.bytes_view(5)
    assert tuple(view.shape) == (5, layout.block_bytes)
    assert tuple(pool.bytes_view(4).shape) == (4, layout.block_bytes)
    assert not view.any()
    rows = pool.token_rows(2 * layout.block_size + torch.arange(4))
    ones = torch.ones(4, 2, 16, dtype=torch.bfloat16)
    for layer in range(3):
        pool.write(rows, layer, ones, ones)
    assert view[2].view(torch.bfloat16).ne(0).all()
    assert not view[[0, 1, 3, 4]].any()
