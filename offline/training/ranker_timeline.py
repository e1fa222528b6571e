"""A log as arrays in event-time order: what each user had done, what existed and what trended at any moment.

Retrieves for the ranker's training rows without playing the whole log. Invariant: `history_before` is the history that
the user's state holds just before that time.
"""

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from core.settings import FeaturesSettings
from features.catalog import Catalog, Floats
from features.transforms import engagement_weight
from features.windows import Interaction, UserEvent
from offline.replay import Entry

Mask = npt.NDArray[np.bool_]
Times = npt.NDArray[np.int64]
_NEVER_MS = np.iinfo(np.int64).max


class Timeline:
    """The events of a log.

    Args:
        entries: in event-time order.
        catalog: the items; only their rows and attributes are read. [n]
        settings: what is kept, and what it weighs.
    """

    def __init__(self, entries: Iterable[Entry], catalog: Catalog, settings: FeaturesSettings) -> None:
        self._length = settings.history_length
        self._half_life_ms = settings.half_lives_seconds[0] * 1000
        self._catalog, self._settings = catalog, settings
        self._histories: dict[str, list[Interaction]] = {}
        events = [self._remember(entry) for entry in entries if isinstance(entry, UserEvent)]
        # (row, time, weight) of the events on items that the catalogue has.
        known = np.array([event for event in events if event[0] >= 0], np.float64).reshape(-1, 3)
        self._rows, self._times, self._weights = known[:, 0].astype(np.int64), known[:, 1].astype(np.int64), known[:, 2]
        self._first_ms: Times = np.full(len(catalog), _NEVER_MS, np.int64)
        np.minimum.at(self._first_ms, self._rows, self._times)
        self._popularity = np.zeros(len(catalog), np.float64)
        self._applied, self._as_of_ms = 0, int(self._times[0]) if len(self._times) else 0

    def history_before(self, user_id: str, time_ms: int) -> list[Interaction]:
        """The user's last interactions before `time_ms`, oldest first."""
        history = self._histories.get(user_id, [])
        end = bisect_left(history, (time_ms,))
        return history[max(0, end - self._length) : end]

    def known(self, time_ms: int) -> Mask:
        """Which items could be recommended: published by then, or (where that is not said) seen before then; [n]."""
        published: Mask = self._catalog.column("publish_ms") > 0
        return self._catalog.servable(time_ms) & (published | (self._first_ms < time_ms))

    def popularity(self, time_ms: int) -> Floats:
        """Engagement of all items with the shortest half-life, just before `time_ms`, which must not go back; [n]."""
        end = int(np.searchsorted(self._times, time_ms))
        part = slice(self._applied, end)
        self._popularity *= 2.0 ** ((self._as_of_ms - time_ms) / self._half_life_ms)
        growth = 2.0 ** ((self._times[part] - time_ms) / self._half_life_ms)
        np.add.at(self._popularity, self._rows[part], self._weights[part] * growth)
        self._applied, self._as_of_ms = end, time_ms
        return self._popularity.astype(np.float32)

    def _remember(self, event: UserEvent) -> tuple[int, int, float]:
        entry = Interaction(event.time_ms, event.event_hash, event.item_id, event.kind, event.value)
        history = self._histories.setdefault(event.user_id, [])
        # In order but for ties, which the state puts in the order of their hashes.
        history.append(entry)
        if len(history) > 1 and history[-2] > entry:
            history.sort()
        weight = engagement_weight(event.kind, event.value, event.confidence, self._settings)
        return self._catalog.row(event.item_id), event.time_ms, max(0.0, weight)
