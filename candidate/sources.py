"""Candidate sources: each brings some items for a user, with a score and in its own order.

Called by the retriever, merged by candidate/merging.py; README.md beside this file tells them all. A new source is a
class with `name`, `retrieve` and `place`, its name in features.vectors.SOURCES and core.settings.SourceName, and a
quota in the settings. Invariant: a source returns only rows that are allowed, each once, best first; the names and the
scores are those that the ranker was trained with.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from candidate.snapshot import Snapshot

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

# Kept in order, for sources whose order is the same for all users.
_ORDERED_ROWS = 4096
# Popularity moves with every click; its order is looked at again after this long.
_ORDER_AGE_MS = 200


@dataclass(frozen=True, slots=True)
class Query:
    """What the sources know of a request."""

    # Unit vector [d]; None where no item of the user's history is known.
    user_vector: Floats | None
    # Rows of the newest distinct items of the history, newest first.
    seeds: Rows
    # By catalogue row. [n]
    allowed: Bools
    now_ms: int


class Hits(NamedTuple):
    """What a source brings, best first."""

    rows: Rows
    scores: Floats


class Place(NamedTuple):
    """An item's place in a source's order: 0 = first."""

    rank: int
    score: float


NOTHING = Hits(np.zeros(0, np.int64), np.zeros(0, np.float32))


class CandidateSource(Protocol):
    """Proposes candidates."""

    @property
    def name(self) -> str:
        """One of features.vectors.SOURCES."""
        ...

    def retrieve(self, snapshot: Snapshot, query: Query, quota: int) -> Hits:
        """At most `quota` items."""
        ...

    def place(self, snapshot: Snapshot, query: Query, row: int) -> Place | None:
        """Where an item stands among all that are allowed, exactly; None where this source cannot bring it."""
        ...


class AnnSource:
    """Items whose vectors are nearest to the user's. Scores are cosines."""

    name = "ann"

    def retrieve(self, snapshot: Snapshot, query: Query, quota: int) -> Hits:
        if query.user_vector is None:
            return NOTHING
        rows, scores = snapshot.index.search(query.user_vector[None, :], quota, query.allowed)
        return Hits(rows[0][rows[0] >= 0], scores[0][rows[0] >= 0])

    def place(self, snapshot: Snapshot, query: Query, row: int) -> Place | None:
        if query.user_vector is None or not snapshot.vectors[row].any():
            return None
        return _place(snapshot.vectors @ query.user_vector, query.allowed, row)


class ItemToItemSource:
    """Items near one of the user's last items. The score is the cosine to the nearest of them."""

    name = "item_to_item"

    def retrieve(self, snapshot: Snapshot, query: Query, quota: int) -> Hits:
        vectors = snapshot.vectors[query.seeds]
        vectors = vectors[vectors.any(axis=1)]
        if not len(vectors):
            return NOTHING
        rows, scores = snapshot.index.search(vectors, quota, query.allowed)
        return _best_of(rows.ravel(), scores.ravel(), quota)

    def place(self, snapshot: Snapshot, query: Query, row: int) -> Place | None:
        seeds = snapshot.vectors[query.seeds]
        if not seeds.any() or not snapshot.vectors[row].any():
            return None
        return _place((seeds @ snapshot.vectors.T).max(axis=0), query.allowed, row)


class CoVisitationSource:
    """Items that the same users met together with one of the user's last items. The score is the similarity, 0..1."""

    name = "co_visitation"

    def retrieve(self, snapshot: Snapshot, query: Query, quota: int) -> Hits:
        if not len(query.seeds):
            return NOTHING
        ids = snapshot.catalog.item_ids
        names, similarity = snapshot.co_visitation.similar([ids[row] for row in query.seeds.tolist()], query.now_ms)
        rows = snapshot.catalog.rows(names).astype(np.int64)
        known = np.flatnonzero((rows >= 0) & (rows < len(query.allowed)))
        known = known[query.allowed[rows[known]]]
        # Ties by the catalogue's order, which replicas of a bundle share.
        best = known[np.lexsort((rows[known], -similarity[known]))[:quota]]
        return Hits(rows[best], similarity[best].astype(np.float32))

    def place(self, snapshot: Snapshot, query: Query, row: int) -> Place | None:
        hits = self.retrieve(snapshot, query, len(query.allowed))
        at = np.flatnonzero(hits.rows == row)
        return Place(int(at[0]), float(hits.scores[at[0]])) if len(at) else None


