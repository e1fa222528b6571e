"""Errors leave a server as statuses; health and reflection answer; over a real socket."""

import asyncio
import threading
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from core.errors import InvalidRequestError, OverloadedError
from core.grpc_runtime import GrpcServer, blocking_channel, channel, request_deadline
from headrace.v1 import recommender_service_pb2 as pb
from headrace.v1 import recommender_service_pb2_grpc as pb_grpc

SERVICE = "headrace.v1.RecommenderService"


class Raising(pb_grpc.RecommenderServiceServicer):
    async def Recommend(self, request, context):
        raise {"bad": InvalidRequestError("user_id", "is bad"), "full": OverloadedError("full")}.get(
            request.user_id, RuntimeError("a bug")
        )

    explaining = asyncio.Event()

    async def Explain(self, request, context):
        self.explaining.set()
        await asyncio.sleep(60)

    async def GetModelInfo(self, request, context):
        return pb.GetModelInfoResponse(item_count=int(request_deadline(context, 250).remaining_ms()))


@pytest.fixture
async def server():
    server = GrpcServer("127.0.0.1", 0, [SERVICE])
    pb_grpc.add_RecommenderServiceServicer_to_server(Raising(), server.grpc)
    server.start()
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


async def test_calls_are_taken_in_while_the_loop_is_busy() -> None:
    entered: list[str] = []
    seen_by_the_first: list[int] = []
    loop_is_held, may_go_on = threading.Event(), threading.Event()

    class Busy(pb_grpc.RecommenderServiceServicer):
        async def Recommend(self, request, context):
            if request.user_id == "holds":
                loop_is_held.set()
                may_go_on.wait(10)
                return pb.RecommendResponse()
            entered.append(request.user_id)
            # All that wait for the loop have had their turn by the next one.
            await asyncio.sleep(0)
            seen_by_the_first.append(len(entered))
            return pb.RecommendResponse()

    def crowd(port: int) -> None:
        with blocking_channel(f"127.0.0.1:{port}") as connection:
            recommend = pb_grpc.RecommenderServiceStub(connection).Recommend
            holding = recommend.future(pb.RecommendRequest(user_id="holds"), timeout=20)
            assert loop_is_held.wait(10)
            calls = [recommend.future(pb.RecommendRequest(user_id="waits"), timeout=20) for _ in range(20)]
            # Those behind them are answered by gRPC's threads: by then the calls have been taken in.
            check = health_pb2_grpc.HealthStub(connection).Check
            for _ in range(20):
                check(health_pb2.HealthCheckRequest(), timeout=10)
            may_go_on.set()
            for call in (holding, *calls):
                call.result()

    server = GrpcServer("127.0.0.1", 0, [SERVICE])
    pb_grpc.add_RecommenderServiceServicer_to_server(Busy(), server.grpc)
    server.start()
    await asyncio.to_thread(crowd, server.port)
    await server.stop(0)
    assert seen_by_the_first[0] == 20


@pytest.mark.parametrize("ends", ["deadline", "cancel"])
async def test_work_ends_with_its_call(ends) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    class Slow(pb_grpc.RecommenderServiceServicer):
        async def Recommend(self, request, context):
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

    server = GrpcServer("127.0.0.1", 0, [SERVICE])
    pb_grpc.add_RecommenderServiceServicer_to_server(Slow(), server.grpc)
    server.start()
    async with channel(f"127.0.0.1:{server.port}") as connection:
        call = pb_grpc.RecommenderServiceStub(connection).Recommend(
            pb.RecommendRequest(), timeout=0.5 if ends == "deadline" else None
        )
        await asyncio.wait_for(begun.wait(), 10)
        if ends == "cancel":
            call.cancel()
        await asyncio.wait_for(ended.wait(), 10)
    await server.stop(0)


async def test_a_stop_ends_calls_that_outlast_its_grace(server, client) -> None:
    hold = pb_grpc.RecommenderServiceStub(client).Explain(pb.ExplainRequest())
    await asyncio.wait_for(Raising.explaining.wait(), 10)
    await server.stop(0.1)
    with pytest.raises(grpc.aio.AioRpcError):
        await hold


async def test_streams_hold_few_threads(client) -> None:
    watch = health_pb2_grpc.HealthStub(client).Watch
    watches = [watch(health_pb2.HealthCheckRequest()) for _ in range(16)]
    for one in watches:
        assert (await one.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError, match="too many streams"):
        await watch(health_pb2.HealthCheckRequest()).read()
    watches[0].cancel()
    async with asyncio.timeout(10):
        while True:
            with suppress(grpc.aio.AioRpcError):
                await watch(health_pb2.HealthCheckRequest()).read()
                break
            await asyncio.sleep(0.01)


async def test_health_follows_set_serving(server, client) -> None:
    health = health_pb2_grpc.HealthStub(client)
    ask = health_pb2.HealthCheckRequest(service=SERVICE)
    assert (await health.Check(ask)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    server.set_serving(True)
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
