"""The three baselines that any model has to clear: popularity, recent popularity, first-order Markov.

Evaluation plays a log through them beside the models. Invariant: each knows just what it has observed so far, so all
of them are as fresh as the stream would be; scores are higher for better, over all catalogue rows.
"""

from collections import Counter, defaultdict, deque
from typing import Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]


class Baseline(Protocol):
    """Scores every item for one user, from the events observed so far."""

    name: str

    def observe(self, user_id: str, row: int, time_ms: int) -> None:
        """One event: the user chose the item of this catalogue row. In event-time order."""
        ...

    def scores(self, user_id: str, now_ms: int) -> Scores:
        """Shape [n]."""
        ...


class Popularity:
    """How often each item was chosen."""

    name = "popularity"

    def __init__(self, items: int) -> None:
        self._counts = np.zeros(items, np.float64)

    def observe(self, user_id: str, row: int, time_ms: int) -> None:  # noqa: ARG002 - the protocol's
        self._counts[row] += 1

    def scores(self, user_id: str, now_ms: int) -> Scores:  # noqa: ARG002 - the protocol's
        return self._counts


class RecentPopularity:
    """How often each item was chosen in the last days; ties, and silence, by popularity of all time."""

    def __init__(self, items: int, window_days: int = 7) -> None:
        self.name = f"popularity, last {window_days} days"
        self._window_ms = window_days * 86_400_000
        self._all = np.zeros(items, np.float64)
        self._recent = np.zeros(items, np.float64)
        self._events: deque[tuple[int, int]] = deque()

    def observe(self, user_id: str, row: int, time_ms: int) -> None:  # noqa: ARG002 - the protocol's
        self._all[row] += 1
        self._recent[row] += 1
        self._events.append((time_ms, row))

    def scores(self, user_id: str, now_ms: int) -> Scores:  # noqa: ARG002 - the protocol's
        while self._events and self._events[0][0] <= now_ms - self._window_ms:
            self._recent[self._events.popleft()[1]] -= 1
        return self._recent + below_one(self._all)


class Markov:
    """How often each item came right after the user's last one, whoever did so; ties by popularity."""

    name = "first-order Markov"

    def __init__(self, items: int) -> None:
        self._all = np.zeros(items, np.float64)
        self._last: dict[str, int] = {}
        self._next: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def observe(self, user_id: str, row: int, time_ms: int) -> None:  # noqa: ARG002 - the protocol's
        self._all[row] += 1
        last = self._last.get(user_id)
        if last is not None and last != row:
            self._next[last][row] += 1
        self._last[user_id] = row

    def scores(self, user_id: str, now_ms: int) -> Scores:  # noqa: ARG002 - the protocol's
        scores = below_one(self._all)
        after = self._next.get(self._last.get(user_id, -1))
        if after:
            scores[list(after)] += np.fromiter(after.values(), np.float64, len(after))
        return scores


def below_one(counts: Scores) -> Scores:
    """Counts scaled below 1, so that they break ties among whole numbers and decide nothing else."""
    scaled: Scores = counts / np.float64(counts.max(initial=0) + 1)
    return scaled


def all_baselines(items: int) -> list[Baseline]:
    return [Popularity(items), RecentPopularity(items), Markov(items)]
