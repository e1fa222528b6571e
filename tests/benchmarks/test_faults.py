"""The fault matrix itself: the proxy in between, and what the table lets pass."""

import asyncio

import pytest

from benchmarks.fault_proxy import FaultProxy, Mode
from benchmarks.fault_table import CASES
from devstack.ports import LOOPBACK


async def echo(reader, writer) -> None:
    while data := await reader.read(1000):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.fixture
async def proxy():
    server = await asyncio.start_server(echo, LOOPBACK, 0)
    made = FaultProxy(0, server.sockets[0].getsockname()[1], slow_ms=60)
    await made.open()
    yield made
    await made.close()
    server.close()


async def say(writer, reader, text: bytes) -> bytes:
    writer.write(text)
    return await reader.readexactly(len(text))


async def test_a_clear_line_changes_nothing_and_a_slow_one_only_the_time(proxy) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, proxy.port)
    loop = asyncio.get_running_loop()
    assert await say(writer, reader, b"one") == b"one"
    proxy.mode = Mode.SLOW
    start = loop.time()
    assert await say(writer, reader, b"two") == b"two"
    assert loop.time() - start >= 0.06
    # The order holds also where a slow answer is still under way when the line clears.
    writer.write(b"three")
    await asyncio.sleep(0.02)
    proxy.mode = Mode.CLEAR
    writer.write(b"four")
    assert await reader.readexactly(9) == b"threefour"
    writer.close()


async def test_a_flaky_line_breaks_what_is_there_and_half_of_what_comes(proxy) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, proxy.port)
    assert await say(writer, reader, b"one") == b"one"
    proxy.mode = Mode.FLAKY
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    writer.close()
    lived = 0
    for _ in range(40):
        try:
            reader, writer = await asyncio.open_connection(LOOPBACK, proxy.port)
            lived += await say(writer, reader, b"x") == b"x"
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
    assert 5 <= lived <= 35


async def test_a_dependency_that_is_gone_ends_the_connection(proxy) -> None:
    proxy.upstream_port = 9
    reader, writer = await asyncio.open_connection(LOOPBACK, proxy.port)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    writer.close()


def case(name):
    return next(case for case in CASES if case.name == name)


def test_the_matrix_is_whole() -> None:
    assert len(CASES) == len({case.name for case in CASES}) == 27


@pytest.mark.parametrize(
    ("name", "tier", "reasons", "during", "is_fine"),
    [
        ("ranker-down", "RANKED", set(), False, True),
        ("ranker-down", "RANKED", set(), True, False),
        ("ranker-down", "RERANKED_BATCH", {"ranker_unavailable", "breaker_open"}, True, True),
        ("ranker-down", "RERANKED_BATCH", set(), False, False),
        ("ranker-down", "POPULAR", {"ranker_unavailable"}, True, False),
        ("ranker-flaky", "RANKED", set(), True, True),
        ("redis-slow", "LAST_GOOD", {"store_timeout", "seen_unknown"}, True, True),
        ("redis-slow", "RANKED", {"ranker_timeout"}, False, False),
        ("kafka-down", "RANKED", set(), True, True),
        ("kafka-down", "LAST_GOOD", {"store_timeout"}, True, False),
        ("cold-start-everything-down", "POPULAR", {"store_unavailable", "seen_unknown"}, True, True),
        ("cold-start-everything-down", "LAST_GOOD", {"store_unavailable"}, True, False),
    ],
)
def test_an_answer_has_to_fit_its_case(name, tier, reasons, during, is_fine) -> None:
    assert (case(name).objection(tier, frozenset(reasons), during=during) is None) is is_fine
