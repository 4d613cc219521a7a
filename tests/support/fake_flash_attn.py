"""flash-attn's two paged functions in plain torch, with the checks of its C++ side.

Signatures and checks are those of flash-attn 2.8 (flash_attn_interface.py, flash_api.cpp).
"""

from __future__ import annotations

import torch

PAGE_TOKENS = 256


def _check(q, k_cache, v_cache, block_table, *int32) -> None:
    for x in (q, k_cache, v_cache):
        assert x.dtype in (torch.float16, torch.bfloat16) and x.stride(-1) == 1
    assert k_cache.shape == v_cache.shape
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.shape[1] % PAGE_TOKENS == 0, "Paged KV cache block size"
    assert block_table.stride(-1) == 1
    for x in (block_table, *int32):
        assert x.dtype == torch.int32
    assert all(x.is_contiguous() for x in int32)


def _attend(q, k_cache, v_cache, table, seen, scale, window) -> torch.Tensor:
    """One sequence: q `[queries, heads, head_dim]`, the last of `seen` tokens."""
    k, v = (x[table.long()].flatten(0, 1)[:seen].float() for x in (k_cache, v_cache))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    ahead = torch.arange(seen)[None] - (seen - len(q) + torch.arange(len(q))[:, None])
    hidden = ahead > 0
    if window[0] >= 0:
        hidden |= ahead < -window[0]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    _check(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k)
    assert causal and window_size[1] in (-1, 0)
    assert len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1
    assert cu_seqlens_q[-1] == len(q)
    queries, seen = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert max(queries) == max_seqlen_q and max(seen) == max_seqlen_k
    parts = [
        _attend(chunk, k, v, block_table[i], seen[i], softmax_scale, window_size)
        for i, chunk in enumerate(q.split(queries))
    ]
    return torch.cat(parts)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    assert k is None and v is None and causal
    _check(q, k_cache, v_cache, block_table, cache_seqlens)
    assert q.shape[0] == len(cache_seqlens) == len(block_table) and q.ndim == 4
    parts = [
        _attend(q[i], k_cache, v_cache, block_table[i], seen, softmax_scale, window_size)
        for i, seen in enumerate(cache_seqlens.tolist())
    ]
    return torch.stack(parts)
