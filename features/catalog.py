"""The catalogue as columns: items by row number, their attributes and their statistics, ready for gathering.

Each replica of candidate, ranker and serving holds one, loads it from the bundle and keeps it fresh from the
compacted topics. Invariant: a row number, once given to an item_id, stays that item's for the life of the catalogue;
a removed item keeps its row and is not available. One writer; readers may run beside it (between two columns of a row
it may change; whoever needs rows of one moment holds it still with `held`).
"""

import math
from collections.abc import Iterable, Mapping
from itertools import repeat
from threading import Lock
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from core.codec import to_ms
from core.settings import FeaturesSettings
from features import item_stats
from features.item_stats import ItemPartial
from features.transforms import category_bucket, stable_hash
from headrace.v1.events_pb2 import Item, ItemStats

CATEGORIES_PER_ITEM = 4
# Rows of the rankers' and towers' category tables; 0 is "none".
CATEGORY_VOCABULARY = 1024
_NEVER_MS = np.iinfo(np.int64).max
# What features read of an item's description.
_DESCRIPTION = np.dtype(
    [
        ("publish_ms", np.int64),
        ("year", np.float32),
        ("log_price", np.float32),
        ("buckets", np.int32, CATEGORIES_PER_ITEM),
    ]
)

Rows = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def category_number(category: str) -> int:
    """The number of a category in column `categories`; two may share one."""
    return 1 + stable_hash(category) % (CATEGORY_VOCABULARY - 1)


