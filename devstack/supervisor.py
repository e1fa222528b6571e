"""Runs a set of processes: starts them in the order of their needs, in parallel where it can, and stops them all.

Between the stack, which knows what a recommender consists of, and one keeper per process. Invariant: `start_all`
returns with every process ready or raises with every process gone.
"""

import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from core.errors import ConfigError, NotFoundError, StageError, StageTimeoutError
from devstack.keeper import Keeper, Say, State, Surroundings
from devstack.processes import ProcessSpec

# Beyond what a process is given to end by itself.
_KILL_GRACE_SECONDS = 5


def say_on_stderr(name: str, text: str) -> None:
    """Where news goes when nobody else wants it. A terminal that is gone stops nothing."""
    with suppress(OSError, ValueError):
        print(f"{name:>10}  {text}", file=sys.stderr, flush=True)


class Supervisor:
    """Keeps the processes of `specs` running. Nothing is started before `start_all`."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        logs: Path,
        *,
        environment: Callable[[], Mapping[str, str]] = dict,
        say: Say = say_on_stderr,
        verbose: bool = False,
    ) -> None:
        self._say = say
        self._starting = False
        self._surroundings = Surroundings(logs, say, self._failed, environment, self._is_ready, verbose)
        self._changed: threading.Condition = self._surroundings.changed
        self._keepers = {spec.name: Keeper(spec, self._surroundings) for spec in specs}
        for spec in specs:
            for need in spec.depends_on:
                if need not in self._keepers:
                    raise ConfigError(f"{spec.name} depends on {need}, which is not among {', '.join(self._keepers)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._keepers)

    def start_all(self, timeout_seconds: float = 180) -> None:
        """Starts everything and returns when all of it is ready.

        Raises:
            StageError: the first process that did not come up, and why, in one line. All others are stopped.
        """
        keepers = list(self._keepers.values())

        def decided() -> bool:
            states = {keeper.state for keeper in keepers}
            return State.FAILED in states or states <= {State.READY}

        self._starting = True
        try:
            for keeper in keepers:
                keeper.start()
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        any(k.state is State.FAILED for k in keepers) or all(k.state is State.READY for k in keepers)
                    ),
                    timeout_seconds,
                )
            for keeper in sorted(keepers, key=lambda k: k.state is not State.FAILED):
                _require_ready(keeper, timeout_seconds)
        except BaseException:
            self.stop_all()
            raise
        finally:
            self._starting = False

    def stop_all(self) -> None:
        """Stops everything, the highest wave first. Returns with nothing left running."""
        by_wave = sorted(self._keepers.values(), key=lambda keeper: -keeper.spec.wave)
        for _, wave in groupby(by_wave, key=lambda keeper: keeper.spec.wave):
            keepers = list(wave)
            for keeper in keepers:
                keeper.stop()
            for keeper in keepers:
                if not keeper.join(keeper.spec.stop_timeout_seconds + _KILL_GRACE_SECONDS):
                    keeper.kill_now()

    def kill_all(self) -> None:
        """Ends everything at once, without asking."""
        for keeper in self._keepers.values():
            keeper.kill_now()

    def start(self, name: str) -> None:
        self._keeper(name).start()

    def stop(self, name: str) -> None:
        """Stops one process in good order and waits for its end."""
        keeper = self._keeper(name)
        keeper.stop()
        keeper.join(keeper.spec.stop_timeout_seconds + _KILL_GRACE_SECONDS)

    def restart(self, name: str) -> None:
        """Ends one process and starts it again with the present environment; does not wait."""
        self._keeper(name).restart()

    def kill(self, name: str, number: int = signal.SIGKILL, *, restart: bool = True) -> None:
        """Sends a signal. With `restart` False the process is left alone from now on, until `start`."""
        self._keeper(name).kill(number, restart=restart)

    def wait_ready(self, name: str, timeout_seconds: float) -> None:
        """Returns when the process is ready; raises StageError when it failed or is not in time."""
        keeper = self._keeper(name)
        with self._changed:
            self._changed.wait_for(lambda: keeper.state in (State.READY, State.FAILED), timeout_seconds)
        _require_ready(keeper, timeout_seconds)

    def wait_state(self, name: str, state: State, timeout_seconds: float) -> bool:
        keeper = self._keeper(name)
        with self._changed:
            return self._changed.wait_for(lambda: keeper.state is state, timeout_seconds)

    def state(self, name: str) -> State:
        return self._keeper(name).state

    def pid(self, name: str) -> int:
        return self._keeper(name).pid

    def _keeper(self, name: str) -> Keeper:
        if name not in self._keepers:
            raise NotFoundError(f"no process {name}; there are {', '.join(self._keepers)}")
        return self._keepers[name]

    def _is_ready(self, name: str) -> bool:
        return self._keepers[name].state is State.READY

    def _failed(self, name: str, problem: str) -> None:
        # During start_all the error says it, once.
        if not self._starting:
            self._say(name, problem)


def _require_ready(keeper: Keeper, timeout_seconds: float) -> None:
    if keeper.state is State.FAILED:
        raise StageError(keeper.spec.name, keeper.problem)
    if keeper.state is not State.READY:
        waiting = keeper.problem or f"still {keeper.state}"
        raise StageTimeoutError(
            keeper.spec.name, f"not ready after {timeout_seconds:.0f} s: {waiting} (log: {keeper.log})"
        )
