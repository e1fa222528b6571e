"""Keeps the snapshot fresh and current: follows the topics, swaps to the registry's new bundle.

Invariant: each part of a snapshot has one writer, a follower's thread of its own; a bundle that does not load leaves
the one that serves in place; Kafka being away delays news and never ends the service.
"""

import asyncio
from collections.abc import Callable

from candidate import metrics
from candidate.event_feed import EventFeed
from candidate.snapshot import Snapshot, load_snapshot
from core import bundle as bundles
from core.errors import ArtifactError
from core.feed import TopicFeed
from core.pace import beside_calls
from core.settings import Settings
from core.telemetry import get_logger
from features.catalog_feed import CatalogFeed

_log = get_logger("candidate")
# Kafka counts as away when the topics, not yet caught up with, bring nothing for this long. It may be away for hours:
# the bundle is enough to answer from.
AWAY_SECONDS = 5.0


class Feeds:
    """What keeps one snapshot fresh."""

    def __init__(self, snapshot: Snapshot, settings: Settings) -> None:
        self.catalog = CatalogFeed(
            snapshot, snapshot.manifest, settings, metrics.count_malformed, snapshot.apply_changes
        )
        # Without a quota nobody asks for the pairs, and the replica saves itself the reading of all events.
        has_quota = settings.candidate.quotas["co_visitation"] > 0
        self.events = EventFeed(snapshot.co_visitation, settings) if has_quota else None
        self._all: tuple[TopicFeed, ...] = (self.catalog,) if self.events is None else (self.catalog, self.events)

    def start(self) -> None:
        for feed in self._all:
            feed.start()

    def stop(self) -> None:
        for feed in self._all:
            feed.stop()

    @property
    def has_caught_up(self) -> bool:
        return all(feed.has_caught_up for feed in self._all)

    def catch_up(self, away_seconds: float, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Waits for each of them (`TopicFeed.catch_up`)."""
        return all(feed.catch_up(away_seconds, is_stopping) for feed in self._all)


class Snapshots:
    """The snapshot that serves, and its successors."""

    def __init__(self, settings: Settings) -> None:
        """Loads the registry's current bundle. Raises ArtifactError where there is none, or it is broken."""
        self._settings = settings
        self._refused = ""
        self._snapshot, self.feeds = self._open()

    @property
    def current(self) -> Snapshot:
        return self._snapshot

    def close(self) -> None:
        self.feeds.stop()

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

    def _open(self) -> tuple[Snapshot, Feeds]:
        snapshot = load_snapshot(bundles.open_current(self._settings.registry.path), self._settings)
        return snapshot, Feeds(snapshot, self._settings)

    def _swap(self) -> None:
        with beside_calls():
            snapshot, feeds = self._open()
        feeds.start()
        # Where the old one hears nothing either, there is nothing to wait for.
        if not feeds.catch_up(AWAY_SECONDS if self.feeds.has_caught_up else 0.0):
            _log.warning("kafka is away: the new bundle serves without what came since it was made")
        before, self.feeds, self._snapshot = self.feeds, feeds, snapshot
        before.stop()
        _log.info("bundle swapped", bundle=snapshot.manifest.bundle_version, items=len(snapshot.catalog))