class Catalog:
    """Items and their statistics, by row.

    Args:
        settings: what is counted, and how.
        with_revisions: `stats_revisions` are asked for; they take about 160 bytes per row of statistics.
    """

    def __init__(self, settings: FeaturesSettings, *, with_revisions: bool = False) -> None:
        self._settings = settings
        self._with_revisions = with_revisions
        # Held while a row changes: `held`.
        self._changing = Lock()
        self._clicks = [kind for kind in settings.positive_kinds if kind != "dwell"]
        self._unknown_popularity = [(0, 0.0)] * len(settings.half_lives_seconds)
        self._row_of: dict[str, int] = {}
        self.item_ids: list[str] = []
        self.items: list[Item] = []
        self._partials: dict[int, dict[int, ItemPartial]] = {}
        # Of the same partials: headrace.v1.StatsRevisions of one, encoded.
        self._revisions: dict[int, dict[int, bytes]] = {}
        # segment -> row -> log2 of the decayed sum of its users, as column log2_popularity.
        self._segments: dict[str, dict[int, float]] = {}
        # Goes up with every change; caches of derived arrays compare it.
        self.revision = 0
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._grow(1024)

    @classmethod
    def of_items(cls, items: Iterable[Item], settings: FeaturesSettings, *, with_revisions: bool = False) -> "Catalog":
        """A catalogue of these items, in their order: a bundle's item vectors go by it."""
        catalog = cls(settings, with_revisions=with_revisions)
        for item in items:
            catalog.upsert(item)
        return catalog

    def __len__(self) -> int:
        return len(self.item_ids)

    def row(self, item_id: str) -> int:
        """The item's row, or -1."""
        return self._row_of.get(item_id, -1)

    def rows(self, item_ids: Iterable[str]) -> Rows:
        """Rows of items, -1 where unknown. Shape [n]."""
        get = self._row_of.get
        return np.array(list(map(get, item_ids, repeat(-1))), np.int32)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column, one value (or vector) a row.

        `available`, `publish_ms`, `expire_ms`, `categories` [n, 4], `buckets` [n, 4], `year`, `log_price`,
        `impressions`, `clicks`, `log2_popularity` [n, half-lives], `stats_revision`, `id_hash`.
        """
        # The length first: the columns read after it have room for it, also where the writer grows them just now.
        count = len(self.item_ids)
        return self._columns[name][:count]

    def held(self) -> Lock:
        """`with catalog.held():` no row changes meanwhile; the writer waits, so keep it short."""
        return self._changing

    def upsert(self, item: Item) -> int:
        """Adds or replaces an item; returns its row."""
        with self._changing:
            return self._upsert(item)

    def _upsert(self, item: Item) -> int:
        row = self._row_for(item.item_id)
        self.items[row] = item
        columns = self._columns
        columns["available"][row] = not item.HasField("available") or item.available
        columns["publish_ms"][row] = to_ms(item.publish_time) if item.HasField("publish_time") else 0
        columns["expire_ms"][row] = to_ms(item.expire_time) if item.HasField("expire_time") else _NEVER_MS
        categories = list(item.categories)[:CATEGORIES_PER_ITEM]
        columns["categories"][row] = 0
        columns["buckets"][row] = -1
        for index, category in enumerate(categories):
            columns["categories"][row, index] = category_number(category)
            columns["buckets"][row, index] = category_bucket(category, self._settings.category_buckets)
        columns["year"][row] = (item.year - 2000) / 20 if item.HasField("year") else 0.0
        columns["log_price"][row] = math.log1p(max(item.price, 0.0)) if item.HasField("price") else 0.0
        self.revision += 1
        return row

    def remove(self, item_id: str) -> int:
        """Takes an item out of recommendation; returns its row, or -1 where it was never there."""
        row = self.row(item_id)
        if row >= 0:
            self._columns["available"][row] = False
            self.revision += 1
        return row

    def put_stats(self, stats: ItemStats) -> int:
        """Replaces the partial sums of one (item, source partition); returns the item's row."""
        partial = item_stats.decode(stats, with_offsets=False)
        revision = item_stats.revision_of(stats) if self._with_revisions else b""
        with self._changing:
            row = self._put_partial(stats.item_id, stats.source_partition, partial)
            if revision:
                self._revisions.setdefault(row, {})[stats.source_partition] = revision
        return row

    def put_all_stats(self, stats: Iterable[ItemStats]) -> None:
        """`put_stats` of each. After the items: statistics alone give an item a row, too."""
        for one in stats:
            self.put_stats(one)

    def put_partial(self, item_id: str, source_partition: int, partial: ItemPartial) -> int:
        """`put_stats` for whoever has the sums at hand already."""
        with self._changing:
            return self._put_partial(item_id, source_partition, partial)

    def _put_partial(self, item_id: str, source_partition: int, partial: ItemPartial) -> int:
        row = self._row_for(item_id)
        by_partition = self._partials.setdefault(row, {})
        before = by_partition.get(source_partition, partial)
        by_partition[source_partition] = partial
        # What the columns need of `item_stats.add_up`, at half its cost: each replica does this for each row.
        partials, columns = list(by_partition.values()), self._columns
        kinds = [partial.kinds for partial in partials]
        columns["impressions"][row] = _count(kinds, "impression")
        columns["clicks"][row] = sum([_count(kinds, kind) for kind in self._clicks])
        columns["stats_revision"][row] = sum([partial.revision for partial in partials])
        # Most rows come because an item was shown once more. What is put again may have changed in between.
        if before is partial or (before.popularity, before.segments) != (partial.popularity, partial.segments):
            self._put_popularity(row, partials)
        self.revision += 1
        return row

    def _put_popularity(self, row: int, partials: list[ItemPartial]) -> None:
        popularity = item_stats.add_up_popularity(partials)
        self._columns["log2_popularity"][row] = [
            math.log2(decayed_sum) + landmark if decayed_sum > 0 else -math.inf
            for landmark, decayed_sum in popularity or self._unknown_popularity
        ]
        for segment, (landmark, decayed_sum) in item_stats.add_up_segments(partials).items():
            if decayed_sum > 0:
                self._segments.setdefault(segment, {})[row] = math.log2(decayed_sum) + landmark

    def stats(self, row: int) -> ItemPartial:
        """The added-up statistics of an item."""
        return item_stats.add_up(self._partials.get(row, {}).values())

    def stats_revisions(self, rows: Rows) -> list[bytes]:
        """Which rows of statistics each item's were added up from, in that order: headrace.v1.StatsRevisions, encoded.

        Empty for an item without any; of what `put_stats` was told, with `with_revisions`.
        """
        return [b"".join(self._revisions.get(row, {}).values()) for row in rows.tolist()]

    def digests(self, rows: Rows) -> list[int]:
        """Checksum, 1..2^32-1, of what features read of each item's description; 0 for row -1."""
        columns = self._columns
        read = np.empty(len(rows), _DESCRIPTION)
        for name in _DESCRIPTION.names or ():
            read[name] = columns[name][rows]
        raw, width = read.tobytes(), _DESCRIPTION.itemsize
        starts = range(0, len(raw), width)
        return [
            max(1, crc32(raw[at : at + width])) if row >= 0 else 0
            for at, row in zip(starts, rows.tolist(), strict=True)
        ]

    def partials(self) -> Iterable[tuple[str, int, ItemPartial]]:
        """All partial sums: item_id, source partition, sums."""
        for row, by_partition in self._partials.items():
            for partition, partial in by_partition.items():
                yield self.item_ids[row], partition, partial

    def popularity(self, now_ms: int, half_life_index: int = -1) -> Floats:
        """Decayed engagement of every item as of `now_ms`. Shape [n]."""
        return self.decayed(self.column("log2_popularity")[:, half_life_index], now_ms, half_life_index)

    def decayed(self, log2: npt.NDArray[np.float64], now_ms: int, half_life_index: int = -1) -> Floats:
        """Values as of `now_ms` from what `log2_popularity` holds. Same shape."""
        exponent = log2 - now_ms / (self._settings.half_lives_seconds[half_life_index] * 1000)
        return np.exp2(np.clip(exponent, -1000, 100)).astype(np.float32)

    def segments(self) -> list[str]:
        """Segments of users by whose events items are counted apart."""
        return sorted(self._segments)

    def segment_popularity(self, segment: str) -> tuple[Rows, npt.NDArray[np.float64]]:
        """Items that a segment's users liked, best first: their rows, and log2 of their sums as `log2_popularity`."""
        # One step of the interpreter: the writer may be adding.
        liked = self._segments.get(segment, {}).copy()
        rows = np.fromiter(liked, np.int32, len(liked))
        log2 = np.fromiter(liked.values(), np.float64, len(liked))
        order = np.lexsort((rows, -log2))
        return rows[order], log2[order]

    def servable(self, now_ms: int) -> npt.NDArray[np.bool_]:
        """Which items may be recommended at `now_ms`: available, published, not expired. Shape [n]."""
        # One length for all of them: an item may come in between.
        count = len(self.item_ids)
        columns = self._columns
        available: npt.NDArray[np.bool_] = columns["available"][:count]
        return available & (columns["publish_ms"][:count] <= now_ms) & (columns["expire_ms"][:count] > now_ms)

    def _row_for(self, item_id: str) -> int:
        row = self._row_of.get(item_id)
        if row is not None:
            return row
        row = len(self.item_ids)
        if row >= len(self._columns["available"]):
            self._grow(2 * row)
        # A reader that finds a row must find its columns: the name comes last, behind the length that `column` reads.
        self._columns["id_hash"][row] = stable_hash(item_id)
        self.items.append(Item(item_id=item_id))
        self.item_ids.append(item_id)
        self._row_of[item_id] = row
        return row

    def _grow(self, capacity: int) -> None:
        half_lives = len(self._settings.half_lives_seconds)
        empty: dict[str, npt.NDArray[Any]] = {
            # Known from statistics alone: not to be recommended until its item arrives.
            "available": np.zeros(capacity, np.bool_),
            "publish_ms": np.zeros(capacity, np.int64),
            "expire_ms": np.full(capacity, _NEVER_MS, np.int64),
            "categories": np.zeros((capacity, CATEGORIES_PER_ITEM), np.int32),
            "buckets": np.full((capacity, CATEGORIES_PER_ITEM), -1, np.int32),
            "year": np.zeros(capacity, np.float32),
            "log_price": np.zeros(capacity, np.float32),
            "impressions": np.zeros(capacity, np.float32),
            "clicks": np.zeros(capacity, np.float32),
            "log2_popularity": np.full((capacity, half_lives), -np.inf, np.float64),
            "stats_revision": np.zeros(capacity, np.int64),
            # An order that is the same in every process, whatever the rows are.
            "id_hash": np.zeros(capacity, np.uint64),
        }
        for name, old in self._columns.items():
            empty[name][: len(old)] = old
        self._columns = empty


def _count(kinds: Iterable[Mapping[str, tuple[int, float]]], kind: str) -> int:
    return sum([counts[kind][0] for counts in kinds if kind in counts])
