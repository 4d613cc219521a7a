"""A request's own deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from tokenflow.cluster.api.protocol import parse_completion, text_timeout
from tokenflow.cluster.deadline import before, until
from tokenflow.cluster.limits import Limits
from tokenflow.replicas.errors import DeadlineExceededError, InvalidRequestError

BODY = {"model": "m", "prompt": "x"}


class Items:
    """Two items, then silence."""

    closed = False

    async def __call__(self) -> AsyncGenerator[int, None]:
        try:
            yield 1
            yield 2
            await asyncio.Event().wait()
        finally:
            self.closed = True


async def test_what_comes_before_the_deadline_is_passed_on_and_the_source_closed_at_it():
    source, seen = Items(), []
    with pytest.raises(DeadlineExceededError, match="timeout has passed"):
        async for item in until(source(), time.monotonic() + 0.05):
            seen.append(item)
    assert seen == [1, 2] and source.closed


async def test_without_a_deadline_items_end_by_themselves():
    async def few() -> AsyncGenerator[int, None]:
        yield 1

    assert [item async for item in until(few(), None)] == [1]


async def test_a_timeout_of_the_body_itself_is_cut_short():
    with pytest.raises(DeadlineExceededError):
        async with before(time.monotonic() + 0.02):
            await asyncio.Event().wait()


def parse(**changes):
    return parse_completion(BODY | changes, model_names=["m"], limits=Limits())


def test_a_timeout_is_seconds_above_zero():
    assert parse(timeout=2).timeout_s == 2 and parse().timeout_s is None
    assert text_timeout("1.5", "The header", Limits()) == 1.5
    for wrong in (0, -1, 1e9):
        with pytest.raises(InvalidRequestError, match="timeout must be a number of seconds"):
            parse(timeout=wrong)
    for text in ("soon", "nan", "inf", "-1", ""):
        with pytest.raises(InvalidRequestError, match="The header must be a number"):
            text_timeout(text, "The header", Limits())
