"""Copy or compute."""

import pytest

from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.restore import copy_tail, load_prefix


def cost(*, prefill_s=0.001, load_s=0.002, offload_s=0.004) -> CostModel:
    """Seconds per token and per block."""
    model = CostModel()
    model.observe_step(0, 0, 100, 100 * prefill_s)
    model.observe_load(10, 10 * load_s)
    model.observe_offload(10, 10 * offload_s)
    return model


@pytest.mark.parametrize(
    ("queue", "others", "load"),
    [
        (0, 0, True),  # 10 blocks: 0.02 s against 160 tokens: 0.16 s
        (69, 0, True),
        (71, 0, False),  # 81 blocks: 0.162 s
        (71, 1, True),  # two would wait for the prefill
        (400, 4, False),
    ],
)
def test_a_prefix_is_loaded_unless_computing_costs_the_readers_less(queue, others, load):
    assert load_prefix(cost(), 10, 160, load_queue=queue, others=others) is load


def test_a_slow_link_makes_computing_the_better_way():
    assert not load_prefix(cost(load_s=0.1), 10, 160, load_queue=0, others=0)


def test_a_tail_is_copied_for_both_ways_and_both_queues():
    def copied(offload_queue=0, load_queue=0, tokens=16, others=0):
        return copy_tail(
            cost(),
            1,
            tokens,
            offload_queue=offload_queue,
            load_queue=load_queue,
            others=others,
        )

    assert copied()  # 0.006 s against 0.016 s
    assert not copied(tokens=5)
    assert not copied(offload_queue=3)  # 0.018 s
    assert not copied(load_queue=6)  # 0.018 s
    assert copied(offload_queue=3, others=1)


def test_until_a_prefill_was_seen_nothing_is_computed_twice():
    assert load_prefix(CostModel(), 10, 160, load_queue=1000, others=0)
    assert copy_tail(CostModel(), 1, 1, offload_queue=9, load_queue=9, others=0)
