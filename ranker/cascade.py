"""The cascade: where time is short, a light scorer cuts the lists before the network sees them.

When to cut, for ranker/release.py; how it is done is in ranker/scorer.py. Invariant: a batch is cut as a whole, for its
users are answered together, and only if a deadline in it is nearer than what the network took lately for so many
candidates.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from core.clock import Clock
from core.deadline import Deadline

# Kept free for the answer's way back, and a factor for calls that take longer than most.
_ANSWER_MS, _MARGIN = 1.0, 1.5
# Weight of the newest call, and how many times the estimate one call may count for: a hiccup is no pace.
_NEWEST, _MOST = 0.2, 2.0


class Cascade:
    """Knows what the network needs and says how many candidates to leave to it.

    Args:
        keep: of each list that is cut; 0 = none is.
        clock: measures the calls.
        ms_per_candidate: of the network; None until a call was measured.
    """

    def __init__(self, keep: int, clock: Clock, ms_per_candidate: float | None = None) -> None:
        self._keep, self._clock = keep, clock
        self._ms_per_candidate = ms_per_candidate

    def needs_ms(self, candidates: int) -> float:
        """What the network is expected to take for so many; 0 while nothing is known."""
        return (self._ms_per_candidate or 0.0) * candidates

    def keep(self, candidates: int, deadlines: Iterable[Deadline | None]) -> int | None:
        """How many of each list the network is to score, None = all.

        Args:
            candidates: of all lists of the batch.
            deadlines: of its users; None = no hurry.
        """
        left_ms = min((one.remaining_ms() for one in deadlines if one is not None), default=math.inf)
        is_short = left_ms - _ANSWER_MS < _MARGIN * self.needs_ms(candidates)
        return self._keep if self._keep and is_short else None

    @contextmanager
    def measured(self, candidates: int) -> Iterator[None]:
        """Learns from a call of the network on so many candidates, cut or not: or one slow hour would cut for ever."""
        started = self._clock.monotonic()
        yield
        if candidates:
            taken = (self._clock.monotonic() - started) * 1000 / candidates
            before = self._ms_per_candidate
            if before:
                taken = before + _NEWEST * (min(taken, _MOST * before) - before)
            self._ms_per_candidate = taken
