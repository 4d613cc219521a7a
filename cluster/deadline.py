"""A request's own deadline: what is not there by then is of no use to its client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from tokenflow.replicas.errors import DeadlineExceededError

_Item = TypeVar("_Item")


@contextlib.asynccontextmanager
async def before(deadline_s: float | None) -> AsyncIterator[None]:
    """The body is cancelled at `deadline_s`, on the event loop's clock (the monotonic one), and
    DeadlineExceededError raised. None = no deadline."""
    try:
        async with asyncio.timeout_at(deadline_s):
            yield
    except TimeoutError:
        raise DeadlineExceededError("The request's timeout has passed.") from None


async def until(
    items: AsyncGenerator[_Item, None], deadline_s: float
) -> AsyncGenerator[_Item, None]:
    """The items that come before `deadline_s`. Raises DeadlineExceededError then; `items` is closed
    by that."""
    while True:
        async with before(deadline_s):
            try:
                item = await anext(items)
            except StopAsyncIteration:
                return
        yield item
