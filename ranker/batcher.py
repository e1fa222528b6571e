"""Dynamic batching: work of several calls done together on few threads, late work not at all.

Between the gRPC handlers and the model. Invariant: at most `queue_max` calls wait, one more is refused at once; a job
whose call is over (expired or cancelled) when its turn comes is dropped, never computed.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from core.deadline import Deadline
from core.errors import OverloadedError, RecommenderError, StageTimeoutError
from core.telemetry import get_logger
from ranker import metrics

_log = get_logger("ranker")

J = TypeVar("J")
R = TypeVar("R")


class _Call(Generic[J, R]):
    """Jobs that came together, and the future of all their results."""

    def __init__(self, jobs: Sequence[J], deadline: Deadline) -> None:
        self.jobs = jobs
        self.deadline = deadline
        self.arrived = time.monotonic()
        self.done: asyncio.Future[list[R]] = asyncio.get_running_loop().create_future()
        # Jobs taken into a batch so far, and results that are still to come.
        self.taken = 0
        self._results: list[R | None] = [None] * len(jobs)
        self._missing = len(jobs)

    @property
    def is_over(self) -> bool:
        return self.done.done() or self.deadline.expired()

    def put(self, index: int, result: R) -> None:
        self._results[index] = result
        self._missing -= 1
        if self._missing == 0 and not self.done.done():
            self.done.set_result([one for one in self._results if one is not None])

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Batcher(Generic[J, R]):
    """Runs `work` over batches. For one event loop; `work` runs on threads.

    Args:
        work: from jobs to their results, in order. What it raises goes to every call of the batch.
        max_batch_size: jobs in one batch.
        max_wait_ms: longest wait for a fuller batch. Waits only for as many jobs as the batch before had, so a lone
            caller never waits for company that does not come.
        queue_max: calls waiting.
        worker_threads: batches at once.
    """

    def __init__(
        self,
        work: Callable[[Sequence[J]], Sequence[R]],
        *,
        max_batch_size: int,
        max_wait_ms: float,
        queue_max: int,
        worker_threads: int = 1,
    ) -> None:
        self._work = work
        self._max_batch_size = max_batch_size
        self._max_wait_seconds = max_wait_ms / 1000
        self._queue_max = queue_max
        self._threads = worker_threads
        self._pool = ThreadPoolExecutor(worker_threads, thread_name_prefix="ranker-work")
        self._queue: deque[_Call[J, R]] = deque()
        self._arrived = asyncio.Event()
        self._last_size = 1
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self._threads)]

    async def close(self) -> None:
        """Ends the workers; calls that still wait fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._queue:
            self._queue.popleft().fail(StageTimeoutError("ranker", "the process is stopping"))
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def submit(self, jobs: Sequence[J], deadline: Deadline) -> list[R]:
        """Results of some jobs, in order.

        Raises:
            OverloadedError: the queue is full; raised at once.
            StageTimeoutError: the deadline ended before the results were there.
        """
        if not jobs:
            return []
        if len(self._queue) >= self._queue_max:
            raise OverloadedError(f"{len(self._queue)} calls are waiting already; try again later or add a replica")
        call: _Call[J, R] = _Call(jobs, deadline)
        self._queue.append(call)
        self._arrived.set()
        try:
            async with asyncio.timeout(deadline.remaining_seconds()):
                return await call.done
        except TimeoutError as error:
            raise StageTimeoutError("ranker", "the deadline ended before the scores were there") from error
        finally:
            self._forget(call)

    async def _run(self) -> None:
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            await self._company()
            batch = self._take()
            if batch:
                await self._compute(batch)

    async def _company(self) -> None:
        """Waits for as many jobs as there were last time, at most `max_wait_ms` from the first one's arrival."""
        wanted = min(self._last_size, self._max_batch_size)
        while self._queue and sum(len(call.jobs) - call.taken for call in self._queue) < wanted:
            left = self._queue[0].arrived + self._max_wait_seconds - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[tuple[_Call[J, R], int]]:
        """The next jobs, oldest call first."""
        batch: list[tuple[_Call[J, R], int]] = []
        now = time.monotonic()
        while self._queue and len(batch) < self._max_batch_size:
            call = self._queue[0]
            if call.is_over:
                metrics.dropped_users.inc(len(call.jobs) - call.taken)
                call.fail(StageTimeoutError("ranker", "the deadline ended in the queue"))
                self._queue.popleft()
                continue
            if call.taken == 0:
                metrics.queue_ms.observe((now - call.arrived) * 1000)
            end = min(len(call.jobs), call.taken + self._max_batch_size - len(batch))
            batch.extend((call, index) for index in range(call.taken, end))
            call.taken = end
            if end == len(call.jobs):
                self._queue.popleft()
        return batch

    async def _compute(self, batch: list[tuple[_Call[J, R], int]]) -> None:
        self._last_size = len(batch)
        metrics.batch_users.observe(len(batch))
        started = time.monotonic()
        jobs = [call.jobs[index] for call, index in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._pool, self._work, jobs)
        except asyncio.CancelledError:
            for call, _ in batch:
                call.fail(StageTimeoutError("ranker", "the process is stopping"))
            raise
        except Exception as error:  # noqa: BLE001 - a batch that fails must not end the worker
            if not isinstance(error, RecommenderError):
                _log.error("a batch failed", users=len(batch), error=repr(error))
            for call, _ in batch:
                call.fail(error)
            return
        metrics.batch_ms.observe((time.monotonic() - started) * 1000)
        for (call, index), result in zip(batch, results, strict=True):
            call.put(index, result)

    def _forget(self, call: _Call[J, R]) -> None:
        """Takes a call that is over out of the queue, so that it fills no place in it."""
        if call.taken < len(call.jobs) and call in self._queue:
            metrics.dropped_users.inc(len(call.jobs) - call.taken)
            self._queue.remove(call)
