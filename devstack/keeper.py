"""Keeps one process running: starts it when what it needs is there, asks how it is, starts it again when it dies.

One keeper per process, below the supervisor. Invariant: the keeper's thread starts the process and stays until the
process has ended (the kernel ties the two, see devstack.child), and it is the only one that waits for it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO

from core.errors import NotFoundError, RecommenderError
from devstack import priority
from devstack.child import tied
from devstack.processes import ProcessSpec, describe_exit, last_line

_POLL_SECONDS = 0.1
_LIVE_INTERVAL_SECONDS = 2.0
# So many unanswered questions in a row, each waited for, make a process that hangs.
_LIVE_FAILURES_MAX = 5

Say = Callable[[str, str], None]


class State(StrEnum):
    """Where a process stands."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"
    FAILED = "failed"


class Backoff:
    """How long to wait before the next start, and when to stop trying: pure, fed with times."""

    def __init__(self, limit: int = 5, window_seconds: float = 60, first_seconds: float = 0.2) -> None:
        self.limit = limit
        self.window_seconds = window_seconds
        self._first_seconds = first_seconds
        self._deaths: deque[float] = deque()

    def after_death(self, now: float) -> float | None:
        """Seconds to wait before the next start; None when it died more than `limit` times within the window."""
        self._deaths.append(now)
        while self._deaths[0] < now - self.window_seconds:
            self._deaths.popleft()
        deaths = len(self._deaths)
        return None if deaths > self.limit else float(self._first_seconds * 2 ** (deaths - 1))


@dataclass(slots=True)
class Surroundings:
    """What a keeper shares with the others."""

    logs: Path
    # News of a process, and the news that it is given up.
    say: Say
    failed: Say
    environment: Callable[[], Mapping[str, str]]
    is_ready: Callable[[str], bool]
    verbose: bool = False
    # Guards every keeper's state and tells of each change.
    changed: threading.Condition = field(default_factory=threading.Condition)


