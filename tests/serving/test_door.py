"""How long the door takes: asked of a server that answers, and of one that does not."""

import asyncio
import time

from core.clock import SystemClock
from core.grpc_runtime import GrpcServer
from serving.door import Door

from .conftest import until


async def test_a_question_takes_what_the_server_lets_it_wait() -> None:
    server = GrpcServer("127.0.0.1", 0, ())
    await server.start()
    door = Door(SystemClock())
    assert door.wait_ms == 0
    watching = asyncio.create_task(door.watch("0.0.0.0", server.port))  # noqa: S104 - asked, not listened on
    await until(lambda: _is_over(door, 0))
    # Nothing is answered while the loop is held: the next look sees at least that.
    held_ms = 150
    waits = []
    for _ in range(10):
        time.sleep(held_ms / 1000)  # noqa: ASYNC251 - that is what is looked at
        await asyncio.sleep(0.03)
        waits.append(door.wait_ms)
    assert max(waits) >= held_ms
    await server.stop(0)
    watching.cancel()


async def test_a_question_under_way_counts_already() -> None:
    async def swallow(_reader, writer) -> None:
        await asyncio.sleep(60)
        writer.close()

    silent = await asyncio.start_server(swallow, "127.0.0.1", 0)
    door = Door(SystemClock())
    watching = asyncio.create_task(door.watch("127.0.0.1", silent.sockets[0].getsockname()[1]))
    await until(lambda: _is_over(door, 100))
    watching.cancel()
    silent.close()


async def _is_over(door, wait_ms) -> bool:
    return door.wait_ms > wait_ms
