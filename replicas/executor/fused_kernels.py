"""Triton kernels for what transformers' model classes do in several small ones: rotary embedding,
the gated activation, and the choice of a token by its noise.

A decoding step reads every weight once; whatever else it launches is time in which it does not.
Each function here says what it replaces; elsewhere torch's own operators do the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 1024
"""Of a row, per program of the activation."""
_VOCABULARY = 4096
"""Token ids per program of `noisy_argmax`."""


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding in place: `x * cos + x.roll(head_dim / 2) * sin` in float32.

    heads `[tokens, heads, head_dim]` with contiguous head_dim; cos and sin `[tokens, 1, head_dim]`,
    contiguous, `sin` with the sign of the rotated half. head_dim is a power of two.
    """
    tokens, count, head_dim = heads.shape
    _rotate[(tokens,)](
        heads,
        cos,
        sin,
        *heads.stride()[:2],
        HEADS=count,
        HEAD_ROWS=triton.next_power_of_2(count),
        HALF=head_dim // 2,
    )


@triton.jit
def _rotate(
    heads,
    cos,
    sin,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_ROWS)[:, None]
    dim = tl.arange(0, HALF)[None]
    there = head < HEADS
    low = heads + token * token_stride + head * head_stride + dim
    high = low + HALF
    angle = token * (2 * HALF) + dim
    a = tl.load(low, mask=there).to(tl.float32)
    b = tl.load(high, mask=there).to(tl.float32)
    cos_a, cos_b = tl.load(cos + angle).to(tl.float32), tl.load(cos + angle + HALF).to(tl.float32)
    sin_a, sin_b = tl.load(sin + angle).to(tl.float32), tl.load(sin + angle + HALF).to(tl.float32)
    tl.store(low, (a * cos_a + b * sin_a).to(heads.dtype.element_ty), mask=there)
    tl.store(high, (b * cos_b + a * sin_b).to(heads.dtype.element_ty), mask=there)


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` in float32, of `[..., 2 * width]` contiguous to `[..., width]`."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    rows = out.numel() // width
    _silu_and_multiply[(rows, triton.cdiv(width, _COLUMNS))](gate_up, out, width, COLUMNS=_COLUMNS)
    return out


@triton.jit
def _silu_and_multiply(gate_up, out, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=there).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=there).to(tl.float32)
    tl.store(
        out + row * width + column,
        (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty),
        mask=there,
    )


def noisy_argmax(scores: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """int64 `[rows]`: `argmax(scores + gumbel)` with the noise of `sampler.gumbel`, which is never
    in memory. scores float32 `[rows, vocab]` contiguous, bases int64 `[rows]`."""
    rows, vocab = scores.shape
    parts = triton.cdiv(vocab, _VOCABULARY)
    best = torch.empty(rows, parts, dtype=torch.float32, device=scores.device)
    ids = torch.empty(rows, parts, dtype=torch.int64, device=scores.device)
    _noisy_argmax[(rows, parts)](scores, bases, best, ids, vocab, TOKENS=_VOCABULARY, num_warps=8)
    return ids.gather(1, best.argmax(1, keepdim=True))[:, 0]


@triton.jit
def _noisy_argmax(scores, bases, best, ids, vocab, TOKENS: tl.constexpr):
    """Program (row, part of the vocabulary): the best of the part. See `sampler.gumbel`."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < vocab
    x = tl.load(bases + row) + token * 7664345821815920749
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    uniform = (((x >> 41) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    noise = -tl.log(-tl.log(uniform))
    score = tl.load(scores + row * vocab + token, mask=there, other=float("-inf"))
    noisy = tl.where(there, score + noise, float("-inf"))
    place = row * tl.num_programs(1) + part
    tl.store(best + place, tl.max(noisy, 0))
    tl.store(ids + place, part.to(tl.int64) * TOKENS + tl.argmax(noisy, 0))
