"""Health and reflection on the cluster's gRPC port, as grpcurl and Kubernetes' probes use them."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as reflected
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as V1ALPHA

from tokenflow.cluster.rpc.probes import HEALTH, REFLECTION
from tokenflow.cluster.rpc.stub import SERVICE

pytestmark = pytest.mark.cluster


@pytest.fixture
async def channel(server):
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        yield channel


async def test_a_serving_cluster_is_healthy(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE.full_name):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watched = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
    watched.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "Traceback" not in caught.value.details()


@pytest.mark.parametrize("service", [REFLECTION, V1ALPHA])
async def test_reflection_describes_the_service_in_both_versions(channel, service):
    ask = channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        request_serializer=reflected.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflected.ServerReflectionResponse.FromString,
    )
    requests = [
        reflected.ServerReflectionRequest(list_services=""),
        reflected.ServerReflectionRequest(file_containing_symbol=SERVICE.full_name),
        reflected.ServerReflectionRequest(file_containing_symbol=HEALTH),
    ]
    listed, *described = [answer async for answer in ask(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICE.full_name, HEALTH} <= names
    assert all(answer.HasField("file_descriptor_response") for answer in described)


async def test_one_connection_carries_many_streams(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    watched = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(150)]
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(call.read() for call in watched))
    for call in watched:
        call.cancel()
    assert {answer.status for answer in answers} == {health_pb2.HealthCheckResponse.SERVING}
