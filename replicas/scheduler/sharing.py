"""What tenants on one device owe each other: who comes first when there is not enough for all, and
what a step may carry while the first token of another tenant waits for its end.

A request that comes waits for the step under way, and then for its own. Alone both are short; here
they stay nearly as short whatever others ask for. Pure functions; nothing of it applies to a single
tenant. (Promises and places are given in turn: capacity.py, fairness.py.)
"""

from __future__ import annotations

import numpy as np

from tokenflow.replicas.scheduler.fairness import entitled, turns
from tokenflow.replicas.scheduler.policy import View
from tokenflow.replicas.scheduler.tracker import BoolArray, FloatArray, IntArray

_SOON_S = 1.0
"""Prompts that take longer together make somebody wait."""
_OTHERS_SHARE = 0.5
"""Time that a step may spend on prompts of those who are not favoured, by that of its decoding."""
_MOST_SHARE = 3.0
"""The same while nobody is favoured."""
_OTHERS_STEP = 4.0
"""Most time by which those who are not favoured lengthen a step, by what a step costs with nobody
in it: where that is most of its cost anyway, all of them take part."""
_ROUNDS = 4
"""In about so many steps each of them has had its turn, whatever they cost."""
_OTHERS_WAIT_S = 0.5
"""Time after running dry for which readers who are not favoured make room for first tokens; streams
that are promised nothing, and agents, do it for twice as long."""


def within_share(view: View, remaining: IntArray | FloatArray) -> BoolArray:
    """The requests, shape [len(tracker)], that come first: those that their tenant's fair share of
    the device covers, where there is not enough for all, and nobody where there is. Of a tenant
    those that wait for their first token are covered before those that have begun.

    What a request asks for is the largest of its parts in the memory, in the places and in a second
    of prompts. (In the time that decoding takes its part is smaller than in the memory, as long as
    readers are slower than the device.) `remaining`: tokens still expected of each output.
    [dominant resource fairness: Ghodsi et al., NSDI 2011]
    """
    tracker = view.tracker
    memory = (tracker.context + np.maximum(remaining, 0)) / view.kv_tokens
    prompts = (tracker.context - tracker.computed) * (view.cost.prefill_s(1) / _SOON_S)
    wants = np.maximum(np.maximum(memory, prompts), 1.0 / view.max_num_seqs)
    arrived = tracker.arrived()
    order = arrived[np.argsort(tracker.generated[arrived] > 0, kind="stable")]
    return entitled(tracker.tenant, order, wants * ~tracker.paused, 1.0)


def share_step(
    view: View,
    rows: IntArray,
    pending: IntArray,
    favoured: BoolArray,
    slack_s: FloatArray,
    can_wait: BoolArray,
    limit: int | None,
) -> tuple[IntArray, int | None]:
    """Who of `rows` takes part in the step, prompts in the order in which they are served, and the
    most prompt tokens it carries, `limit` at most.

    Prompts of favoured ones have a step to themselves and those who cannot wait for the next one,
    but for a block of another's prompt. Else prompts come, few at a time, in the order in which
    they would end if every tenant had an equal part of the device [fair sojourns: Friedman and
    Henderson 2003]; and while anybody is favoured the others come as far as a short step carries
    them, who needs a token first. Shapes: `favoured` [len(tracker)]; `pending`, tokens without KV,
    `slack_s`, how long each stream can do without a token, and whether it `can_wait` for longer,
    [len(rows)].
    """
    per_token = view.cost.prefill_s(1)
    if per_token <= 0:
        return rows, limit
    prompt = pending > 1
    own = favoured[rows]
    prompts = _by_turns(view, rows[prompt], pending[prompt], own[prompt])
    decodes, ours = rows[~prompt], own[~prompt]
    slack_s, can_wait = slack_s[~prompt], can_wait[~prompt]
    waits_s = slack_s + _OTHERS_WAIT_S * can_wait
    waiting = int(pending[prompt & own].sum())
    if waiting:
        tokens = waiting if limit is None else min(waiting, limit)
        until_s = tokens * per_token + 2 * _decode_s(view, decodes)
        patience_s = np.where(can_wait, np.inf, slack_s)
        patience_s = np.where(ours, patience_s, waits_s + _OTHERS_WAIT_S)
        if len(prompts) > np.count_nonzero(prompt & own):
            # However many favoured ones come, another's prompt gets on.
            tokens += view.block_size
        return np.concatenate([prompts, decodes[patience_s < until_s]]), tokens
    share = _MOST_SHARE
    if favoured.any():
        share = _OTHERS_SHARE
        others = np.flatnonzero(~ours)
        others = others[np.argsort(waits_s[others], kind="stable")]
        parts = 2 if len(prompts) else 1
        ours[others[: _how_many(view, decodes[others], parts)]] = True
        decodes = decodes[ours]
    decode_s = _decode_s(view, decodes)
    if len(prompts) and decode_s > 0:
        most = max(int(share * decode_s / per_token), view.block_size)
        limit = most if limit is None else min(limit, most)
    return np.concatenate([prompts, decodes]), limit


def _decode_s(view: View, rows: IntArray) -> float:
    return view.cost.step_s(len(rows), float(view.tracker.context[rows].sum()))


def _how_many(view: View, others: IntArray, parts: int) -> int:
    """How many of those who are not favoured decode in a step, in the order given, when they may
    have one of so many equal parts of what they may add to it."""
    fixed, per_sequence, per_read = view.cost.step_terms()
    adds_s = np.cumsum(per_sequence + per_read * view.tracker.context[others])
    if not len(others):
        return 0
    most_s = max(_OTHERS_STEP * fixed, float(adds_s[-1]) / _ROUNDS) / parts
    return max(int(np.searchsorted(adds_s, most_s, side="right")), 1)


def _by_turns(view: View, rows: IntArray, pending: IntArray, own: BoolArray) -> IntArray:
    """Prompts in the order in which they are served, favoured ones (`own`) first."""
    if len(rows) < 2:
        return rows
    asks = pending.astype(np.float64)
    ends = turns(view.tracker.tenant[rows], np.arange(len(rows)), asks) + asks
    return rows[np.lexsort((ends, ~own))]
