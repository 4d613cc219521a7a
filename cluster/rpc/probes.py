"""What gRPC tools ask any server: is it healthy (grpc.health.v1), what does it serve (reflection).

Serve itself answers reflection in its older form only, v1alpha; the newer one, v1, has the same
messages and is answered here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection

from tokenflow.cluster.rpc.stub import SERVICE

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = "grpc.reflection.v1.ServerReflection"
_WATCH_PERIOD_S = 1.0


def add_reflection_to_server(servicer: Any, server: Any) -> None:
    """For Serve's `grpc_servicer_functions`; health has its own in its package."""
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION, {"ServerReflectionInfo": handler}),)
    )


class Probes:
    """The methods of both services, for the deployment to inherit."""

    healthy: Callable[[], Awaitable[bool]]
    """The deployment's own: whether a request would be served."""

    async def Check(self, request: Any, grpc_context: Any) -> HealthCheckResponse:
        """grpc.health.v1.Health/Check. NOT_FOUND: no such service."""
        if request.service not in _SERVICES:
            message = f"No service {request.service!r}; there are {', '.join(_SERVICES[1:])}."
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            grpc_context.set_details(message)
            raise LookupError(message)
        return HealthCheckResponse(status=await self._status())

    async def List(self, request: Any, grpc_context: Any) -> health_pb2.HealthListResponse:
        """grpc.health.v1.Health/List."""
        status = await self._status()
        return health_pb2.HealthListResponse(
            statuses={name: HealthCheckResponse(status=status) for name in _SERVICES}
        )

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncIterator[HealthCheckResponse]:
        """grpc.health.v1.Health/Watch: the status now and whenever it has changed."""
        if request.service not in _SERVICES:
            yield HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
            await asyncio.Event().wait()  # it never becomes one; the protocol has us stay
        told = None
        while True:
            status = await self._status()
            if status != told:
                told = status
                yield HealthCheckResponse(status=status)
            await asyncio.sleep(_WATCH_PERIOD_S)

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[Any], grpc_context: Any
    ) -> AsyncIterator[Any]:
        """grpc.reflection.v1.ServerReflection/ServerReflectionInfo."""
        async for answer in _REFLECTION.ServerReflectionInfo(requests, grpc_context):
            yield answer

    async def _status(self) -> Any:
        return (
            HealthCheckResponse.SERVING if await self.healthy() else HealthCheckResponse.NOT_SERVING
        )


_SERVICES = ("", SERVICE.full_name, HEALTH)
"""Empty: the server as a whole."""
_REFLECTION = reflection.ReflectionServicer(_SERVICES[1:])
