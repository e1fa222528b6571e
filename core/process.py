"""How a process starts and stops: arguments, settings, logs, signals, one line for what is wrong.

Every `__main__.py` calls `run_process`. Invariant: SIGTERM and SIGINT lead to a clean stop with exit code 0; a
known error is one line on stderr and exit code 1, never a traceback.
"""

import argparse
import asyncio
import gc
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import uvloop

from core.admin import AdminServer, Readiness
from core.errors import RecommenderError
from core.settings import Settings, load_settings
from core.telemetry import configure_logging, get_logger

_log = get_logger("process")

# A thread that comes back from a socket waits this long for one that computes; with Python's default of 5 ms, a batch
# of a few round trips stands still for tens of milliseconds while a file of the event log is made, and so does a call
# that gRPC's threads take in.
SWITCH_SECONDS = 0.0005


class Process:
    """What `serve` gets beside its settings: readiness, and the wish to stop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.readiness = Readiness()
        self.stopping = asyncio.Event()
        self._admin: AdminServer | None = None

    def open_admin(self, host: str, port: int) -> None:
        self._admin = AdminServer(host, port, self.readiness)

    def close(self) -> None:
        if self._admin is not None:
            self._admin.close()


Serve = Callable[[Settings, Process], Awaitable[None]]


def run_process(name: str, meaning: str, serve: Serve) -> int:
    """Parses the command line and runs `serve` until it returns. Returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=meaning)
    parser.add_argument("--config", type=Path, help="TOML file in the shape of core/defaults.toml")
    parser.add_argument("--check-config", action="store_true", help="read the settings, say what is wrong, exit")
    arguments = parser.parse_args()
    try:
        settings = load_settings(arguments.config)
        if arguments.check_config:
            print(f"{name}: settings are valid")  # noqa: T201
            return 0
        configure_logging(settings.telemetry, name)
        sys.setswitchinterval(SWITCH_SECONDS)
        uvloop.run(_run(name, serve, settings))
    except RecommenderError as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        print(f"{name}: {error.strerror or error}; is the port in use?", file=sys.stderr)  # noqa: T201
        return 1
    return 0


async def _run(name: str, serve: Serve, settings: Settings) -> None:
    process = Process(name)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.stopping.set)
    try:
        await serve(settings, process)
        _log.info("stopped")
    finally:
        process.close()


def freeze_survivors(young_objects: int) -> None:
    """For a process that keeps millions of objects, few of them in cycles: none is looked at twice.

    What outlives its first look by the cyclic collector, which comes after `young_objects` more of them, is left to
    reference counts from then on. Python's own way walks what it has kept again and again, up to a second at a time.
    What becomes a cycle without owners later (after errors, mostly) is found by `collect_when_idle` alone.
    """

    def freeze(phase: str, _: Mapping[str, int]) -> None:
        if phase == "stop":
            gc.freeze()

    gc.set_threshold(young_objects)
    gc.callbacks.append(freeze)


async def collect_when_idle(
    is_idle: Callable[[], bool], *, every_seconds: float = 600, latest_seconds: float = 21_600, look_seconds: float = 1
) -> None:
    """Looks at everything once in a while, what was frozen too, until cancelled.

    Args:
        is_idle: asked every `look_seconds` whether nobody would notice the process standing still, for some tenths of
            a second per million objects.
        every_seconds: how often it is due.
        latest_seconds: it happens after so long, idle or not.
        look_seconds: how often to ask.
    """
    last = time.monotonic()
    while True:
        await asyncio.sleep(look_seconds)
        idle, since = is_idle(), time.monotonic() - last
        if since >= latest_seconds or (idle and since >= every_seconds):
            begin = time.monotonic()
            gc.unfreeze()
            found = gc.collect()
            gc.freeze()
            last = time.monotonic()
            _log.info("looked at all objects", unreachable=found, pause_seconds=round(last - begin, 3), idle=idle)


@contextmanager
def uncollected() -> Iterator[None]:
    """For a stretch that makes very many objects, none of them in cycles: `collect_when_idle` alone sees them."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def freeze_heap() -> None:
    """Call after warm-up: what lives now lives on, so the cyclic collector need not walk it (long pauses)."""
    gc.collect()
    gc.freeze()
