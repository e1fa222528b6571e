"""Keeps the release fresh and current: follows the compacted topics, swaps to the registry's new bundle.

Invariant: each release has one writer, its own follower's thread; a bundle that does not load leaves the one that
serves in place; Kafka being away delays news and never ends the service.
"""

import asyncio

from core import bundle as bundles
from core.clock import Clock
from core.errors import ArtifactError
from core.process import freeze_heap
from core.settings import Settings
from core.telemetry import get_logger
from features.catalog_feed import CatalogFeed
from ranker import metrics
from ranker.release import Release, load_release

_log = get_logger("ranker")
# A new bundle's release waits so long for the topics before it serves with what it has.
_SWAP_WAIT_SECONDS = 30.0


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
        return release, CatalogFeed(release, release.manifest, self._settings, _count_malformed)

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


def _count_malformed(topic: str) -> None:
    metrics.malformed.labels(topic).inc()
