"""Health and reflection as gRPC tools ask for them."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as reflected

from tokenflow.cluster.rpc import probes
from tokenflow.cluster.rpc.probes import HEALTH, REFLECTION, Probes, add_reflection_to_server
from tokenflow.cluster.rpc.stub import SERVICE

Status = health_pb2.HealthCheckResponse


class Server(Probes):
    """As the ingress is one, with replicas that come and go."""

    replicas = 1

    async def healthy(self) -> bool:
        return self.replicas > 0


@pytest.fixture
async def server(monkeypatch):
    monkeypatch.setattr(probes, "_WATCH_PERIOD_S", 0.02)
    servicer = Server()
    listening = grpc.aio.server()
    add_reflection_to_server(servicer, listening)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, listening)
    port = listening.add_insecure_port("127.0.0.1:0")
    await listening.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        servicer.channel = channel
        servicer.stub = health_pb2_grpc.HealthStub(channel)
        yield servicer
    await listening.stop(None)


@pytest.mark.parametrize("service", ["", SERVICE.full_name, HEALTH])
async def test_serving_only_while_a_replica_answers(server, service):
    request = health_pb2.HealthCheckRequest(service=service)
    assert (await server.stub.Check(request)).status == Status.SERVING
    server.replicas = 0
    assert (await server.stub.Check(request)).status == Status.NOT_SERVING
    listed = await server.stub.List(health_pb2.HealthListRequest())
    assert listed.statuses[service].status == Status.NOT_SERVING


async def test_unknown_services(server):
    request = health_pb2.HealthCheckRequest(service="tokenflow.v9.Inference")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.stub.Check(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert SERVICE.full_name in caught.value.details()
    watched = server.stub.Watch(request)
    assert (await watched.read()).status == Status.SERVICE_UNKNOWN
    watched.cancel()


async def test_a_watcher_hears_of_changes_only(server):
    watched = server.stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watched.read()).status == Status.SERVING
    following = asyncio.ensure_future(watched.read())
    done, _ = await asyncio.wait([following], timeout=0.2)
    assert not done
    server.replicas = 0
    assert (await following).status == Status.NOT_SERVING
    watched.cancel()


async def test_reflection_names_the_services_and_describes_them(server):
    ask = server.channel.stream_stream(
        f"/{REFLECTION}/ServerReflectionInfo",
        request_serializer=reflected.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflected.ServerReflectionResponse.FromString,
    )
    requests = [
        reflected.ServerReflectionRequest(list_services=""),
        reflected.ServerReflectionRequest(file_containing_symbol=SERVICE.full_name),
        reflected.ServerReflectionRequest(file_containing_symbol="no.such.Thing"),
    ]
    listed, described, unknown = [answer async for answer in ask(iter(requests))]
    names = [service.name for service in listed.list_services_response.service]
    assert set(names) == {SERVICE.full_name, HEALTH}
    files = described.file_descriptor_response.file_descriptor_proto
    services = [FileDescriptorProto.FromString(file).service for file in files]
    methods = {method.name for (service,) in services for method in service.method}
    assert methods == {method.name for method in SERVICE.methods}
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
