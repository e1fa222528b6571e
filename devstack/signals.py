"""What signals do to the stack: the first one leaves the `with` block in good order, a further one makes it quick.

Invariant: handlers are set in the main thread only, and what was set before is put back.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


@contextmanager
def signals_leave() -> Iterator[None]:
    """SIGTERM and SIGHUP leave the block as Ctrl-C does, where nobody else has a use for them."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    unused = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    with _handlers(dict.fromkeys(unused, leave)):
        yield


@contextmanager
def signals_call(action: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C and signals interrupt nothing; they call `action`."""

    def call(_number: int, _frame: FrameType | None) -> None:
        action()

    with _handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), call)):
        yield


@contextmanager
def _handlers(wanted: Mapping[signal.Signals, _Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
