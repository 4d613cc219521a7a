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


def within_share(view: View, remaining: IntArray | FloatArray) -> BoolArray:
    """The requests, shape [len(tracker)], that come first: those that their tenant's fair share of
    the device covers, where there is not enough for all, and nobody where there is.

    What a request asks for is the largest of its parts in the memory, in the places and in a second
    of prompts. (In the time that decoding takes its part is smaller than in the memory, as long as
    readers are slower than the device.) `remaining`: tokens still expected of each output.
    [dominant resource fairness: Ghodsi et al., NSDI 2011]
    """
    tracker = view.tracker
    memory = (tracker.context + np.maximum(remaining, 0)) / view.kv_tokens
    prompts = (tracker.context - tracker.computed) * (view.cost.prefill_s(1) / _SOON_S)
    wants = np.maximum(np.maximum(memory, prompts), 1.0 / view.max_num_seqs)
    return entitled(tracker.tenant, tracker.arrived(), wants * ~tracker.paused, 1.0)


def share_step(
    view: View,
    rows: IntArray,
    pending: IntArray,
    favoured: BoolArray,
    patience_s: FloatArray,
    limit: int | None,
) -> tuple[IntArray, int | None]:
    """Who of `rows` takes part in the step, prompts in the order in which they are served, and the
    most prompt tokens it carries, `limit` at most.

    Prompts of favoured ones that fit have a step to themselves and those who cannot wait for the
    next one. Else prompts come, few at a time, in the order in which they would end if every tenant
    had an equal part of the device [fair sojourns: Friedman and Henderson 2003]. Shapes:
    `favoured` [len(tracker)]; `pending`, tokens without KV, and `patience_s`, how long each stream
    can do without a token, [len(rows)].
    """
    prompt = pending > 1
    per_token = view.cost.prefill_s(1)
    if per_token <= 0 or not prompt.any():
        return rows, limit
    decodes = rows[~prompt]
    decode_s = view.cost.step_s(len(decodes), float(view.tracker.context[decodes].sum()))
    own = favoured[rows]
    first = prompt & own
    waiting = int(pending[first].sum())
    if waiting and (limit is None or waiting <= limit):
        until_s = waiting * per_token + 2 * decode_s
        return rows[first | (~prompt & (own | (patience_s < until_s)))], waiting
    prompts = rows[prompt]
    asks = pending[prompt].astype(np.float64)
    ends = turns(view.tracker.tenant[prompts], np.arange(len(prompts)), asks) + asks
    prompts = prompts[np.lexsort((ends, ~own[prompt]))]
    if not waiting and decode_s > 0:
        share = _OTHERS_SHARE if favoured.any() else _MOST_SHARE
        most = max(int(share * decode_s / per_token), view.block_size)
        limit = most if limit is None else min(limit, most)
    return np.concatenate([prompts, decodes]), limit
