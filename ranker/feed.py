"""Keeps the release fresh and current: follows the compacted topics, swaps to the registry's new bundle.

Invariant: each release has one writer, its own follower's thread; a bundle that does not load leaves the one that
serves in place; Kafka being away delays news and never ends the service.
"""

import asyncio
from collections.abc import Mapping

from core import bundle as bundles
from core.clock import Clock
from core.codec import check_item, decode
from core.errors import ArtifactError, MalformedEventError
from core.kafka import Record, TopicFollower
from core.process import freeze_heap
from core.settings import Settings
from core.telemetry import get_logger
from core.topics import Topics
from headrace.v1.events_pb2 import Item, ItemStats
from ranker import metrics
from ranker.release import Release, load_release

_log = get_logger("ranker")
# A new bundle's release waits so long for the topics before it serves with what it has.
_SWAP_WAIT_SECONDS = 30.0


class CatalogFeed:
    """Applies the items and item-stats topics to one release."""

    def __init__(self, release: Release, settings: Settings) -> None:
        self._release = release
        self._topics = Topics(settings.kafka.topic_prefix)
        self._follower = TopicFollower(
            settings.kafka,
            (self._topics.items, self._topics.item_stats),
            self.apply,
            _start_offsets(release.manifest, settings),
        )

    def start(self) -> None:
        self._follower.start()

    def stop(self) -> None:
        self._follower.stop()

    @property
    def has_caught_up(self) -> bool:
        return self._follower.caught_up.is_set()

    def wait(self, timeout_seconds: float) -> bool:
        """Whether everything that was in the topics at the start is applied, within the time given."""
        return self._follower.caught_up.wait(timeout_seconds)

    def apply(self, records: list[Record]) -> None:
        """Applies messages in order; those that cannot be read are counted and left out."""
        for record in records:
            try:
                self._apply_one(record)
            except MalformedEventError as error:
                metrics.malformed.labels(record.topic).inc()
                _log.warning("left out", topic=record.topic, offset=record.offset, problem=str(error))

    def _apply_one(self, record: Record) -> None:
        if record.topic == self._topics.items:
            if record.value is None:
                self._release.remove_item(record.key.decode("utf-8", "replace"))
                return
            item = decode(Item(), record.value, record.headers)
            check_item(item)
            self._release.put_item(item)
        elif record.value is not None:
            stats = decode(ItemStats(), record.value, record.headers)
            if stats.item_id:
                self._release.put_stats(stats)


class Releases:
    """The release that serves, and its successors."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        """Loads the registry's current bundle. Raises ArtifactError where there is none, or it is broken."""
        self._settings = settings
        self._clock = clock
        self._refused = ""
        self._release, self.feed = self._open(bundles.current_version(settings.registry.path))

    @property
    def current(self) -> Release:
        return self._release

    def close(self) -> None:
        self.feed.stop()

    async def watch(self) -> None:
        """Swaps to what CURRENT names, whenever that changes, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.registry.watch_interval_ms / 1000)
            await self.look()

    async def look(self) -> bool:
        """Loads what CURRENT names, where that is another version that was not refused; whether it serves now."""
        version = ""
        try:
            version = await asyncio.to_thread(bundles.current_version, self._settings.registry.path)
            if version in (self._release.manifest.bundle_version, self._refused):
                return False
            await asyncio.to_thread(self._swap, version)
        except ArtifactError as error:
            if version != self._refused or not version:
                metrics.loads.labels("refused").inc()
                _log.warning("the new bundle is refused, the old one serves on", problem=str(error))
            self._refused = version
            return False
        return True

    def _open(self, version: str) -> tuple[Release, CatalogFeed]:
        bundle = bundles.open_bundle(self._settings.registry.path / version)
        release = load_release(bundle, self._settings, self._clock)
        return release, CatalogFeed(release, self._settings)

    def _swap(self, version: str) -> None:
        release, feed = self._open(version)
        feed.start()
        # Where Kafka was away before, it is not waited for again.
        if self.feed.has_caught_up and not feed.wait(_SWAP_WAIT_SECONDS):
            _log.warning("kafka is away: the new bundle serves without what came since it was made")
        freeze_heap()
        tell_loaded(release)
        before, self.feed, self._release = self.feed, feed, release
        before.stop()
        _log.info("bundle swapped", bundle=version, model=release.model_version, items=len(release.catalog))


def tell_loaded(release: Release) -> None:
    metrics.loads.labels("loaded").inc()
    metrics.load_time.set(release.load_time_ms / 1000)


def _start_offsets(manifest: bundles.Manifest, settings: Settings) -> Mapping[tuple[str, int], int]:
    """Where to begin: behind what the bundle includes, if it was made from this very log."""
    if manifest.log_id != settings.kafka.log_id:
        return {}
    offsets = {}
    for where, offset in manifest.follow_offsets.items():
        topic, _, partition = where.rpartition("/")
        offsets[(topic, int(partition))] = offset
    return offsets
