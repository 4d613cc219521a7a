"""Copy or compute: by which way KV comes back at the least cost to readers.

[TokenFlow §4.2.3] compares t_IO = evict queue + evict + load queue + load with the time of a
prefill. But a copy keeps only its own reader waiting, while a prefill takes the device from
everybody on it; so its time is counted once for each of them. From the measured rates and live
queues.

Both times grow with the number of tokens alike, so of one unbroken stretch either all is copied or
all is computed. Where the stretches differ (the front is on the host already, the tail is not),
each is decided for itself: load the prefix and recompute the tail is what comes of it.
"""

from __future__ import annotations

from tokenflow.replicas.scheduler.cost import CostModel, LinkCost


def copy_tail(
    cost: CostModel, blocks: int, tokens: int, *, offload_queue: int, load_queue: int, others: int
) -> bool:
    """Whether the last `blocks` of a victim, `tokens` tokens that are not on the host yet, should
    be copied there, rather than be dropped and computed again.

    Queues are in blocks; `others` share the device. True while the cost of computing is unknown.
    """
    compute_s = cost.prefill_s(tokens) * (1 + others)
    copy_s = cost.offload_s(offload_queue + blocks) + cost.load_s(load_queue + blocks)
    return compute_s <= 0 or copy_s <= compute_s


def load_prefix(cost: CostModel, blocks: int, tokens: int, *, load_queue: int, others: int) -> bool:
    """Whether `blocks` on the host, `tokens` tokens, should be loaded rather than computed."""
    compute_s = cost.prefill_s(tokens) * (1 + others)
    return compute_s <= 0 or cost.load_s(load_queue + blocks) <= compute_s


def fetch_prefix(cost: CostModel, link: LinkCost, blocks: int, tokens: int, *, others: int) -> bool:
    """Whether `blocks` in another node's store, `tokens` tokens, should be fetched and loaded
    rather than computed."""
    compute_s = cost.prefill_s(tokens) * (1 + others)
    return compute_s <= 0 or link.fetch_s(blocks) + cost.load_s(blocks) <= compute_s
