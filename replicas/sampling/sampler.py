"""The batched sampler: one token per row, from logits and each row's parameters.

Random numbers are a hash of (seed, position, token id), not the state of a generator: the same
request draws the same tokens whatever else is in the batch, however often it was preempted, and on
whatever replica it continues. A draw is `argmax(logits / T + Gumbel noise)`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from tokenflow.replicas.executor.base import UNKNOWN, ScheduledSequence, TokenLogprobs
from tokenflow.replicas.executor.device import has_triton
from tokenflow.replicas.executor.transfer import upload
from tokenflow.replicas.sampling.params import SamplingParams

_NEG_INF = float("-inf")


@dataclass(slots=True)
class Drawn:
    """What was drawn for each row, on the device still."""

    tokens: torch.Tensor
    """int64 `[rows]`."""
    logprob_rows: list[int]
    """Those that ask for log-probabilities."""
    logprob_counts: list[int]
    """How many alternatives each of them asks for."""
    logprobs: list[torch.Tensor]
    """Empty, or: of the chosen tokens `[asking, 1]`; the likeliest `[asking, most]`, their ids."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All there is to bring to the host for `read`."""
        return [self.tokens, *self.logprobs]

    def read(self, tensors: Seq[torch.Tensor]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Tokens and log-probabilities by row, from `tensors` on the host."""
        tokens: list[int] = tensors[0].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if self.logprob_rows:
            chosen, values, ids = (tensor.tolist() for tensor in tensors[1:])
            for k, (i, n) in enumerate(zip(self.logprob_rows, self.logprob_counts, strict=True)):
                top = list(zip(ids[k][:n], values[k][:n], strict=True))
                logprobs[i] = TokenLogprobs(chosen[k][0], top)
        return tokens, logprobs


def sample(
    logits: torch.Tensor, rows: Seq[ScheduledSequence]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Draw a token for each row of `logits`, float32 `[rows, vocab]` (modified in place)."""
    drawn = draw(logits, rows)
    return drawn.read([tensor.cpu() for tensor in drawn.tensors])


def draw(
    logits: torch.Tensor, rows: Seq[ScheduledSequence], last: torch.Tensor | None = None
) -> Drawn:
    """As `sample`, but the host waits for nothing. `last`, int64 `[rows]`, are the tokens that are
    UNKNOWN in the rows' output; only looked at where there are such."""
    asking = [i for i, r in enumerate(rows) if r.params.logprobs is not None]
    raw = logits.clone() if asking and _adjusts(rows) else logits
    scores = _adjust(logits, rows, last)
    tokens = scores.argmax(-1)
    random = [i for i, r in enumerate(rows) if not r.params.greedy]
    if len(random) == len(rows):
        tokens = _draw(scores, rows)
    elif random:
        (index,) = upload([np.array(random)], logits.device)
        chosen = _draw(scores.index_select(0, index), [rows[i] for i in random])
        tokens.index_copy_(0, index, chosen)
    counts = [min(rows[i].params.logprobs or 0, logits.shape[1]) for i in asking]
    logprobs = _logprobs(raw, asking, max(counts), tokens) if asking else []
    return Drawn(tokens, asking, counts, logprobs)


def _adjusts(rows: Seq[ScheduledSequence]) -> bool:
    return any(r.params.penalizes or r.params.logit_bias or r.suppress_ids for r in rows)


def _adjust(
    logits: torch.Tensor, rows: Seq[ScheduledSequence], last: torch.Tensor | None
) -> torch.Tensor:
    """Penalties, then biases, then suppressed ids of the rows that ask for them: of all at once, so
    that it takes as many launches for a batch as for one. In place."""
    penalized = [i for i, row in enumerate(rows) if row.params.penalizes]
    if penalized:
        _penalize(logits, rows, penalized, last)
    vocab = logits.shape[1]
    biased, amounts, forbidden = [], [], []
    for i, row in enumerate(rows):
        bias = row.params.logit_bias
        if bias:
            biased.append(i * vocab + np.array(list(bias), np.int64))
            amounts.append(np.array(list(bias.values()), np.float32))
        if row.suppress_ids and len(row.suppress_ids) < vocab:
            forbidden.append(i * vocab + np.array(row.suppress_ids, np.int64))
    flat = logits.view(-1)
    if biased:
        ids, values = upload([np.concatenate(biased), np.concatenate(amounts)], logits.device)
        flat.index_add_(0, ids, values)
    if forbidden:
        (ids,) = upload([np.concatenate(forbidden)], logits.device)
        flat.index_fill_(0, ids, _NEG_INF)
    return logits


def _penalize(
    logits: torch.Tensor,
    rows: Seq[ScheduledSequence],
    penalized: list[int],
    last: torch.Tensor | None,
) -> None:
    """Some rows, in place. Repetition over prompt and output, the others over the output only."""
    vocab = logits.shape[1]
    prompts, outputs, awaited, params = [], [], [], []
    for k, i in enumerate(penalized):
        known = rows[i].output_ids
        if known and known[-1] == UNKNOWN:
            known = known[:-1]
            awaited.append((k, i))
        prompts.append(k * vocab + np.array(rows[i].prompt_ids, np.int64))
        outputs.append(k * vocab + np.array(known, np.int64))
        p = rows[i].params
        params.append((p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
    index, prompt, output, late, factors = upload(
        [
            np.array(penalized, np.int64),
            np.concatenate(prompts),
            np.concatenate(outputs),
            np.array(awaited, np.int64).reshape(-1, 2),
            np.array(params, np.float32),
        ],
        logits.device,
    )
    if awaited:
        assert last is not None
        output = torch.cat([output, late[:, 0] * vocab + last.index_select(0, late[:, 1])])
    scores = logits.index_select(0, index)
    counts = torch.zeros_like(scores)
    counts.view(-1).index_add_(0, output, torch.ones_like(output, dtype=counts.dtype))
    drawn = counts > 0
    seen = drawn.clone()
    seen.view(-1).index_fill_(0, prompt, True)
    repetition, presence, frequency = factors.T[:, :, None]
    changed = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(seen, changed, scores)
    scores -= torch.where(drawn, presence + frequency * counts, 0.0)
    logits.index_copy_(0, index, scores)


def _draw(scores: torch.Tensor, rows: Seq[ScheduledSequence]) -> torch.Tensor:
    """Sample rows with temperature > 0; int64 `[rows]`."""
    params = [r.params for r in rows]
    temperature, seeds, positions = upload(
        [
            np.array([p.temperature for p in params], np.float32),
            np.array([p.seed for p in params], np.int64),
            np.array([len(r.output_ids) for r in rows], np.int64),
        ],
        scores.device,
    )
    x = scores / temperature[:, None].clamp_min(1e-5)
    filtered = [i for i, p in enumerate(params) if p.filters]
    if len(filtered) == len(rows):
        x = _filter(x, params)
    elif filtered:
        (index,) = upload([np.array(filtered)], scores.device)
        x.index_copy_(0, index, _filter(x.index_select(0, index), [params[i] for i in filtered]))
    bases = seeds * -7046029254386353131 + positions * -4658895280553007687
    if has_triton(x.device):
        from tokenflow.replicas.executor.fused_kernels import noisy_argmax

        return noisy_argmax(x, bases)
    return (x + gumbel(bases, x.shape[1])).argmax(-1)


def _filter(x: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """min-p and top-k, then top-p of what they leave, by one sort; the likeliest token stays."""
    device = x.device
    vocab = x.shape[1]
    top_k, top_p, min_p = upload(
        [
            np.array([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params], np.int64),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
        ],
        device,
    )
    ordered, index = x.sort(dim=-1, descending=True, stable=True)
    drop = torch.arange(vocab, device=device)[None] >= top_k[:, None]
    drop |= ordered - ordered[:, :1] < min_p.log()[:, None]
    probs = ordered.masked_fill(drop, _NEG_INF).softmax(-1)
    # Rounding must not cut the tail of a row that has no top-p.
    drop |= ((probs.cumsum(-1) - probs) >= top_p[:, None]) & (top_p < 1)[:, None]
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, _NEG_INF)
    return torch.empty_like(x).scatter_(1, index, ordered)


def gumbel(bases: torch.Tensor, vocab: int) -> torch.Tensor:
    """Gumbel noise, float32 `[rows, vocab]`, of uniform numbers in (0, 1): a splitmix64 hash of
    `bases`, int64 `[rows]`, and the token id. int64 arithmetic wraps alike on CPU and GPU."""
    x = bases[:, None] + torch.arange(vocab, device=bases.device) * 7664345821815920749
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    # 23 bits, because with the half added float32 holds them exactly: never 0, never 1.
    uniform = ((x >> 41) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return -torch.log(-torch.log(uniform))


def _logprobs(
    raw: torch.Tensor, asking: list[int], most: int, tokens: torch.Tensor
) -> list[torch.Tensor]:
    """`Drawn.logprobs`, from the unmodified distribution."""
    (index,) = upload([np.array(asking)], raw.device)
    logprobs = raw.index_select(0, index).log_softmax(-1)
    chosen = logprobs.gather(1, tokens.index_select(0, index)[:, None])
    # topk(0) is empty, which is what logprobs=0 asks for.
    return [chosen, *logprobs.topk(most)]
