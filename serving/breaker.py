"""Circuit breaker: a dependency that keeps failing is left alone for a while, then probed with one request.

One per dependency, asked before and told after each call. Invariant: pure but for its clock; while half open, at most
one request at a time goes through.
"""

from collections.abc import Callable

from core.clock import Clock
from core.errors import StageError

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half_open"

# (dependency, new state, why)
OnChange = Callable[[str, str, str], None]


class BreakerOpenError(StageError):
    """The dependency failed repeatedly and was not asked."""


class CircuitBreaker:
    """closed -> open after so many failures in a row -> half open after a time -> closed, or open again."""

    def __init__(self, dependency: str, failures: int, open_ms: float, clock: Clock, on_change: OnChange) -> None:
        self.dependency = dependency
        self._failures_allowed = failures
        self._open_seconds = open_ms / 1000
        self._clock = clock
        self._on_change = on_change
        self._state = CLOSED
        self._failures = 0
        self._opened_at = 0.0
        self._probing = False
        self._last_problem = ""

    @property
    def state(self) -> str:
        """closed, open or half_open, as the next request will find it."""
        if self._state == OPEN and self._clock.monotonic() - self._opened_at >= self._open_seconds:
            return HALF_OPEN
        return self._state

    def enter(self) -> None:
        """Call before a request; then exactly one of `succeeded`, `failed`, `abandoned`.

        Raises:
            BreakerOpenError: the dependency is to be left alone.
        """
        state = self.state
        if state == OPEN or (state == HALF_OPEN and self._probing):
            raise BreakerOpenError(self.dependency, f"left alone after repeated failures ({self._last_problem})")
        if state == HALF_OPEN:
            self._state, self._probing = HALF_OPEN, True

    def succeeded(self) -> None:
        self._failures, self._probing = 0, False
        if self._state != CLOSED:
            self._change(CLOSED, "it answers again")

    def failed(self, problem: str) -> None:
        self._last_problem = problem
        self._failures += 1
        was_probe, self._probing = self._probing, False
        if was_probe or (self._state == CLOSED and self._failures >= self._failures_allowed):
            self._opened_at = self._clock.monotonic()
            if was_probe:
                self._state = OPEN
            else:
                self._change(OPEN, problem)

    def abandoned(self) -> None:
        """The request ended without saying anything about the dependency (cancelled, or no fair time)."""
        self._probing = False

    def _change(self, state: str, why: str) -> None:
        self._state = state
        self._on_change(self.dependency, state, why)
