"""One release as the candidate service holds it: towers, catalogue, vectors, index and attributes that agree.

Loaded from a bundle, then kept fresh by one writer (candidate/feed.py). Invariant: a request reads one snapshot from
beginning to end; towers, vectors and index of different embedding versions refuse to load; after each batch of changes
an item's vector is in the index exactly while the item is in the catalogue.
"""

import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from candidate import metrics
from candidate.attributes import Attributes
from candidate.co_visitation import CoVisitation, load_co_visitation
from candidate.encoder import UserEncoder, encode_items
from candidate.index import ItemIndex, load_index
from candidate.shard import Shard
from candidate.towers import Towers, load_towers
from core.bundle import CO_VISITATION, INDEX, ITEM_STATS, ITEM_VECTORS, Manifest, ReleaseBundle
from core.errors import ArtifactError
from core.pace import paced
from core.settings import Settings
from core.telemetry import get_logger
from features import item_vectors
from features.catalog import Catalog
from headrace.v1.events_pb2 import Item, ItemStats

_log = get_logger("candidate")

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
# Few, so that calls beside them wait for none of them for long.
_ENCODED_AT_ONCE = 32
# What is servable is looked at again after this long: items are published and expire by the clock.
_SERVABLE_MS = 100


class Snapshot:
    """What requests are answered from. Methods that change it are for one thread."""

    def __init__(
        self,
        manifest: Manifest,
        towers: Towers,
        catalog: Catalog,
        index: ItemIndex,
        co_visitation: CoVisitation,
        settings: Settings,
    ) -> None:
        self.manifest = manifest
        self.co_visitation = co_visitation
        self.embedding_version = towers.embedding_version
        self.catalog = catalog
        self.index = index
        self.encoder = UserEncoder(towers, settings.features, settings.candidate.bfloat16_from_users)
        self.attributes = Attributes()
        # Goes up with each item that comes, changes or goes (not with statistics).
        self.items_revision = 0
        self._towers = towers
        self._shard = Shard.of(settings.candidate)
        self._servable: tuple[int, int, Bools] = (-1, 0, np.zeros(0, np.bool_))
        # What the index does not know yet, by row; None = removed.
        self._changed: dict[int, Item | None] = {}
        for row, item in enumerate(catalog.items):
            self.attributes.put(row, item)
        self.tell_sizes()

    @property
    def vectors(self) -> Floats:
        """By catalogue row, with room for more; zeros where an item never had one. [capacity, d]."""
        return self.index.vectors

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    def servable(self, now_ms: int) -> Bools:
        """Which rows may be recommended; not to be changed by the caller. [n]."""
        revision, moment = self.items_revision, now_ms // _SERVABLE_MS
        known = self._servable
        if known[0] != revision or known[1] != moment:
            known = (revision, moment, self.catalog.servable(now_ms))
            self._servable = known
        return known[2]

    def put_item(self, item: Item) -> None:
        """Adds or changes an item. Searches see it after `apply_changes`."""
        row = self.catalog.row(item.item_id)
        before = self.catalog.items[row] if row >= 0 else None
        row = self.catalog.upsert(item)
        self.attributes.put(row, item, before)
        self._changed[row] = item
        self.items_revision += 1
        metrics.items_applied.labels("upsert").inc()

    def remove_item(self, item_id: str) -> None:
        """Takes an item out: it is not servable from now on, and leaves the index with `apply_changes`."""
        row = self.catalog.remove(item_id)
        if row >= 0:
            self._changed[row] = None
            self.items_revision += 1
            metrics.items_applied.labels("remove").inc()

    def put_stats(self, stats: ItemStats) -> None:
        self.catalog.put_stats(stats)

    def apply_changes(self) -> None:
        """After a batch: what came is encoded together, and the index follows the catalogue."""
        changed, self._changed = self._changed, {}
        if gone := [row for row, item in changed.items() if item is None]:
            self.index.remove_many(gone)
        come = [(row, item) for row, item in changed.items() if item is not None]
        for some in paced(come[start : start + _ENCODED_AT_ONCE] for start in range(0, len(come), _ENCODED_AT_ONCE)):
            self._put_vectors(*zip(*some, strict=True))
        self.rebuild_index_if_due()
        self.tell_sizes()

    def _put_vectors(self, rows: Sequence[int], items: Sequence[Item]) -> None:
        vectors = encode_items(self._towers, items)
        ours = [at for at, item in enumerate(items) if self._shard.owns(item.item_id)]
        self.index.upsert_many([rows[at] for at in ours], vectors[ours])
        for at in set(range(len(items))).difference(ours):
            self.index.keep(rows[at], vectors[at])

    def rebuild_index_if_due(self) -> None:
        """Merges the index's delta in the background when it has grown."""
        if self.index.wants_rebuild():
            threading.Thread(target=self._rebuild_index, name="index-rebuild", daemon=True).start()

    def _rebuild_index(self) -> None:
        started = time.perf_counter()
        try:
            self.index.rebuild()
        except Exception as error:  # noqa: BLE001 - the index serves on as it is, and the next change tries again
            _log.error("the index could not be rebuilt", error=repr(error))
            return
        took_ms = (time.perf_counter() - started) * 1000
        metrics.index_rebuild_ms.observe(took_ms)
        _log.info("index rebuilt", took_ms=round(took_ms), kind=self.index.info.kind, items=len(self.index))

    def tell_sizes(self) -> None:
        metrics.index_items.labels("main").set(self.index.main_count)
        metrics.index_items.labels("delta").set(self.index.delta_count)
        metrics.index_items.labels("tombstones").set(self.index.tombstone_count)
        metrics.co_visitation_pairs.set(self.co_visitation.pair_count)


