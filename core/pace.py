"""Long work of a process that answers calls meanwhile: half of the time it leaves the interpreter to them.

Used where a bundle is loaded beside the one that serves, and where news of topics are applied. Invariant: without
`beside_calls` nothing is slowed down.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

# Share of the time at work, and how long without a rest: two threads that compute take turns of 0.5 ms, so that an
# answer of 10 ms would take 20 for as long as the work lasts.
_SHARE, _STRETCH_SECONDS = 0.5, 0.001
_is_beside_calls: ContextVar[bool] = ContextVar("is_beside_calls", default=False)


@contextmanager
def beside_calls() -> Iterator[None]:
    """Work on this thread until the end of the block takes its rests: `paced`."""
    token = _is_beside_calls.set(True)
    try:
        yield
    finally:
        _is_beside_calls.reset(token)


def paced(things: Iterable[T]) -> Iterator[T]:
    """The things as they come; between two of them, where calls are beside, a rest after each stretch of work."""
    if not _is_beside_calls.get():
        yield from things
        return
    began = time.perf_counter()
    for thing in things:
        yield thing
        worked = time.perf_counter() - began
        if worked >= _STRETCH_SECONDS:
            time.sleep(min(worked, 10 * _STRETCH_SECONDS) * (1 / _SHARE - 1))
            began = time.perf_counter()
