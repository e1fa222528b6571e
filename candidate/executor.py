"""Blocking work (FAISS, torch) beside the event loop: few threads, a bounded queue, deadlines, cancellation.

Between the gRPC handlers and the retriever. Invariant: work whose call is over (expired or cancelled) is not begun,
and what was begun stops at its next `check`; past `queue_max` waiting calls another is refused at once.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from core.deadline import Deadline
from core.errors import OverloadedError, StageTimeoutError

T = TypeVar("T")


class Job:
    """What running work knows of its call."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for the result any more."""
        return self._cancelled.is_set() or self.deadline.expired()

    def check(self) -> None:
        """Raises StageTimeoutError where nobody waits any more."""
        if self.is_over:
            raise StageTimeoutError("candidate", "the deadline ended, or the call was cancelled, before the work did")


class WorkExecutor:
    """Runs work on a few threads. Used from one event loop."""

    def __init__(self, threads: int, queue_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="candidate-work")
        self._most = threads + queue_max
        # Calls whose work waits or runs, and calls so far whose caller went away before its end.
        self.pending = self.abandoned = 0

    async def run(self, deadline: Deadline, work: Callable[[Job], T]) -> T:
        """Runs `work` and returns its result.

        Raises:
            OverloadedError: too much is waiting already.
            StageTimeoutError: the deadline ended first.
        """
        if self.pending >= self._most:
            raise OverloadedError(f"{self.pending} calls are waiting already; try again later or add a replica")
        job = Job(deadline)

        def guarded() -> T:
            job.check()
            return work(job)

        self.pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, guarded)
        # Counted until the thread is free, not until the caller is gone.
        future.add_done_callback(self._done)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            job.cancel()
            self.abandoned += 1
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: "asyncio.Future[T]") -> None:
        self.pending -= 1
        if not future.cancelled():
            future.exception()  # seen, also where the caller has gone
