"""Batches form, full queues refuse, late work is not done. Real event loop, real threads."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from core.clock import ManualClock
from core.deadline import Deadline
from core.errors import OverloadedError, StageTimeoutError
from ranker.batcher import Batcher


class Work:
    """Doubles numbers, remembers the batches, and stands still while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def __call__(self, jobs: Sequence[int]) -> list[int]:
        self.batches.append(list(jobs))
        self.begun.release()
        assert self.gate.wait(20)
        if 13 in jobs:
            raise ValueError("unlucky")
        return [2 * job for job in jobs]

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=20)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
async def start(work: Work) -> AsyncIterator[Callable[..., Batcher[int, int]]]:
    started: list[Batcher[int, int]] = []

    def make(**limits: float) -> Batcher[int, int]:
        chosen = {"max_batch_size": 8, "max_wait_ms": 0.0, "queue_max": 100, **limits}
        batcher: Batcher[int, int] = Batcher(work, **chosen)  # type: ignore[arg-type]
        batcher.start()
        started.append(batcher)
        return batcher

    yield make
    work.gate.set()
    for batcher in started:
        await batcher.close()


def soon() -> Deadline:
    return Deadline.after_ms(20_000)


Start = Callable[..., Batcher[int, int]]


async def test_results_come_in_the_order_of_the_jobs(start: Start) -> None:
    assert await start().submit([3, 1, 2], soon()) == [6, 2, 4]


async def test_no_jobs_need_no_batch(start: Start, work: Work) -> None:
    assert await start().submit([], soon()) == []
    assert work.batches == []


async def test_calls_that_wait_are_done_together(start: Start, work: Work) -> None:
    batcher = start()
    work.gate.clear()
    first = asyncio.create_task(batcher.submit([0], soon()))
    await work.has_begun()
    others = [asyncio.create_task(batcher.submit([number], soon())) for number in range(1, 6)]
    await asyncio.sleep(0)
    work.gate.set()
    assert await asyncio.gather(first, *others) == [[0], [2], [4], [6], [8], [10]]
    assert work.batches == [[0], [1, 2, 3, 4, 5]]


async def test_a_large_call_is_done_in_parts(start: Start, work: Work) -> None:
    assert await start(max_batch_size=4).submit(list(range(10)), soon()) == [2 * number for number in range(10)]
    assert [len(batch) for batch in work.batches] == [4, 4, 2]


async def test_a_lone_caller_does_not_wait_for_company(start: Start, work: Work) -> None:
    batcher = start(max_wait_ms=60_000)
    for number in range(5):
        await batcher.submit([number], soon())
    assert work.batches == [[0], [1], [2], [3], [4]]


async def test_where_there_was_company_it_is_waited_for(start: Start, work: Work) -> None:
    batcher = start(max_wait_ms=60_000)
    await batcher.submit([0, 1, 2], soon())
    first = asyncio.create_task(batcher.submit([3], soon()))
    await asyncio.sleep(0.02)
    assert len(work.batches) == 1
    assert await batcher.submit([4, 5], soon()) == [8, 10]
    assert await first == [6]
    assert work.batches == [[0, 1, 2], [3, 4, 5]]


async def test_company_is_not_waited_for_longer_than_allowed(start: Start, work: Work) -> None:
    batcher = start(max_wait_ms=10)
    await batcher.submit([0, 1, 2], soon())
    assert await batcher.submit([3], soon()) == [6]
    assert work.batches == [[0, 1, 2], [3]]


async def test_a_full_queue_refuses_at_once(start: Start, work: Work) -> None:
    batcher = start(queue_max=2)
    work.gate.clear()
    running = asyncio.create_task(batcher.submit([0], soon()))
    await work.has_begun()
    waiting = [asyncio.create_task(batcher.submit([number], soon())) for number in (1, 2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="2 calls are waiting"):
        await batcher.submit([3], soon())
    work.gate.set()
    assert await asyncio.gather(running, *waiting) == [[0], [2], [4]]
    assert await batcher.submit([3], soon()) == [6]


async def test_a_call_that_gave_up_leaves_its_place(start: Start, work: Work) -> None:
    batcher = start(queue_max=1)
    work.gate.clear()
    running = asyncio.create_task(batcher.submit([0], soon()))
    await work.has_begun()
    gone = asyncio.create_task(batcher.submit([1], soon()))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    stays = asyncio.create_task(batcher.submit([2], soon()))
    await asyncio.sleep(0)
    work.gate.set()
    assert await asyncio.gather(running, stays) == [[0], [4]]
    assert work.batches == [[0], [2]]


async def test_expired_work_is_never_computed(start: Start, work: Work) -> None:
    batcher = start()
    work.gate.clear()
    running = asyncio.create_task(batcher.submit([0], soon()))
    await work.has_begun()
    with pytest.raises(StageTimeoutError, match="deadline"):
        await batcher.submit([1], Deadline.after_ms(10))
    # One that expires at the moment its turn comes, before its caller has noticed.
    clock = ManualClock()
    late = asyncio.create_task(batcher.submit([2], Deadline(10.0, clock)))
    await asyncio.sleep(0)
    clock.advance(11_000)
    work.gate.set()
    assert await running == [0]
    with pytest.raises(StageTimeoutError, match="deadline"):
        await late
    assert await batcher.submit([3], soon()) == [6]
    assert work.batches == [[0], [3]]


async def test_a_batch_that_fails_fails_its_calls_alone(start: Start) -> None:
    batcher = start()
    with pytest.raises(ValueError, match="unlucky"):
        await batcher.submit([13], soon())
    assert await batcher.submit([1], soon()) == [2]


async def test_several_threads_work_at_once(start: Start, work: Work) -> None:
    batcher = start(worker_threads=2)
    work.gate.clear()
    calls = []
    for number in range(2):
        calls.append(asyncio.create_task(batcher.submit([number], soon())))
        await work.has_begun()
    work.gate.set()
    assert await asyncio.gather(*calls) == [[0], [2]]


async def test_what_waits_at_the_end_is_told_so(work: Work) -> None:
    batcher: Batcher[int, int] = Batcher(work, max_batch_size=1, max_wait_ms=0, queue_max=10)
    batcher.start()
    work.gate.clear()
    running = asyncio.create_task(batcher.submit([0], soon()))
    await work.has_begun()
    waiting = asyncio.create_task(batcher.submit([1], soon()))
    await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    work.gate.set()
    await closing
    for call in (running, waiting):
        with pytest.raises(StageTimeoutError, match="stopping"):
            await call
