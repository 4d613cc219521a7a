"""How a step is packed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.support.views import PREEMPTED, RUNNING, batch, sequence, view
from tokenflow.replicas.scheduler.policy import Plan, compose_batch


def decoding(count: int) -> list:
    return [sequence(f"d{i}", output=5, state=RUNNING) for i in range(count)]


def composed(*sequences, budget: int, **options) -> dict[str, int]:
    made = view(*sequences, max_batch_tokens=budget)
    rows = np.arange(len(sequences))
    return batch(Plan(batch=compose_batch(made, rows, **options)))


def test_decodes_come_first_and_prefills_share_the_rest_in_order():
    first = sequence("p", prompt=12, state=RUNNING, computed=2)
    second = sequence("q", prompt=60, state=RUNNING, computed=0)
    decodes = {f"d{i}": 1 for i in range(4)}
    assert composed(*decoding(4), first, second, budget=20) == {**decodes, "p": 10, "q": 6}
    assert composed(*decoding(4), first, second, budget=14) == {**decodes, "p": 10}


def test_prefill_first_leaves_the_decodes_out_while_there_is_a_prefill():
    prefill = sequence("p", prompt=60, state=RUNNING, computed=0)
    assert composed(*decoding(4), prefill, budget=20, prefill_first=True) == {"p": 20}
    assert composed(*decoding(2), budget=20, prefill_first=True) == {"d0": 1, "d1": 1}


def test_prefill_tokens_limit_prefills_and_nothing_else():
    prefill = sequence("p", prompt=60, state=RUNNING, computed=0)
    assert composed(*decoding(2), prefill, budget=20, prefill_tokens=7) == {
        "d0": 1,
        "d1": 1,
        "p": 7,
    }
    assert composed(*decoding(2), budget=20, prefill_tokens=0) == {"d0": 1, "d1": 1}


def test_more_decodes_than_the_budget_take_turns_by_place():
    assert composed(*decoding(5), budget=3) == {"d0": 1, "d1": 1, "d2": 1}


def test_a_dropped_sequence_is_prefilled_from_its_first_token():
    # Until the plan is applied its KV is still on the host; the plan has given it up.
    dropped = sequence("x", prompt=10, output=3, state=PREEMPTED)
    assert composed(*decoding(1), dropped, budget=20) == {"d0": 1, "x": 13}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39), st.booleans()), max_size=12),
    st.integers(1, 50),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, 30)),
)
def test_no_step_goes_over_its_limits(specs, budget, prefill_first, prefill_tokens):
    sequences = []
    for i, (prompt, computed, decodes) in enumerate(specs):
        computed = min(computed, prompt - 1)
        kind = {"output": 1} if decodes else {"computed": computed}
        sequences.append(sequence(f"{i}", prompt=prompt, state=RUNNING, **kind))
    made = composed(
        *sequences, budget=budget, prefill_first=prefill_first, prefill_tokens=prefill_tokens
    )
    assert sum(made.values()) <= budget
    by_name = {seq.request_id: seq for seq in sequences}
    prefills = [n for name, n in made.items() if by_name[name].pending_tokens > 1]
    if prefill_tokens is not None:
        assert sum(prefills) <= prefill_tokens
    assert all(1 <= n <= by_name[name].pending_tokens for name, n in made.items())
    # Nobody is left out while there is room.
    if prefill_tokens is None and not prefill_first:
        assert sum(made.values()) == min(budget, sum(s.pending_tokens for s in sequences))
