"""The batched sampler: one token per row, from logits and each row's parameters.

Random numbers are a hash of (seed, position, token id), not the state of a generator: the same
request draws the same tokens whatever else is in the batch, however often it was preempted, and on
whatever replica it continues. A draw is `argmax(logits / T + Gumbel noise)`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from tokenflow.replicas.executor.base import ScheduledSequence, TokenLogprobs
from tokenflow.replicas.sampling.params import SamplingParams

_NEG_INF = float("-inf")


def sample(
    logits: torch.Tensor, rows: Seq[ScheduledSequence]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Draw a token for each row of `logits`, float32 `[rows, vocab]` (modified in place)."""
    wants_raw = any(r.params.logprobs is not None for r in rows)
    raw = logits.clone() if wants_raw and _adjusts(rows) else logits
    scores = _adjust(logits, rows)
    tokens = scores.argmax(-1)
    drawn = [i for i, r in enumerate(rows) if not r.params.greedy]
    if drawn:
        tokens[drawn] = _draw(scores[drawn], [rows[i] for i in drawn])
    ids: list[int] = tokens.tolist()
    return ids, _logprobs(raw, rows, ids)


def _adjusts(rows: Seq[ScheduledSequence]) -> bool:
    return any(r.params.penalizes or r.params.logit_bias or r.suppress_ids for r in rows)


def _adjust(logits: torch.Tensor, rows: Seq[ScheduledSequence]) -> torch.Tensor:
    """Penalties, biases and suppressed ids of the rows that ask for them; in place."""
    for i, row in enumerate(rows):
        if row.params.penalizes:
            _penalize(logits[i], row)
        if row.params.logit_bias:
            ids = torch.tensor(list(row.params.logit_bias), device=logits.device)
            logits[i, ids] += torch.tensor(
                list(row.params.logit_bias.values()), dtype=logits.dtype, device=logits.device
            )
        if row.suppress_ids and len(row.suppress_ids) < logits.shape[1]:
            logits[i, list(row.suppress_ids)] = _NEG_INF
    return logits


def _penalize(logits: torch.Tensor, row: ScheduledSequence) -> None:
    """One row, in place. Repetition over prompt and output, the others over the output only."""
    params = row.params
    device = logits.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([*row.prompt_ids, *row.output_ids], device=device).unique()
        old = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if row.output_ids and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(list(row.output_ids), device=device).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(scores: torch.Tensor, rows: Seq[ScheduledSequence]) -> torch.Tensor:
    """Sample rows with temperature > 0; int64 `[rows]`."""
    device = scores.device
    params = [r.params for r in rows]
    temperature = torch.tensor([p.temperature for p in params], device=device)[:, None]
    x = scores / temperature.clamp_min(1e-5)
    filtered = [i for i, p in enumerate(params) if p.filters]
    if filtered:
        x[filtered] = _filter(x[filtered], [params[i] for i in filtered])
    seeds = torch.tensor([p.seed for p in params], device=device)
    positions = torch.tensor([len(r.output_ids) for r in rows], device=device)
    noise = -torch.log(-torch.log(_uniform(seeds, positions, x.shape[1])))
    return (x + noise).argmax(-1)


def _filter(x: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """min-p and top-k, then top-p of what they leave, by one sort; the likeliest token stays."""
    device = x.device
    vocab = x.shape[1]
    top_k = torch.tensor(
        [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params], device=device
    )
    top_p = torch.tensor([p.top_p for p in params], device=device)
    min_p = torch.tensor([p.min_p for p in params], device=device)
    ordered, index = x.sort(dim=-1, descending=True, stable=True)
    drop = torch.arange(vocab, device=device)[None] >= top_k[:, None]
    drop |= ordered - ordered[:, :1] < min_p.log()[:, None]
    probs = ordered.masked_fill(drop, _NEG_INF).softmax(-1)
    # Rounding must not cut the tail of a row that has no top-p.
    drop |= ((probs.cumsum(-1) - probs) >= top_p[:, None]) & (top_p < 1)[:, None]
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, _NEG_INF)
    return torch.empty_like(x).scatter_(1, index, ordered)


def _uniform(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Uniform numbers in (0, 1), float32 `[rows, vocab]`: a splitmix64 hash of (seed, position,
    token id). int64 arithmetic wraps alike on CPU and GPU."""
    x = (seeds * -7046029254386353131 + positions * -4658895280553007687)[:, None]
    x = x + torch.arange(vocab, device=seeds.device) * 7664345821815920749
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    # 23 bits, because with the half added float32 holds them exactly: never 0, never 1.
    return ((x >> 41) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def _logprobs(
    raw: torch.Tensor, rows: Seq[ScheduledSequence], tokens: list[int]
) -> list[TokenLogprobs | None]:
    """From the unmodified distribution, for the rows that ask."""
    out: list[TokenLogprobs | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        n = row.params.logprobs
        if n is None:
            continue
        logprobs = raw[i].log_softmax(-1)
        # topk(0) is empty, which is what logprobs=0 asks for.
        values, ids = logprobs.topk(min(n, logprobs.shape[0]))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        out[i] = TokenLogprobs(float(logprobs[tokens[i]]), top)
    return out
