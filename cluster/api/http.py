"""What the HTTP routes share: reading a bounded body, noticing that the client left, refusing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse

from tokenflow.cluster.api.errors import error_body
from tokenflow.cluster.api.protocol import too_long
from tokenflow.cluster.limits import Limits

_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """The HTTP client has disconnected."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The request's body. Raises InvalidRequestError (413) as soon as it is too long."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limits.max_body_bytes:
            too_long(limits)
    return bytes(body)


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the client goes (ClientGoneError).

    The body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal(error: Exception) -> JSONResponse:
    """The response for an exception."""
    status, body, headers = error_body(error)
    return JSONResponse(body, status, headers)
