"""Keeps the snapshot fresh and current: follows the compacted topics, swaps to the registry's new bundle.

Invariant: each snapshot has one writer, its own follower's thread; a bundle that does not load leaves the one that
serves in place; Kafka being away delays news and never ends the service.
"""

import asyncio

from candidate import metrics
from candidate.snapshot import Snapshot, load_snapshot
from core import bundle as bundles
from core.errors import ArtifactError
from core.settings import Settings
from core.telemetry import get_logger
from features.catalog_feed import CatalogFeed

_log = get_logger("candidate")
# Kafka counts as away when the topics, not yet caught up with, bring nothing for this long. It may be away for hours:
# the bundle is enough to answer from.
AWAY_SECONDS = 5.0


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
        return snapshot, CatalogFeed(snapshot, snapshot.manifest, self._settings, _count_malformed, snapshot.tidy)

    def _swap(self) -> None:
        snapshot, feed = self._open()
        feed.start()
        # Where the old one hears nothing either, there is nothing to wait for.
        if not feed.catch_up(AWAY_SECONDS if self.feed.has_caught_up else 0.0):
            _log.warning("kafka is away: the new bundle serves without what came since it was made")
        before, self.feed, self._snapshot = self.feed, feed, snapshot
        before.stop()
        _log.info("bundle swapped", bundle=snapshot.manifest.bundle_version, items=len(snapshot.catalog))


def _count_malformed(topic: str) -> None:
    metrics.malformed.labels(topic).inc()
