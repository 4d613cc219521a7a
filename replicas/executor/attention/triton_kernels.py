"""Triton kernels over the paged pool: KV of a step into its blocks, and attention out of them.

One attention kernel serves prefill chunks and decoding. The query heads of one KV head share their
keys, so they are packed into the rows of one product. Long contexts of few sequences are cut into
splits, which other programs work on, and merged after. [FlashAttention-2; Flash-Decoding]

Here are kernels only; which programs there are is decided in `triton_backend`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def store_kv(
    key,
    value,
    pool_keys,
    pool_values,
    places,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    pool_block_stride,
    pool_token_stride,
    pool_head_stride,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One program per token: K and V `[tokens, HEADS, HEAD_DIM]` of one layer to their places.
    HEAD_ROWS is HEADS rounded up to a power of two."""
    # 64 bits: a packed batch may have more than 2^31 elements.
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token)
    head = tl.arange(0, HEAD_ROWS)[:, None]
    dim = tl.arange(0, HEAD_DIM)[None]
    there = head < HEADS
    target = (
        (place // BLOCK_SIZE) * pool_block_stride
        + (place % BLOCK_SIZE) * pool_token_stride
        + head * pool_head_stride
        + dim
    )
    k = tl.load(key + token * key_token_stride + head * key_head_stride + dim, mask=there)
    v = tl.load(value + token * value_token_stride + head * value_head_stride + dim, mask=there)
    tl.store(pool_keys + target, k, mask=there)
    tl.store(pool_values + target, v, mask=there)


# What differs from step to step is not compiled into the kernel: a new variant takes seconds.
@triton.jit(do_not_specialize=["first_program", "first_token", "partial_tokens", "table_stride"])
def attend(
    query,
    pool_keys,
    pool_values,
    out,
    partial_out,
    partial_max,
    partial_sum,
    tables,
    query_starts,
    seen,
    program_sequences,
    program_offsets,
    scale,
    first_program,
    first_token,
    query_token_stride,
    query_head_stride,
    pool_block_stride,
    pool_token_stride,
    pool_head_stride,
    out_token_stride,
    out_head_stride,
    table_stride,
    partial_tokens,
    heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (p - first_program, kv head, split): queries `[program_offsets[p], + QUERIES)` of
    sequence `program_sequences[p]`.

    query_starts int32 `[sequences + 1]` index the packed queries, seen int32 `[sequences]` are the
    tokens in the pool, this step's included. ROWS >= QUERIES * GROUP is a power of two >= 16. With
    SPLIT float32 partial results are written, `[splits, tokens, heads(, HEAD_DIM)]` of the tokens
    from `first_token` on, for `merge_splits`. WINDOW 0: none.
    """
    program = first_program + tl.program_id(0)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    sequence = tl.load(program_sequences + program)
    offset = tl.load(program_offsets + program)
    first = tl.load(query_starts + sequence)
    length = tl.load(query_starts + sequence + 1) - first
    total = tl.load(seen + sequence)

    row = tl.arange(0, ROWS)
    index = offset + row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = (index < length) & (row < QUERIES * GROUP)
    dim = tl.arange(0, HEAD_DIM)
    token = (first + index).to(tl.int64)
    q = tl.load(
        query + token[:, None] * query_token_stride + head[:, None] * query_head_stride + dim[None],
        mask=real[:, None],
        other=0.0,
    )
    position = total - length + index

    end = tl.minimum(total - length + offset + QUERIES, total)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(total - length + offset - WINDOW + 1, 0) // KEYS * KEYS
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, KEYS), tl.num_programs(2)) * KEYS
        begin = begin + split * share
        end = tl.minimum(begin + share, end)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    accumulated = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for at in range(begin, end, KEYS):
        place = at + tl.arange(0, KEYS)
        inside = place < end
        block = tl.load(
            tables + sequence * table_stride + place // BLOCK_SIZE, mask=inside, other=0
        ).to(tl.int64)
        source = (
            block * pool_block_stride
            + (place % BLOCK_SIZE) * pool_token_stride
            + kv_head * pool_head_stride
        )
        k = tl.load(pool_keys + source[None] + dim[:, None], mask=inside[None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
        visible = inside[None] & (place[None] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (place[None] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row that sees nothing yet has no maximum to subtract.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        v = tl.load(pool_values + source[:, None] + dim[None], mask=inside[:, None], other=0.0)
        weight_sum = weight_sum * fade + tl.sum(weights, 1)
        accumulated = accumulated * fade[:, None] + tl.dot(
            weights.to(v.dtype), v, input_precision="ieee"
        )
        highest = new_highest

    if not SPLIT:
        result = accumulated / weight_sum[:, None]
        target = token[:, None] * out_token_stride + head[:, None] * out_head_stride + dim[None]
        tl.store(out + target, result.to(out.dtype.element_ty), mask=real[:, None])
    else:
        target = (split * partial_tokens + token - first_token) * heads + head
        tl.store(partial_max + target, highest, mask=real)
        tl.store(partial_sum + target, weight_sum, mask=real)
        tl.store(
            partial_out + target[:, None] * HEAD_DIM + dim[None], accumulated, mask=real[:, None]
        )


@triton.jit(do_not_specialize=["first_token", "partial_tokens", "splits"])
def merge_splits(
    out,
    partial_out,
    partial_max,
    partial_sum,
    first_token,
    out_token_stride,
    out_head_stride,
    partial_tokens,
    heads,
    splits,
    HEAD_DIM: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Program (token, head): the weighted mean of what the splits of `attend` found. MOST_SPLITS is
    a power of two >= splits."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, MOST_SPLITS)
    there = split < splits
    dim = tl.arange(0, HEAD_DIM)
    source = (split * partial_tokens + token) * heads + head
    highest = tl.load(partial_max + source, mask=there, other=float("-inf"))
    weights = tl.exp2(highest - tl.max(highest, 0))
    sums = tl.load(partial_sum + source, mask=there, other=0.0)
    total = tl.sum(weights * sums, 0)
    parts = tl.load(
        partial_out + source[:, None] * HEAD_DIM + dim[None], mask=there[:, None], other=0.0
    )
    result = tl.sum(parts * weights[:, None], 0) / total
    target = (first_token + token) * out_token_stride + head * out_head_stride + dim
    tl.store(out + target, result.to(out.dtype.element_ty))
