"""Popularity: the most popular items, overall and per segment of users, as rows of the popularity view.

Follows the items and item-stats topics on top of the serving bundle, as every replica does, so each worker knows the
sums of all partitions. Invariant: a derived row; losing it costs nothing, the next interval writes it again.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from core.bundle import current_version, open_current
from core.errors import ArtifactError, MalformedEventError, StageError
from core.kafka import GATHER_LONG_MS, Record, TopicFollower
from core.settings import Settings
from core.telemetry import get_logger
from core.topics import Topics
from features.catalog import Catalog
from features.catalog_feed import apply_record
from features.definitions import POPULARITY
from features.stores.layout import Cell
from features.stores.online import OnlineStore, Write
from headrace.v1.events_pb2 import Item, ItemStats

_log = get_logger("streams.popularity")

ALL = "all"
# About half a millisecond's work, and a longer pause.
_SIP_ROWS, _SIP_PAUSE_SECONDS = 30, 0.002


class PopularityWriter:
    """The catalogue with everybody's statistics, a thread that follows the topics and one that writes."""

    def __init__(self, settings: Settings, store: OnlineStore, is_mine: Callable[[], bool] = lambda: True) -> None:
        """`is_mine` says whether this worker is the one of the group that writes."""
        self._is_mine = is_mine
        self._settings = settings
        self._store = store
        self._topics = Topics(settings.kafka.topic_prefix)
        self._lock = threading.Lock()
        self._bundle_version = ""
        self._catalog = Catalog(settings.features)
        self._watermark_ms = 0
        # The newest row of each item and partition since the last write; taken in then, each once.
        self._waiting: dict[bytes, Record] = {}
        # What the items topic has said since the start: newer than any bundle that comes.
        self._news: dict[str, Item] = {}
        self._gone: set[str] = set()
        self._written = -1
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="popularity", daemon=True)
        topics = (self._topics.items, self._topics.item_stats)
        self._follower = TopicFollower(settings.kafka, topics, self.on_records, gather_ms=GATHER_LONG_MS)

    def start(self) -> None:
        self._follower.start()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._follower.stop()
        if self._thread.is_alive():
            self._thread.join()

    def on_records(self, records: Sequence[Record]) -> None:
        with self._lock:
            for record in records:
                if record.topic == self._topics.item_stats:
                    self._waiting[record.key] = record
                else:
                    self._follow(record)

    def write(self) -> bool:
        """Writes the row if anything has changed; True when it did.

        Raises:
            StageError: the store did not take it.
        """
        if not self._is_mine():
            return False
        self._load_bundle()
        self._take_in()
        with self._lock:
            catalog = self._catalog
            if catalog.revision == self._written or not len(catalog):
                return False
            revision = catalog.revision
            watermark_ms, count = self._watermark_ms, self._settings.offline.popularity_items
            lists = {name: most_popular_in(name, catalog, watermark_ms, count) for name in catalog.segments()}
            lists[ALL] = most_popular(catalog, watermark_ms, count)
        writes = [_write(name, items, scores, watermark_ms) for name, (items, scores) in lists.items() if items]
        self._store.write(writes)
        self._written = revision
        return bool(writes)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.write()
            except StageError as error:
                # It may have lost the row, too.
                self._written = -1
                _log.debug("popularity waits", problem=str(error))
            except Exception as error:  # noqa: BLE001 - one odd row must not end the thread
                _log.error("unexpected error in popularity, going on", error=repr(error))
            self._stopping.wait(self._settings.streams.popularity_interval_ms / 1000)

    def _take_in(self) -> None:
        """Counts what waits, in sips: the batch reader's round trips are not to stand behind a thousand rows."""
        with self._lock:
            waiting, self._waiting = list(self._waiting.values()), {}
        for start in range(0, len(waiting), _SIP_ROWS):
            with self._lock:
                for record in waiting[start : start + _SIP_ROWS]:
                    self._follow(record)
            self._stopping.wait(_SIP_PAUSE_SECONDS)

    def _follow(self, record: Record) -> None:
        try:
            apply_record(record, self._topics, self)
        except MalformedEventError as error:
            # The agent that owns the topic sends it to the dead letters.
            _log.debug("record left out", topic=record.topic, offset=record.offset, problem=str(error))

    def put_item(self, item: Item) -> None:
        self._catalog.upsert(item)
        self._news[item.item_id] = item
        self._gone.discard(item.item_id)

    def remove_item(self, item_id: str) -> None:
        self._catalog.remove(item_id)
        self._news.pop(item_id, None)
        self._gone.add(item_id)

    def put_stats(self, stats: ItemStats) -> None:
        self._catalog.put_stats(stats)
        self._watermark_ms = max(self._watermark_ms, stats.watermark_ms)

    def _load_bundle(self) -> None:
        """Takes items and statistics of the serving bundle, again when there is another one."""
        registry = self._settings.registry.path
        try:
            if current_version(registry) == self._bundle_version:
                return
            bundle = open_current(registry)
            fresh, watermark_ms = Catalog.of_items(bundle.items(), self._settings.features), 0
            for stats in bundle.item_stats():
                fresh.put_stats(stats)
                watermark_ms = max(watermark_ms, stats.watermark_ms)
        except ArtifactError as error:
            if not self._bundle_version:
                _log.debug("popularity of the stream alone", problem=str(error))
            return
        with self._lock:
            # What came over the topics since the start is newer than the bundle.
            old = self._catalog
            for item in self._news.values():
                fresh.upsert(item)
            for item_id in self._gone:
                fresh.remove(item_id)
            for item_id, partition, partial in old.partials():
                if partition >= 0:
                    fresh.put_partial(item_id, partition, partial)
            self._watermark_ms = max(self._watermark_ms, watermark_ms)
            self._catalog, self._bundle_version, self._written = fresh, bundle.version, -1


def most_popular(catalog: Catalog, as_of_ms: int, count: int) -> tuple[list[str], list[float]]:
    """Items, best first, and their decayed engagement.

    As of the newest event, not of now: a history that is played again is as fresh as its events.
    """
    scores = catalog.popularity(as_of_ms)
    servable = catalog.servable(as_of_ms)
    scores = np.where(servable, scores, 0) if servable.any() else scores
    order = np.argsort(-scores, kind="stable")[:count]
    best = [int(row) for row in order if scores[row] > 0]
    return [catalog.item_ids[row] for row in best], [float(scores[row]) for row in best]


def most_popular_in(segment: str, catalog: Catalog, as_of_ms: int, count: int) -> tuple[list[str], list[float]]:
    """The same among the users of a segment."""
    rows, log2 = catalog.segment_popularity(segment)
    servable = catalog.servable(as_of_ms)
    if servable.any():
        rows, log2 = rows[servable[rows]], log2[servable[rows]]
    scores = catalog.decayed(log2[:count], as_of_ms)
    return [catalog.item_ids[row] for row in rows[:count]], scores.tolist()


def _write(segment: str, items: list[str], scores: list[float], watermark_ms: int) -> Write:
    cells: dict[str, Cell] = {
        "popular_item_ids": items,
        "popular_scores": scores,
        "popular_watermark_ms": watermark_ms,
    }
    return Write(POPULARITY, (segment,), cells)