class Keeper:
    """One process, from `start` to `stop`, over as many lives as it takes."""

    def __init__(self, spec: ProcessSpec, surroundings: Surroundings) -> None:
        self.spec = spec
        self.state = State.STOPPED
        # Why it failed, or what it is waiting for.
        self.problem = ""
        self.log = surroundings.logs / f"{spec.name}.log"
        self._with = surroundings
        self._changed = surroundings.changed
        self._process: subprocess.Popen[bytes] | None = None
        self._pump: threading.Thread | None = None
        self._thread: threading.Thread | None = None
        self._active = False
        self._wanted = False
        self._restarting = False
        self._kill_at: float | None = None
        self._backoff = Backoff()

    def start(self) -> None:
        """Begins (or goes on) to keep the process running; returns at once."""
        with self._changed:
            self._wanted = True
            if self._active:
                # One that is on its way out ends first, and is started again.
                self._restarting = self._kill_at is not None or self.state is State.FAILED
                return
            self._active = True
            self._backoff = Backoff()
            self._set(State.WAITING)
            self._thread = threading.Thread(target=self._run, name=f"keeper-{self.spec.name}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Asks the process to end (SIGTERM, later SIGKILL); returns at once, see `join`."""
        with self._changed:
            self._wanted = False
            self._restarting = False
            self._terminate()
            self._changed.notify_all()

    def restart(self) -> None:
        """Ends the process and starts it again with the environment of then; returns at once."""
        with self._changed:
            if self._process is not None and self._wanted:
                self._restarting = True
                self._terminate()
                self._set(State.RESTARTING)

    def kill(self, number: int, *, restart: bool) -> None:
        """Sends a signal; after SIGKILL, waits until it is gone. `restart` False: left alone from now on."""
        with self._changed:
            process = self._running()
            self._wanted = self._wanted and restart
            process.send_signal(number)
            if number == signal.SIGKILL:
                self._changed.wait_for(lambda: self._process is not process, timeout=5)

    def kill_now(self) -> None:
        """SIGKILL, for good."""
        with self._changed:
            self._wanted = self._restarting = False
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()

    def join(self, timeout_seconds: float) -> bool:
        """Waits until the keeper is done; False when it is not in time."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)
        return thread is None or not thread.is_alive()

    @property
    def pid(self) -> int:
        with self._changed:
            return self._running().pid

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise NotFoundError(f"{self.spec.name} is not running ({self.state}); start it first")
        return self._process

    def _terminate(self) -> None:
        if self._process is not None and self._kill_at is None:
            self._kill_at = time.monotonic() + self.spec.stop_timeout_seconds
            self._process.terminate()

    def _set(self, state: State, problem: str = "") -> None:
        with self._changed:
            self.state, self.problem = state, problem
            self._changed.notify_all()

    # --- on the keeper's own thread ---

    def _run(self) -> None:
        has_been_ready = False
        while self._wait_for_needs():
            begin = self.log.stat().st_size if self.log.exists() else 0
            try:
                process = self._spawn()
            except OSError as error:
                self._give_up(f"cannot be started: {error.strerror or error}")
                return
            has_been_ready = self._watch(process) or has_been_ready
            if self._pump is not None:
                self._pump.join(1)
            if not self._ended():
                return
            if self.state is State.RESTARTING and not self._survives(process.returncode, begin, has_been_ready):
                return

    def _wait_for_needs(self) -> bool:
        """Waits until every dependency is ready; False when the process is no longer wanted."""
        needs = self.spec.depends_on
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted or all(map(self._with.is_ready, needs)))
            if not self._wanted:
                self._active = False
                self._set(State.STOPPED)
            return self._wanted

    def _spawn(self) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, **self._with.environment(), **self.spec.env}
        with self._changed, self.log.open("ab") as log:
            process = subprocess.Popen(
                tied(self.spec.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._with.verbose else log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Its own session: Ctrl-C reaches the supervisor only, which then stops everything in order.
                start_new_session=True,
            )
            priority.set_share(process.pid, priority.STARTING)
            self._process = process
            self._set(State.STARTING)
            if not self._wanted:
                self._terminate()
        if process.stdout is not None:
            self._pump = threading.Thread(
                target=_pump, args=(self.spec.name, process.stdout, self.log), name="output", daemon=True
            )
            self._pump.start()
        return process

    def _watch(self, process: "subprocess.Popen[bytes]") -> bool:
        """Stays with the process until it has ended; says whether it ever was ready."""
        begin = time.monotonic()
        ready, silent, next_live = False, 0, 0.0
        while True:
            try:
                process.wait(_POLL_SECONDS)
                return ready
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if self._kill_at is not None:
                if now > self._kill_at:
                    process.kill()
            elif self._wanted and not ready:
                ready = self._became_ready(process, begin)
            elif self._wanted and now >= next_live:
                next_live = now + _LIVE_INTERVAL_SECONDS
                silent = silent + 1 if self.spec.live_problem() else 0
                if silent >= _LIVE_FAILURES_MAX:
                    self._with.say(self.spec.name, "does not answer /live any more, killed")
                    process.kill()

    def _became_ready(self, process: "subprocess.Popen[bytes]", begin: float) -> bool:
        self.problem = self.spec.ready_problem() or ""
        if self.state is State.FAILED or process.poll() is not None:
            return False
        seconds = time.monotonic() - begin
        if self.problem:
            if seconds > self.spec.start_timeout_seconds:
                self._fail(f"is not ready after {seconds:.0f} s: {self.problem} (log: {self.log})")
                process.kill()
            return False
        try:
            if self.spec.on_ready is not None:
                self.spec.on_ready()
        except RecommenderError as error:
            self._fail(str(error))
            process.kill()
            return False
        priority.set_share(process.pid, priority.SERVING)
        self._set(State.READY)
        self._with.say(self.spec.name, f"ready after {seconds:.1f} s")
        return True

    def _ended(self) -> bool:
        """Notes that the process has ended; False when that was the end of it."""
        with self._changed:
            self._process = None
            self._kill_at = None
            again, self._restarting = self._restarting, False
            if again:
                self._set(State.WAITING)
            elif not self._wanted or self.state is State.FAILED:
                self._active = False
                self._set(*((State.STOPPED, "") if not self._wanted else (self.state, self.problem)))
            else:
                self._set(State.RESTARTING)
            return self._active

    def _survives(self, code: int, log_begin: int, has_been_ready: bool) -> bool:
        """Says that the process died and waits the backoff out; False when it is given up."""
        how = describe_exit(code)
        if line := last_line(self.log, log_begin):
            how = f"{how}: {line}"
        if not has_been_ready:
            self._give_up(f"did not start, {how} (log: {self.log})")
            return False
        delay = self._backoff.after_death(time.monotonic())
        if delay is None:
            limit, window = self._backoff.limit, self._backoff.window_seconds
            self._give_up(f"ended more than {limit} times within {window:.0f} s, given up: {how} (log: {self.log})")
            return False
        self._with.say(self.spec.name, f"ended, {how}; starting again in {delay:.1f} s")
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted, delay)
        return True

    def _give_up(self, problem: str) -> None:
        with self._changed:
            self._active = False
            self._fail(problem)

    def _fail(self, problem: str) -> None:
        self._set(State.FAILED, problem)
        self._with.failed(self.spec.name, problem)


def _pump(name: str, stream: IO[bytes], log: Path) -> None:
    """Copies a child's output to its log and to the screen (`--verbose`)."""
    with stream, log.open("ab") as file:
        for line in stream:
            file.write(line)
            file.flush()
            # A terminal that is gone must not fill the pipe and stop the child.
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{name:>10} | {line.decode('utf-8', 'replace').rstrip()}\n")