class TrendingSource:
    """Items most engaged with lately (the shortest half-life). The score is relative to the first: 0..1."""

    name = "trending"

    def __init__(self) -> None:
        self._order = _Order()

    def retrieve(self, snapshot: Snapshot, query: Query, quota: int) -> Hits:
        rows = self._order.take(snapshot, snapshot.catalog.revision, query, quota, _popularity)
        if not len(rows):
            return NOTHING
        values = _popularity(snapshot)[rows]
        return Hits(rows, np.exp2(values - values[0]).astype(np.float32))

    def place(self, snapshot: Snapshot, query: Query, row: int) -> Place | None:
        popularity = _popularity(snapshot)
        place = _place(popularity, query.allowed, row)
        if place is None:
            return None
        first = popularity[np.flatnonzero(query.allowed[: len(popularity)])].max()
        return Place(place.rank, float(np.exp2(popularity[row] - first)))


class NewSource:
    """The items published last. Their score is 0: nothing is known of them yet."""

    name = "new"

    def __init__(self) -> None:
        self._order = _Order()

    def retrieve(self, snapshot: Snapshot, query: Query, quota: int) -> Hits:
        rows = self._order.take(snapshot, snapshot.items_revision, query, quota, _publish_times)
        return Hits(rows, np.zeros(len(rows), np.float32))

    def place(self, snapshot: Snapshot, query: Query, row: int) -> Place | None:
        place = _place(_publish_times(snapshot), query.allowed, row)
        return None if place is None else Place(place.rank, 0.0)


def _popularity(snapshot: Snapshot) -> Doubles:
    # Decay takes the same share from every item, so the order by forward-decayed sums holds at any time.
    popularity: Doubles = snapshot.catalog.column("log2_popularity")[:, 0]
    return popularity


def _publish_times(snapshot: Snapshot) -> Doubles:
    publish_ms = snapshot.catalog.column("publish_ms")
    return np.where(publish_ms > 0, publish_ms.astype(np.float64), -np.inf)


def _place(values: npt.NDArray[np.floating[Any]], allowed: Bools, row: int) -> Place | None:
    """Place of a row by its value among the allowed ones, the row itself being one of them."""
    count = min(len(values), len(allowed))
    if row >= count or not allowed[row] or values[row] == -np.inf:
        return None
    return Place(int(np.count_nonzero(values[:count][allowed[:count]] > values[row])), float(values[row]))


class _Kept(NamedTuple):
    """An order, and what it is of."""

    snapshot: "weakref.ref[Snapshot]"
    revision: int
    made_at_ms: int
    rows: Rows
    is_all: bool


class _Order:
    """The first rows by some value that all users share, kept for a moment."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def take(
        self, snapshot: Snapshot, revision: int, query: Query, quota: int, values_of: Callable[[Snapshot], Doubles]
    ) -> Rows:
        """The first `quota` allowed rows of finite value, highest first.

        Args:
            snapshot: whose rows they are.
            revision: another one says that the values may have changed.
            query: the time, and which rows are allowed.
            quota: how many.
            values_of: the values by row; asked only when they are needed.
        """
        kept, allowed = self._kept, query.allowed
        if kept is None or kept.snapshot() is not snapshot or self._is_stale(kept, revision, query.now_ms):
            rows = _highest(values_of(snapshot), _ORDERED_ROWS)
            kept = _Kept(weakref.ref(snapshot), revision, query.now_ms, rows, len(rows) < _ORDERED_ROWS)
            self._kept = kept
        rows = kept.rows[kept.rows < len(allowed)]
        chosen = rows[allowed[rows]][:quota]
        if len(chosen) == quota or kept.is_all:
            return chosen
        # A narrow filter: look at everything that passes.
        values = values_of(snapshot)
        count = min(len(values), len(allowed))
        return _highest(np.where(allowed[:count], values[:count], -np.inf), quota)

    def _is_stale(self, kept: _Kept, revision: int, now_ms: int) -> bool:
        return kept.revision != revision and abs(now_ms - kept.made_at_ms) >= _ORDER_AGE_MS


def _highest(values: Doubles, count: int) -> Rows:
    rows = np.flatnonzero(values > -np.inf)
    if len(rows) > count:
        rows = rows[np.argpartition(-values[rows], count - 1)[:count]] if count else rows[:0]
    ordered: Rows = rows[np.argsort(-values[rows], kind="stable")]
    return ordered


def _best_of(rows: Rows, scores: Floats, quota: int) -> Hits:
    """Each row once, with its best score, best first."""
    order = np.argsort(-scores, kind="stable")
    order = order[rows[order] >= 0]
    _, first = np.unique(rows[order], return_index=True)
    chosen = order[np.sort(first)][:quota]
    return Hits(rows[chosen], scores[chosen])