def load_snapshot(bundle: ReleaseBundle, settings: Settings) -> Snapshot:
    """Reads the candidate service's part of a bundle.

    Raises:
        ArtifactError: a part is missing, broken, or of another version than the others.
    """
    catalog = Catalog.of_items(bundle.items(), settings.features)
    towers = load_towers(bundle.path)
    vectors = read_item_vectors(bundle)
    if vectors.shape != (len(catalog), towers.config.dimension):
        raise ArtifactError(
            f"bundle {bundle.version}: vectors {vectors.shape} do not fit {len(catalog)} items of dimension "
            f"{towers.config.dimension}; run `headrace train`"
        )
    if bundle.has(ITEM_STATS):
        catalog.put_all_stats(bundle.item_stats())
    index = load_index(bundle.file(INDEX), vectors)
    index.delta_max_items = settings.candidate.index_delta_max_items
    version = towers.embedding_version
    for part, theirs in (("manifest", bundle.manifest.embedding_version), ("index", index.info.embedding_version)):
        if theirs != version:
            raise ArtifactError(
                f"bundle {bundle.version}: the {part} is of embedding version {theirs or '(none)'}, the towers are "
                f"of {version}; run `headrace train`"
            )
    shard = Shard.of(settings.candidate)
    if shard.count > 1:
        index.remove_many(row for row, item_id in enumerate(catalog.item_ids) if not shard.owns(item_id))
        index.rebuild(anew=True)
    # A bundle of an earlier version has none: the pairs are then learnt from all that the topics still hold.
    own = settings.candidate.co_visitation
    pairs = CoVisitation(own, settings.features)
    if bundle.has(CO_VISITATION):
        pairs = load_co_visitation(bundle.path, own, settings.features)
    return Snapshot(bundle.manifest, towers, catalog, index, pairs, settings)


def read_item_vectors(bundle: ReleaseBundle) -> Floats:
    """The item vectors [n, d].

    Raises:
        ArtifactError: they cannot be read, are no numbers, or are of other towers than the bundle's.
    """
    path = bundle.file(ITEM_VECTORS)
    vectors, version = item_vectors.read_item_vectors(path)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ArtifactError(f"{path} does not hold vectors of finite numbers; run `headrace train`")
    # A bundle of an earlier version does not say whose they are.
    if version is not None and version != bundle.manifest.embedding_version:
        raise ArtifactError(
            f"bundle {bundle.version}: the vectors are of embedding version {version}, the manifest says "
            f"{bundle.manifest.embedding_version}; run `headrace train`"
        )
    return vectors
