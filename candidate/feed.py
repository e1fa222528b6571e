"""Keeps the snapshot fresh and current: follows the compacted topics, swaps to the registry's new bundle.

Invariant: each snapshot has one writer, its own follower's thread; a bundle that does not load leaves the one that
serves in place; Kafka being away delays news and never ends the service.
"""

import asyncio
from collections.abc import Callable, Mapping

from candidate import metrics
from candidate.snapshot import Snapshot, load_snapshot
from core import bundle as bundles
from core.clock import SystemClock
from core.codec import check_item, decode
from core.errors import ArtifactError, MalformedEventError
from core.kafka import Record, TopicFollower
from core.settings import Settings
from core.telemetry import get_logger
from core.topics import Topics
from headrace.v1.events_pb2 import Item, ItemStats

_log = get_logger("candidate")
# Kafka counts as away when the topics, not yet caught up with, bring nothing for this long. It may be away for hours:
# the bundle is enough to answer from.
AWAY_SECONDS = 5.0


class CatalogFeed:
    """Applies the items and item-stats topics to one snapshot."""

    def __init__(self, snapshot: Snapshot, settings: Settings) -> None:
        self._snapshot = snapshot
        self._topics = Topics(settings.kafka.topic_prefix)
        self._follower = TopicFollower(
            settings.kafka,
            (self._topics.items, self._topics.item_stats),
            self.apply,
            _start_offsets(snapshot.manifest, settings),
        )
        self._clock = SystemClock()
        self._heard_at = self._clock.monotonic()

    def start(self) -> None:
        self._heard_at = self._clock.monotonic()
        self._follower.start()

    def stop(self) -> None:
        self._follower.stop()

    @property
    def has_caught_up(self) -> bool:
        return self._follower.caught_up.is_set()

    def catch_up(self, away_seconds: float, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Waits until what was in the topics at the start is applied; False where Kafka is away (or on stopping)."""
        while not self._follower.caught_up.wait(0.05):
            if is_stopping() or self._clock.monotonic() - self._heard_at > away_seconds:
                return False
        return True

    def apply(self, records: list[Record]) -> None:
        """Applies messages in order; those that cannot be read are counted and left out."""
        self._heard_at = self._clock.monotonic()
        for record in records:
            try:
                self._apply_one(record)
            except MalformedEventError as error:
                metrics.malformed.labels(record.topic).inc()
                _log.warning("left out", topic=record.topic, offset=record.offset, problem=str(error))
        self._snapshot.rebuild_index_if_due()
        self._snapshot.tell_sizes()

    def _apply_one(self, record: Record) -> None:
        if record.topic == self._topics.items:
            if record.value is None:
                self._snapshot.remove_item(record.key.decode("utf-8", "replace"))
                return
            item = decode(Item(), record.value, record.headers)
            check_item(item)
            self._snapshot.put_item(item)
        elif record.value is not None:
            stats = decode(ItemStats(), record.value, record.headers)
            if stats.item_id:
                self._snapshot.put_stats(stats)


class Snapshots:
    """The snapshot that serves, and its successors."""

    def __init__(self, settings: Settings) -> None:
        """Loads the registry's current bundle. Raises ArtifactError where there is none, or it is broken."""
        self._settings = settings
        self._refused = ""
        self._snapshot, self.feed = self._open()

    @property
    def current(self) -> Snapshot:
        return self._snapshot

    def close(self) -> None:
        self.feed.stop()

    async def watch(self) -> None:
        """Swaps to what CURRENT names, whenever that changes, until cancelled."""
        registry = self._settings.registry
        while True:
            await asyncio.sleep(registry.watch_interval_ms / 1000)
            version = ""
            try:
                version = await asyncio.to_thread(bundles.current_version, registry.path)
                if version not in (self._snapshot.manifest.bundle_version, self._refused):
                    await asyncio.to_thread(self._swap)
            except ArtifactError as error:
                if version != self._refused or not version:
                    _log.warning("the new bundle is refused, the old one serves on", problem=str(error))
                self._refused = version

    def _open(self) -> tuple[Snapshot, CatalogFeed]:
        snapshot = load_snapshot(bundles.open_current(self._settings.registry.path), self._settings)
        return snapshot, CatalogFeed(snapshot, self._settings)

    def _swap(self) -> None:
        snapshot, feed = self._open()
        feed.start()
        # Where the old one hears nothing either, there is nothing to wait for.
        if not feed.catch_up(AWAY_SECONDS if self.feed.has_caught_up else 0.0):
            _log.warning("kafka is away: the new bundle serves without what came since it was made")
        before, self.feed, self._snapshot = self.feed, feed, snapshot
        before.stop()
        _log.info("bundle swapped", bundle=snapshot.manifest.bundle_version, items=len(snapshot.catalog))


def _start_offsets(manifest: bundles.Manifest, settings: Settings) -> Mapping[tuple[str, int], int]:
    """Where to begin: behind what the bundle includes, if it was made from this very log."""
    if manifest.log_id != settings.kafka.log_id:
        return {}
    offsets = {}
    for where, offset in manifest.follow_offsets.items():
        topic, _, partition = where.rpartition("/")
        offsets[(topic, int(partition))] = offset
    return offsets
