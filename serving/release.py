"""One release as serving holds it: manifest, catalogue, popularity, weights and rules; kept fresh, swapped whole.

Loaded at start from the registry's current bundle, then again whenever CURRENT moves. Invariant: a request reads one
release from beginning to end; a bundle that does not load leaves the one that serves in place.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from core import bundle as bundles
from core.bundle import Manifest, ReleaseBundle
from core.clock import Clock
from core.errors import ArtifactError
from core.pace import beside_calls
from core.settings import Settings
from core.telemetry import get_logger
from features.catalog import Catalog, Floats, Rows
from features.catalog_feed import CatalogFeed
from features.item_vectors import read_item_vectors
from headrace.v1.events_pb2 import Item, ItemStats
from serving.popular import PopularLists
from serving.rerank.rules import Rules
from serving.rules_file import RulesFile
from serving.withheld import Withheld

_log = get_logger("release")
_REFRESH_SECONDS = 1.0
# A new release waits so long for the catalogue's topics before it serves with what it has.
_CATCH_UP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Release:
    """What a request is answered from."""

    manifest: Manifest
    catalog: Catalog
    popular: PopularLists
    blend_weights: dict[str, float]
    rules: Rules
    # Of segments that have weights of their own.
    segment_weights: dict[str, dict[str, float]] = field(default_factory=dict)
    # Unit vectors of the bundle's items, where diversity goes by them. [n, d]
    vectors: Floats | None = None

    @property
    def version(self) -> str:
        return self.manifest.bundle_version

    def ids(self, rows: Rows) -> list[str]:
        """Item ids of catalogue rows."""
        return list(map(self.catalog.item_ids.__getitem__, rows.tolist()))

    def weights_for(self, segment: str) -> dict[str, float]:
        """Blend weights of a user of this segment."""
        return self.segment_weights.get(segment, self.blend_weights)

    def put_item(self, item: Item) -> None:
        self.catalog.upsert(item)

    def remove_item(self, item_id: str) -> None:
        self.catalog.remove(item_id)

    def put_stats(self, stats: ItemStats) -> None:
        self.catalog.put_stats(stats)


def load_release(bundle: ReleaseBundle, settings: Settings) -> Release:
    """Reads serving's part of a bundle.

    Raises:
        ArtifactError: a part is missing or broken, or nothing in it may be recommended.
    """
    catalog = Catalog.of_items(bundle.items(), settings.features)
    if not len(catalog):
        raise ArtifactError(f"bundle {bundle.version} has no items; import some and train again")
    if bundle.has(bundles.ITEM_STATS):
        catalog.put_all_stats(bundle.item_stats())
    popular = PopularLists(catalog, bundle.json(bundles.POPULARITY))
    weights = dict(settings.serving.blend_weights)
    of_segments: dict[str, dict[str, float]] = {}
    if bundle.has(bundles.BLEND):
        weights, of_segments = _weights(bundle)
    rules = Rules.parse(bundle.json(bundles.RULES)) if bundle.has(bundles.RULES) else Rules()
    vectors = _item_vectors(bundle) if settings.serving.diversity_by == "vector" else None
    return Release(bundle.manifest, catalog, popular, weights, rules, of_segments, vectors)


def _item_vectors(bundle: ReleaseBundle) -> Floats:
    path = bundle.file(bundles.ITEM_VECTORS)
    vectors, _ = read_item_vectors(path)
    if vectors.ndim != 2 or not 0 < len(vectors) <= bundle.manifest.item_count:
        raise ArtifactError(f"{path} holds {vectors.shape} vectors of {bundle.manifest.item_count} items; train again")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = (vectors / np.where(norms > 0, norms, 1.0)).astype(np.float32)
    return unit


def _weights(bundle: ReleaseBundle) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The bundle's blend weights, and those of segments that have their own."""
    try:
        content = bundle.json(bundles.BLEND)
        weights = _numbers(content["weights"])
        of_segments = {str(name): _numbers(raw) for name, raw in content.get("segments", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"bundle {bundle.version}: blend weights are broken ({error!r}); tune again") from error
    if not all(0 <= weight < 1e6 for some in (weights, *of_segments.values()) for weight in some.values()):
        raise ArtifactError(f"bundle {bundle.version}: blend weights must be numbers from 0 up; tune again")
    return weights, of_segments


def _numbers(raw: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(weight) for name, weight in raw.items()}


class Releases:
    """The release that serves, and its successors."""

    def __init__(self, settings: Settings, malformed: Callable[[str], None], clock: Clock) -> None:
        self._settings = settings
        self._malformed = malformed
        self._clock = clock
        self._refused = ""
        # The editors' own file; where there is one, its rules hold instead of the bundle's.
        self._rules = RulesFile(settings.serving.rules_path)
        self._swapping = Lock()
        release, self._feed, self._withheld = self._open()
        self._release = replace(release, rules=self._rules.current or release.rules)
        self._feed.start()

    @property
    def current(self) -> Release:
        return self._release

    def _open(self) -> tuple[Release, CatalogFeed, Withheld]:
        release = load_release(bundles.open_current(self._settings.registry.path), self._settings)
        folder = self._settings.serving.state_path
        withheld = Withheld(Path(folder) if folder else None)
        withheld.apply(release.catalog, release.manifest)
        return release, CatalogFeed(release, release.manifest, self._settings, self._malformed), withheld

    async def keep_fresh(self) -> None:
        """Refreshes the popular lists with the catalogue and swaps releases, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._refresh())
            group.create_task(self._watch())

    def close(self) -> None:
        self._feed.stop()

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            await asyncio.to_thread(self._refresh_once)

    def _refresh_once(self) -> None:
        with self._swapping:
            release, withheld = self._release, self._withheld
        release.popular.refresh()
        withheld.keep(release.catalog, release.manifest, self._clock.now_ms())
        if (rules := self._rules.read_again()) is not None:
            with self._swapping:
                self._release = replace(self._release, rules=rules)

    async def _watch(self) -> None:
        registry, problem = self._settings.registry, ""
        while True:
            await asyncio.sleep(registry.watch_interval_ms / 1000)
            version = ""
            try:
                version = await asyncio.to_thread(bundles.current_version, registry.path)
                if version not in (self._release.version, self._refused):
                    await asyncio.to_thread(self._swap)
            except ArtifactError as error:
                # Once, however long it stays so.
                if version != self._refused or str(error) != problem:
                    _log.warning("the new release is refused, the old one serves on", problem=str(error))
                self._refused, problem = version, str(error)

    def _swap(self) -> None:
        with beside_calls():
            release, feed, withheld = self._open()
        feed.start()
        # Statistics since the bundle: without them popularity would fall back to the bundle's for a moment.
        if not feed.wait(_CATCH_UP_SECONDS):
            _log.warning("the new release serves before it has caught up", version=release.version)
        release.popular.refresh()
        old, self._feed = self._feed, feed
        with self._swapping:
            release = replace(release, rules=self._rules.current or release.rules)
            self._release, self._withheld = release, withheld
        old.stop()
        _log.info("new release", version=release.version, items=len(release.catalog))
