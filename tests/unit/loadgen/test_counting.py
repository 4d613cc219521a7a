"""Tokens by usage, by tokenizer, and never by messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.cluster.config import embedded_model
from tokenflow.loadgen.metrics import LEFT, StreamRecord
from tokenflow.loadgen.prompts import load_tokenizer
from tokenflow.loadgen.targets.counting import TokenCounter, spread


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": tokens}


def count(events, tokenizer=None, **fields) -> StreamRecord:
    record = StreamRecord(20.0, 0.0, finish_reason="length")
    for name, value in fields.items():
        setattr(record, name, value)
    counter = TokenCounter(record, tokenizer)
    for event in events:
        counter.event(*event)
    counter.finish()
    return record


def test_a_running_usage_says_it_all():
    record = count([(1, "a", usage(1)), (2, "", usage(1)), (3, "", usage(4)), (4, "bc", usage(6))])
    assert record.arrivals == [(1, 1), (3, 3), (4, 2)]
    assert (record.text, record.prompt_tokens) == ("abc", 3)


def test_a_final_usage_is_spread_over_the_text():
    record = count([(1, "ab", None), (2, "abcdef", None), (3, "", None), (4, "", usage(10))])
    assert record.arrivals == [(1, 3), (2, 7)]


def test_a_tokenizer_counts_where_the_tokens_end():
    tokenizer = load_tokenizer(str(embedded_model()))
    text = "the old house by the river"
    whole = tokenizer.encode(text, add_special_tokens=False)
    record = count([(1, text[:6], None), (2, text[6:14], None), (3, text[14:], None)], tokenizer)
    assert record.tokens == len(whole.ids)
    for limit, at in ((6, 1), (14, 2), (len(text), 3)):
        arrived = sum(n for t, n in record.arrivals if t <= at)
        assert arrived == sum(end <= limit for _, end in whole.offsets)


def test_the_server_is_believed_before_a_tokenizer():
    """Text that is tokenized again need not have the tokens it was made of."""
    tokenizer = load_tokenizer(str(embedded_model()))
    record = count([(1, "the old", None), (2, "", usage(99))], tokenizer)
    assert record.tokens == 99


def test_without_both_it_is_an_error():
    record = count([(1, "ab", None), (2, "cd", None)])
    assert record.error == TokenCounter.NO_USAGE


@pytest.mark.parametrize(
    ("reason", "error"), [(None, "cut"), (LEFT, None)], ids=["failed", "left"]
)  # fmt: skip
def test_what_broke_off_before_the_usage_has_a_token_a_message_at_least(reason, error):
    record = count([(1, "ab", None), (2, "cd", None)], finish_reason=reason, error=error)
    assert record.arrivals == [(1, 1), (2, 1)] and record.error == error


def test_nothing_was_said():
    assert count([(1, "", None)]).arrivals == []
    assert count([(1, "", None), (2, "", usage(0))]).arrivals == []


@pytest.mark.parametrize("usage", [{"completion_tokens": "x"}, {}, 5])
def test_a_usage_that_is_none(usage):
    with pytest.raises((TypeError, ValueError, KeyError)):
        count([(1, "a", usage)] if usage != {} else [(1, "a", {"total": 3})])


@given(st.integers(0, 500), st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=40))
def test_nothing_is_lost_in_spreading(total, texts):
    counts = spread(total, texts)
    assert sum(counts) == total and min(counts) >= 0 and len(counts) == len(texts)
    assert (counts[0] > 0) == (total > 0)
    if total >= len(texts):
        assert min(counts) >= 1
