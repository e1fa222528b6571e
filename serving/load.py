"""How much the front door takes on: requests at once, and candidates for each, by how late its answers are.

Asked by `serving.recommender` before each request and told after it. Two answers to pressure, the gentle one first:
the quality factor (fewer candidates are retrieved and ranked), then the limit of requests at once (the others are
answered from the lower rungs). Invariant: pure but for its clock; a dependency that is slow at low load costs quality,
never admission.
"""

from collections import deque

import numpy as np

from core.clock import Clock

# Decisions are made from this many answers, not more often than this.
_WINDOW = 200
_INTERVAL_SECONDS = 0.1
_LEAST_ANSWERS = 10
# Share of the given time that the p95 takes. Above the first, quality falls; above the second, fewer are let in;
# below the third both rise again.
_BUSY, _TOO_BUSY, _AT_EASE = 0.4, 0.6, 0.25
_DOWN, _UP = 0.8, 0.05
LEAST_QUALITY = 0.2
# Enough for any trickle of requests to a dependency that answers in the last moment.
_LEAST_LIMIT = 8


class LoadControl:
    """The quality factor and the limit of requests at once.

    Args:
        limit_max: requests at once when there is no pressure.
        clock: for the pace of decisions.
    """

    def __init__(self, limit_max: int, clock: Clock) -> None:
        self._limit_max = limit_max
        self._clock = clock
        self._shares: deque[float] = deque(maxlen=_WINDOW)
        self._decided_at = clock.monotonic()
        self._fresh_answers = 0
        self._active = 0
        self._peak = 0
        self.limit = limit_max
        # 1 = as many candidates as the settings say, down to LEAST_QUALITY of them.
        self.quality = 1.0

    def enter(self) -> bool:
        """Whether one more request may go through all stages; if so, `leave` is to be called after it."""
        if self._active >= self.limit:
            return False
        self._active += 1
        self._peak = max(self._peak, self._active)
        return True

    def leave(self, elapsed_ms: float, given_ms: float) -> None:
        """An admitted request has ended.

        Args:
            elapsed_ms: from its arrival at this process, queues included, to the answer.
            given_ms: its deadline, as of the arrival.
        """
        self._active -= 1
        self._shares.append(elapsed_ms / max(given_ms, 1.0))
        self._fresh_answers += 1
        now = self._clock.monotonic()
        if self._fresh_answers >= _LEAST_ANSWERS and now - self._decided_at >= _INTERVAL_SECONDS:
            self._decide()
            self._decided_at, self._fresh_answers, self._peak = now, 0, self._active

    def _decide(self) -> None:
        # Those since the last decision: older ones were answered under other conditions.
        recent = list(self._shares)[-max(self._fresh_answers, _LEAST_ANSWERS) :]
        pressure = float(np.percentile(recent, 95))
        if pressure > _BUSY:
            self.quality = max(LEAST_QUALITY, self.quality * _DOWN)
        elif pressure < _AT_EASE:
            self.quality = min(1.0, self.quality + _UP)
        if pressure > _TOO_BUSY:
            # From what there was at most: a limit that nobody comes near limits nothing.
            self.limit = max(_LEAST_LIMIT, int(min(self.limit, self._peak) * _DOWN))
        elif pressure < _BUSY and self._peak >= self.limit:
            self.limit = min(self._limit_max, self.limit + max(1, self.limit // 10))
        elif pressure < _AT_EASE:
            self.limit = min(self._limit_max, self.limit + 1)
