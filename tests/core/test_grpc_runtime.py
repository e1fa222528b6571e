"""Errors leave a server as statuses; health and reflection answer; over a real socket."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from core.errors import InvalidRequestError, OverloadedError
from core.grpc_runtime import GrpcServer, channel, request_deadline
from headrace.v1 import recommender_service_pb2 as pb
from headrace.v1 import recommender_service_pb2_grpc as pb_grpc

SERVICE = "headrace.v1.RecommenderService"


class Raising(pb_grpc.RecommenderServiceServicer):
    async def Recommend(self, request, context):
        raise {"bad": InvalidRequestError("user_id", "is bad"), "full": OverloadedError("full")}.get(
            request.user_id, RuntimeError("a bug")
        )

    async def GetModelInfo(self, request, context):
        return pb.GetModelInfoResponse(item_count=int(request_deadline(context, 250).remaining_ms()))


@pytest.fixture
async def server():
    server = GrpcServer("127.0.0.1", 0, [SERVICE])
    pb_grpc.add_RecommenderServiceServicer_to_server(Raising(), server.aio)
    await server.start()
    yield server
    await server.stop(0)


@pytest.fixture
async def client(server):
    async with channel(f"127.0.0.1:{server.port}") as connection:
        yield connection


@pytest.mark.parametrize(
    ("user_id", "status", "said"),
    [
        ("bad", grpc.StatusCode.INVALID_ARGUMENT, "user_id: is bad"),
        ("full", grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        ("bug", grpc.StatusCode.INTERNAL, "unexpected RuntimeError"),
    ],
)
async def test_errors_become_their_status(client, user_id, status, said) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pb_grpc.RecommenderServiceStub(client).Recommend(pb.RecommendRequest(user_id=user_id))
    assert caught.value.code() is status
    assert said in (caught.value.details() or "")


async def test_the_deadline_is_the_callers_or_the_default(client) -> None:
    stub = pb_grpc.RecommenderServiceStub(client)
    assert (await stub.GetModelInfo(pb.GetModelInfoRequest())).item_count in range(200, 251)
    assert (await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=5)).item_count in range(4000, 5100)


async def test_health_follows_set_serving(server, client) -> None:
    health = health_pb2_grpc.HealthStub(client)
    ask = health_pb2.HealthCheckRequest(service=SERVICE)
    assert (await health.Check(ask)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.set_serving(True)
    assert (await health.Check(ask)).status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(client) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(client)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    async for answer in call:
        assert SERVICE in [service.name for service in answer.list_services_response.service]
        break


@pytest.mark.parametrize("symbol", [SERVICE, f"{SERVICE}.Recommend", "headrace.v1.RecommendRequest"])
async def test_reflection_finds_services_methods_and_messages(client, symbol) -> None:
    assert (await _reflected(client, symbol)).HasField("file_descriptor_response")


@pytest.mark.parametrize("symbol", ["nothing", "headrace.v1.Nothing", f"{SERVICE}.Nothing"])
async def test_reflection_says_what_is_not_there(client, symbol) -> None:
    assert (await _reflected(client, symbol)).error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def _reflected(client, symbol):
    stub = reflection_pb2_grpc.ServerReflectionStub(client)
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    return await stub.ServerReflectionInfo(iter([request])).read()


async def test_a_taken_port_is_an_error_not_a_share(server) -> None:
    second = GrpcServer("127.0.0.1", server.port, [])
    with pytest.raises(OSError, match="cannot listen"):
        await second.start()
