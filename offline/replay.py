"""A log played in event time through the very functions that the stream runs: user states, item statistics, catalogue.

Training rows, evaluation, batch scores and the parity tests all come from here. Invariant: after `advance(entries)` a
state equals what the stream holds for the same events, and `catalog` holds exactly the statistics of what was applied
(they are brought up to date when the catalogue is asked for: no lag, and no cost for items that nobody looked at).
"""

from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from core.settings import FeaturesSettings
from features import item_stats, windows
from features.catalog import Catalog
from features.item_stats import ItemPartial
from features.stores.event_log import EventLog, user_events
from features.stores.event_rows import FEEDBACK, IMPRESSIONS
from features.transforms import stable_hash
from features.windows import IMPRESSION, Outcome, UserEvent, UserState
from headrace.v1.events_pb2 import Item, ItemStats

# Source partition of the statistics that come from a log: the stream's partitions are 0 and up, readers add up all.
LOG_PARTITION = -1
_BATCH_LISTS = 16_384
SHOWN_COLUMNS = ("user_id", "event_id", "event_time", "impressions")


class Shown(NamedTuple):
    """One answer that was shown: an event of the user, and an impression of each of its items."""

    event: UserEvent
    item_ids: tuple[str, ...]

    @property
    def time_ms(self) -> int:
        return self.event.time_ms


Entry = UserEvent | Shown


class Group(NamedTuple):
    """Events of one user at one time: predicted together, from the state before the first of them."""

    user_id: str
    time_ms: int
    events: list[UserEvent]


class Replay:
    """All states and statistics as of one point of a log.

    Args:
        items: the catalogue; row i of `catalog` is the i-th item. Items that only events name get the rows after them.
        settings: what is kept, and what it weighs.
    """

    def __init__(self, items: Iterable[Item], settings: FeaturesSettings) -> None:
        self.states: dict[str, UserState] = {}
        self.watermark_ms = 0
        # item_id -> its statistics.
        self.partials: dict[str, ItemPartial] = {}
        self._settings = settings
        self._catalog = Catalog(settings)
        self._touched: set[str] = set()
        for item in items:
            self._catalog.upsert(item)

    @property
    def catalog(self) -> Catalog:
        """The catalogue with the statistics of everything applied so far (source partition -1)."""
        if self._touched:
            # Sorted: the rows of items that only events name must not depend on the hash seed.
            for item_id in sorted(self._touched):
                self._catalog.put_partial(item_id, LOG_PARTITION, self.partials[item_id])
            self._touched.clear()
        return self._catalog

    def state(self, user_id: str) -> UserState:
        """The user's state; an empty one for a user without events. Later events change it in place."""
        return self.states.get(user_id) or UserState()

    def advance(self, entries: Iterable[Entry]) -> int:
        """Applies entries, in event-time order; returns how many counted (duplicates do not)."""
        applied = 0
        for entry in entries:
            applied += self._apply(entry)
        return applied

    def groups(self, entries: Iterable[Entry]) -> Iterator[Group]:
        """Plays entries in event-time order and stops before each group.

        While a group is looked at, nothing of its time or later has been applied. What is merely shown forms no group.
        """
        for time_ms, slice_ in groupby(entries, key=attrgetter("time_ms")):
            now = list(slice_)
            by_user: dict[str, list[UserEvent]] = {}
            for entry in now:
                if isinstance(entry, UserEvent):
                    by_user.setdefault(entry.user_id, []).append(entry)
            for user_id, events in by_user.items():
                yield Group(user_id, time_ms, events)
            self.advance(now)

    def known_items(self, now_ms: int) -> npt.NDArray[np.bool_]:
        """Which items exist by then: published at a time that has come, or seen in an event. Shape [n]."""
        catalog = self.catalog
        publish_ms = catalog.column("publish_ms")
        known: npt.NDArray[np.bool_] = (publish_ms > 0) & (publish_ms <= now_ms)
        return known | (catalog.column("stats_revision") > 0)

    def item_stats(self) -> Iterator[ItemStats]:
        """The statistics as messages, one per item that has any, by item_id."""
        for item_id in sorted(self.partials):
            yield item_stats.as_message(item_id, LOG_PARTITION, self.partials[item_id], self._settings)

    def _apply(self, entry: Entry) -> bool:
        event = entry if isinstance(entry, UserEvent) else entry.event
        state = self.states.get(event.user_id)
        if state is None:
            state = self.states[event.user_id] = UserState()
        (outcome,) = windows.apply(state, (event,), self._settings)
        if outcome is not Outcome.APPLIED:
            return False
        self.watermark_ms = max(self.watermark_ms, event.time_ms)
        if isinstance(entry, Shown):
            for item_id in entry.item_ids:
                self._count_in(self.partials, event._replace(item_id=item_id))
            self._touched.update(entry.item_ids)
            return True
        self._count_in(self.partials, event)
        self._touched.add(event.item_id)
        return True

    def _count_in(self, partials: dict[str, ItemPartial], event: UserEvent) -> None:
        partial = partials.get(event.item_id)
        if partial is None:
            partial = partials[event.item_id] = ItemPartial()
        item_stats.apply(partial, event, self._settings)


def read_entries(log: EventLog, start_ms: int | None = None, end_ms: int | None = None) -> Iterator[Entry]:
    """All that a log says of users, in event-time order: events, feedback, and what was shown.

    At one time, what was shown comes first, then events, then feedback.
    """
    return merge(
        shown(log.rows(IMPRESSIONS, start_ms, end_ms, SHOWN_COLUMNS)),
        user_events(log.events(start_ms, end_ms)),
        user_events(log.rows(FEEDBACK, start_ms, end_ms)),
        key=attrgetter("time_ms"),
    )


def shown(rows: pa.Table) -> Iterator[Shown]:
    """Rows of IMPRESSIONS as entries, in their order."""
    for batch in rows.select(SHOWN_COLUMNS).to_batches(max_chunksize=_BATCH_LISTS):
        users, ids = batch["user_id"].to_pylist(), batch["event_id"].to_pylist()
        times = batch["event_time"].cast(pa.int64()).to_pylist()
        items = batch["impressions"].flatten().field("item_id").to_pylist()
        bounds = batch["impressions"].offsets.to_numpy()
        ends = (bounds - bounds[0]).tolist()
        for user, event_id, time_ms, begin, end in zip(users, ids, times, ends, ends[1:], strict=False):
            event = UserEvent(user, stable_hash(event_id), "", IMPRESSION, time_ms)
            yield Shown(event, tuple(items[begin:end]))
