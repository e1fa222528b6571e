"""How long the door takes: asked of a server that answers, and of one that does not."""

import asyncio
from contextlib import suppress

import pytest

from core.clock import SystemClock
from core.grpc_runtime import GrpcServer
from serving.door import Door

from .conftest import until


@pytest.fixture
async def server():
    server = GrpcServer("127.0.0.1", 0, ())
    await server.start()
    yield server
    await server.stop(0)


async def test_a_server_that_answers_is_timed(server) -> None:
    door = Door(SystemClock())
    assert door.wait_ms == 0
    watching = asyncio.create_task(door.watch("0.0.0.0", server.port))  # noqa: S104 - asked, not listened on
    await until(lambda: _is_over(door, 0))
    await ended(watching)


async def test_a_question_under_way_counts_already() -> None:
    over = asyncio.Event()
    closed = asyncio.Event()

    async def swallow(_reader, writer) -> None:
        await over.wait()
        writer.close()
        closed.set()

    silent = await asyncio.start_server(swallow, "127.0.0.1", 0)
    door = Door(SystemClock())
    watching = asyncio.create_task(door.watch("127.0.0.1", silent.sockets[0].getsockname()[1]))
    await until(lambda: _is_over(door, 100))
    over.set()
    await asyncio.wait_for(closed.wait(), 10)
    await ended(watching)
    silent.close()
    await silent.wait_closed()


async def ended(task) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _is_over(door, wait_ms) -> bool:
    return door.wait_ms > wait_ms
