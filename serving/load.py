"""How much the front door takes on: requests at once, and candidates for each, by how late things are.

Asked by `serving.recommender` before each request, told after it, and given the time every few milliseconds. Two
answers to pressure, the gentle one first: the quality factor (fewer candidates are retrieved and ranked) follows the
p95 of the answers, the limit of requests at once follows how late the event loop is, which is how long a request waits
for its handler (the others are answered from the lower rungs). Invariant: pure but for its clock; a dependency that is
slow costs quality, never admission, for the loop of a process that waits is never late.
"""

import os
from collections import deque

import numpy as np

from core.clock import Clock

# Decisions are made this often.
_INTERVAL_SECONDS = 0.1
_WINDOW = 500
_LEAST_ANSWERS = 10
# Share of the given time that the p95 takes: above the first, quality falls; below the second it rises again.
_BUSY, _AT_EASE = 0.4, 0.25
_DOWN, _UP = 0.8, 0.05
LEAST_QUALITY = 0.2
# How late the loop may be. An answer takes some ten of its turns, and is to be ready in a fraction of its time.
_LATE_MS, _PUNCTUAL_MS = 10.0, 4.0
_LESS, _MORE = 0.7, 1.25
# Past the limit at which things were late lately it grows by so much, which is ten requests in four seconds.
_STEP = 0.25
# Decisions for which a refusal counts as pressure.
_PRESSED_DECISIONS = 10
_LEAST_LIMIT = 4
# Requests at once, for each core, that are let in before it is known how the machine takes them.
_FIRST_PER_CORE = 4


class LoadControl:
    """The quality factor and the limit of requests at once.

    Args:
        limit_max: requests at once, however well the machine takes them.
        clock: for the pace of decisions.
        cores: of the machine.
    """

    def __init__(self, limit_max: int, clock: Clock, cores: int | None = None) -> None:
        self._first = min(limit_max, _FIRST_PER_CORE * (cores or os.cpu_count() or 1))
        self._limit_max = limit_max
        self._clock = clock
        self._shares: deque[float] = deque(maxlen=_WINDOW)
        self._lags_ms: deque[float] = deque(maxlen=_WINDOW)
        self._decided_at = clock.monotonic()
        self._active = 0
        self._peak = 0
        # How late the loop was lately.
        self.lag_ms = 0.0
        # Follows what is asked for, not too quickly: a sudden crowd that was let in would all be late.
        self._limit = float(self._first)
        # Where things were late lately.
        self._ceiling = float(limit_max)
        self._pressure = 0.0
        self._pressed = 0
        # 1 = as many candidates as the settings say, down to LEAST_QUALITY of them.
        self.quality = 1.0

    @property
    def limit(self) -> int:
        """Requests at once that may go through all stages."""
        return int(self._limit)

    @property
    def is_pressed(self) -> bool:
        """Whether requests were refused within the last second."""
        return self._pressed > 0

    def enter(self) -> bool:
        """Whether one more request may go through all stages; if so, `leave` is to be called after it."""
        if self._active >= self.limit:
            self._peak = max(self._peak, self._active + 1)
            self._pressed = _PRESSED_DECISIONS
            return False
        self._active += 1
        self._peak = max(self._peak, self._active)
        return True

    def leave(self, elapsed_ms: float, given_ms: float) -> None:
        """An admitted request has ended, `elapsed_ms` after its handler began; it was given `given_ms`."""
        self._active -= 1
        self._shares.append((elapsed_ms + self.lag_ms) / max(given_ms, 1.0))

    def tick(self, late_ms: float) -> None:
        """The loop is `late_ms` late just now; to be called every few milliseconds."""
        self._lags_ms.append(late_ms)
        now = self._clock.monotonic()
        if now - self._decided_at < _INTERVAL_SECONDS:
            return
        self.lag_ms = float(np.mean(self._lags_ms))
        self._decide_quality()
        self._decide_limit()
        self._decided_at, self._peak = now, self._active
        self._lags_ms.clear()

    def _decide_quality(self) -> None:
        if len(self._shares) >= _LEAST_ANSWERS:
            pressure = self._pressure = float(np.percentile(self._shares, 95))
            self._shares.clear()
            if pressure > _BUSY:
                self.quality = max(LEAST_QUALITY, self.quality * _DOWN)
                return
            if pressure > _AT_EASE:
                return
        elif self._active:
            return
        # At ease, or nothing to do at all.
        self._pressure = 0.0
        self.quality = min(1.0, self.quality + _UP)

    def _decide_limit(self) -> None:
        self._pressed = max(0, self._pressed - 1)
        if self.lag_ms > _LATE_MS:
            # From what there was at most: a limit that nobody comes near limits nothing.
            self._limit = max(min(_LEAST_LIMIT, self._limit_max), min(self._limit, self._peak) * _LESS)
            self._ceiling = self._limit
        elif self.lag_ms < _PUNCTUAL_MS:
            if self._peak <= self._limit:
                # What was right for a crowd is not for the next one, after a pause.
                self._limit = max(min(self._limit, 2 * self._peak), min(self._limit + 1, self._first))
                self._ceiling = self._limit_max
            elif self._pressure < _BUSY:
                more = self._limit * _MORE if self._limit < self._ceiling else self._limit + _STEP
                self._limit = min(self._limit_max, more)
