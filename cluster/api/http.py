"""What the HTTP routes share: reading a bounded body, refusing."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from fastapi import Request
from fastapi.responses import JSONResponse

from tokenflow.cluster.api.errors import error_body
from tokenflow.cluster.api.protocol import Given, too_long
from tokenflow.cluster.limits import Limits
from tokenflow.replicas.errors import InvalidRequestError


async def read_body(request: Request, limits: Limits) -> bytes:
    """The request's body. Raises InvalidRequestError: 413 as soon as it is too long, or says that
    it will be, 408 when it does not come."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.max_body_bytes:
        too_long(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.max_body_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.max_body_bytes:
                    too_long(limits)
    except TimeoutError:
        _too_slow(limits)
    return bytes(body)


def _too_slow(limits: Limits) -> NoReturn:
    raise InvalidRequestError(
        f"The body had not arrived after {limits.max_body_s:g} s.",
        code="request_timeout",
        status=408,
    )


def given(request: Request) -> Given:
    """What the headers say of how the answer is to be delivered."""
    headers = request.headers
    return Given(
        rate=headers.get("x-token-rate"),
        request_id=headers.get("x-request-id"),
        resumable=headers.get("x-resumable"),
    )


def refusal(error: Exception) -> JSONResponse:
    """The response for an exception."""
    status, body, headers = error_body(error)
    return JSONResponse(body, status, headers)
