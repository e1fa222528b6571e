"""One time budget, shared by every step of a request and handed on as what is left of it.

Made at the door from gRPC's own deadline; every client call passes `remaining_seconds()`. Invariant: a
deadline derived from another never ends later than it.
"""

from dataclasses import dataclass

from core.clock import Clock, SystemClock

_SYSTEM = SystemClock()


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on the monotonic clock."""

    at: float
    clock: Clock = _SYSTEM

    @classmethod
    def after_ms(cls, budget_ms: float, clock: Clock = _SYSTEM) -> "Deadline":
        return cls(clock.monotonic() + budget_ms / 1000, clock)

    def remaining_ms(self) -> float:
        """What is left; 0 when nothing is."""
        return max(0.0, (self.at - self.clock.monotonic()) * 1000)

    def remaining_seconds(self) -> float:
        return self.remaining_ms() / 1000

    def expired(self) -> bool:
        return self.clock.monotonic() >= self.at

    def capped_ms(self, budget_ms: float) -> "Deadline":
        """The earlier of this deadline and `budget_ms` from now."""
        return Deadline(min(self.at, self.clock.monotonic() + budget_ms / 1000), self.clock)

    def minus_ms(self, margin_ms: float) -> "Deadline":
        """This deadline, earlier by a margin kept for what follows."""
        return Deadline(self.at - margin_ms / 1000, self.clock)
