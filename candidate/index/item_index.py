"""The vector index that is searched while it changes: vectors by row, the lists made of them, what came since.

Searched by the sources, written by one thread (the follower of the items topic). Small indexes are searched exactly
and have no lists. Invariant: a search sees one state from beginning to end, so it runs beside any write and any
rebuild; what a write returned from is in the next search; `allowed` acts inside the search, so k items come back
whenever k are allowed.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from candidate.index import bits, lists
from candidate.index.bits import Bits, Bools, Rows
from candidate.index.delta import Delta
from candidate.index.exact import Floats
from candidate.index.lists import Lists, share_found
from candidate.index.reach import RECALL_K, RECALL_QUERIES
from candidate.index.state import State, counted, search, search_exact, with_room
from core.errors import InvalidRequestError

# More results than this are no candidates any more.
MAX_K = 16_384
# Every search looks at the whole delta, and past the removed: beyond this size, or share of the lists, they are merged.
DELTA_MAX_ITEMS, DELTA_MAX_SHARE = 2_000, 0.005
# A rebuild that failed is not tried again before.
_RETRY_SECONDS = 30.0
_ROOM = 1024


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """What is searched, and how well."""

    kind: str
    dimension: int
    main_items: int
    build_time_ms: int
    # Lists probed for 500 items, 0 where the search is exact; the recall measured with them.
    probes: int = 0
    recall: float = 1.0
    embedding_version: str = ""


class Sample(NamedTuple):
    """A search that took place."""

    query: Floats  # [d]
    k: int
    allowed: Bools | None


class Parts(NamedTuple):
    """An index that is only its lists (None: exact) and its vectors."""

    # Rows in use.
    rows: int
    # Which of them are in the index.
    present: Bits
    lists: Lists | None
    exact_max_items: int
    build_time_ms: int


class ItemIndex:
    """Vectors by catalogue row, searched by inner product."""

    def __init__(self, state: State, exact_max_items: int, embedding_version: str) -> None:
        self._state = state
        self._exact_max_items = exact_max_items
        self._embedding_version = embedding_version
        self._writing = threading.Lock()
        # Rows written since a rebuild began; None while there is none.
        self._touched: set[int] | None = None
        self._failed_at = -math.inf
        # What users asked lately, to tune by; and whether too little of it was found.
        self._asked: list[Floats] = []
        self._misses = False
        #: So many changes are merged, or a two-hundredth of the items where that is more.
        self.delta_max_items = DELTA_MAX_ITEMS
        #: Called with searches that took place, for as long as it is set: see candidate/index/recall.py.
        self.listener: Callable[[Sample], None] | None = None

    @classmethod
    def build(
        cls,
        vectors: Floats,
        rows: Rows,
        exact_max_items: int,
        embedding_version: str = "",
        queries: Floats | None = None,
    ) -> "ItemIndex":
        """An index of `vectors` [n, d] under the catalogue rows `rows` [n], each once.

        Args:
            vectors: finite numbers.
            rows: from 0; memory is held for the highest of them.
            exact_max_items: up to so many, every vector is scored.
            embedding_version: of the towers that made the vectors.
            queries: what users ask [B, d], to tune an approximate search by.

        Raises:
            InvalidRequestError: vectors that are no finite numbers.
        """
        vectors, rows = np.asarray(vectors, np.float32), np.asarray(rows, np.int64)
        _check_vectors(vectors, vectors.shape[1])
        count = int(rows.max(initial=-1)) + 1
        table = np.zeros((count + _ROOM, vectors.shape[1]), np.float32)
        table[rows] = vectors
        present = bits.adding(bits.none_of(len(table)), rows)
        made = lists.train(table[:count], present, queries) if len(rows) > exact_max_items else None
        return cls.of_parts(table, Parts(count, present, made, exact_max_items, _now_ms()), embedding_version)

    @classmethod
    def of_parts(
        cls,
        table: Floats,
        parts: Parts,
        embedding_version: str,
    ) -> "ItemIndex":
        """From vectors by row, with room for more [capacity, d]."""
        count, present, made, exact_max_items, built_ms = parts
        size = bits.count(present)
        delta = Delta.empty(table.shape[1])
        state = State(table, count, present, size, made, present, size, delta, built_ms)
        return cls(state, exact_max_items, embedding_version)

    def __len__(self) -> int:
        return self._state.size

    @property
    def info(self) -> IndexInfo:
        state = self._state
        common = (state.vectors.shape[1], self.main_count, state.build_time_ms)
        if state.lists is None:
            return IndexInfo("Flat", *common, embedding_version=self._embedding_version)
        return IndexInfo(
            state.lists.kind, *common, state.lists.reach.of_best(RECALL_K), state.lists.recall, self._embedding_version
        )

    @property
    def parts(self) -> "Parts":
        """What `of_parts` takes, and a file holds. Only where nothing is in the delta, nor removed from the lists."""
        state = self._state
        return Parts(state.count, state.present, state.lists, self._exact_max_items, state.build_time_ms)

    @property
    def vectors(self) -> Floats:
        """By row; zeros where there never was one. A removed item keeps its vector. [capacity, d]."""
        return self._state.vectors

    @property
    def main_count(self) -> int:
        """Vectors in the lists; in an exact index, all."""
        state = self._state
        return state.size if state.lists is None else state.lists.count

    @property
    def delta_count(self) -> int:
        return int(self._state.delta.alive.sum())

    @property
    def tombstone_count(self) -> int:
        state = self._state
        return 0 if state.lists is None else state.lists.count - state.listed_size

    def search(self, queries: Floats, k: int, allowed: Bools | None = None) -> tuple[Rows, Floats]:
        """The k best items of each query.

        Args:
            queries: [B, d]
            k: how many, 0..MAX_K.
            allowed: by catalogue row; rows beyond its end are not allowed. None = all.

        Returns:
            Rows [B, k], best first, -1 where there are no more; inner products [B, k], -inf there.

        Raises:
            InvalidRequestError: another dimension, numbers that are not finite, or another k.
        """
        state = self._state
        queries = np.ascontiguousarray(queries, np.float32)
        _check_vectors(queries, state.vectors.shape[1])
        if not 0 <= k <= MAX_K:
            raise InvalidRequestError("k", f"must be in 0..{MAX_K}, not {k}")
        if self.listener is not None and len(queries):
            self.listener(Sample(queries[0], k, allowed))
        return search(state, queries, k, allowed)

    def search_exact(self, queries: Floats, k: int, allowed: Bools | None = None) -> Rows:
        """What `search` would find if it looked at everything. [B, k]."""
        return search_exact(self._state, queries, k, allowed)

    def recall_of(self, sample: Sample) -> float:
        """The share of the exact answer that a search finds now."""
        state, queries = self._state, np.ascontiguousarray(sample.query[None])
        wanted = search_exact(state, queries, sample.k, sample.allowed)
        return share_found(search(state, queries, sample.k, sample.allowed)[0], wanted)

    def upsert_many(self, rows: Sequence[int], vectors: Floats) -> None:
        """Adds items, or gives them other vectors [n, d]; of a row named twice, the last counts.

        Raises:
            InvalidRequestError: another dimension, or numbers that are not finite.
        """
        _check_vectors(vectors, self._state.vectors.shape[1])
        latest = {int(row): at for at, row in enumerate(rows)}
        where = np.fromiter(latest, np.int64, len(latest))
        vectors = np.asarray(vectors[list(latest.values())], np.float32)
        if not len(where):
            return
        if where.min() < 0:
            raise InvalidRequestError("rows", "must not be negative")
        with self._writing:
            self._touch(latest)
            state = with_room(self._state, int(where.max()) + 1)
            state.vectors[where] = vectors
            state = counted(replace(state, present=bits.adding(state.present, where)))
            if state.lists is not None:
                listed = bits.without(state.listed, where)
                state = counted(replace(state, listed=listed, delta=state.delta.adding(where, vectors)))
            self._state = state

    def keep(self, row: int, vector: Floats) -> None:
        """Puts a vector where `vectors` has it, of an item that is not searched here."""
        with self._writing:
            state = with_room(self._state, row + 1)
            state.vectors[row] = vector
            self._state = state

    def remove_many(self, rows: Iterable[int]) -> None:
        """Takes items out; nothing happens where one is not in."""
        with self._writing:
            state = self._state
            known = np.array([row for row in rows if 0 <= row < state.count], np.int64)
            self._touch(known.tolist())
            present, listed = bits.without(state.present, known), bits.without(state.listed, known)
            delta = state.delta.without(known.tolist())
            self._state = counted(replace(state, present=present, listed=listed, delta=delta))

    def ask_for_recall(self, asked: Iterable[Floats], *, is_low: bool) -> None:
        """Tells what users asked [d] each, and whether too little of it was found: a rebuild tunes by it."""
        self._asked = list(asked)
        self._misses = self._misses or (is_low and self._state.lists is not None)

    def wants_rebuild(self) -> bool:
        state = self._state
        if self._touched is not None or time.monotonic() < self._failed_at + _RETRY_SECONDS:
            return False
        if state.lists is None:
            return state.size > self._exact_max_items
        waste = state.delta.size + self.tombstone_count
        return self._misses or waste > max(self.delta_max_items, int(DELTA_MAX_SHARE * state.lists.count))

    def rebuild(self, *, anew: bool = False) -> None:
        """Makes lists of what is in now, beside searches and writes, and swaps them in at once.

        Delta and removals are merged into a copy of the lists. They are trained anew where the items have outgrown
        them, or `anew` says so; an index that has become small is exact again.
        """
        with self._writing:
            if self._touched is not None:
                return
            self._touched = set()
            before = self._state
        try:
            made = self._make_lists(before, anew=anew)
        except BaseException:
            self._touched = None
            self._failed_at = time.monotonic()
            raise
        with self._writing:
            touched, self._touched = np.array(sorted(self._touched), np.int64), None
            state = self._state
            delta, listed = Delta.empty(state.vectors.shape[1]), state.present
            if made is not None:
                late = touched[bits.having(state.present, touched)]
                listed = bits.without(bits.grown(before.present, len(state.vectors)), touched)
                delta = delta.adding(late, state.vectors[late])
            self._state = counted(replace(state, lists=made, listed=listed, delta=delta, build_time_ms=_now_ms()))

    def _make_lists(self, before: State, *, anew: bool) -> Lists | None:
        misses, self._misses = self._misses, False
        if before.size <= self._exact_max_items // (1 if before.lists is None else 2):
            return None
        vectors = before.vectors[: before.count]
        queries = np.stack(self._asked) if len(self._asked) >= RECALL_QUERIES // 2 else None
        if anew or before.lists is None or not before.lists.fit(before.size):
            return lists.train(vectors, before.present, queries)
        new = bits.members(before.present & ~before.listed)
        made = lists.merged(before.lists, before.listed, vectors, new)
        return lists.tuned(made, vectors, before.present, queries) if misses and queries is not None else made

    def _touch(self, rows: Iterable[int]) -> None:
        """Remembers what a rebuild that runs must not undo. The caller holds the lock."""
        if self._touched is not None:
            self._touched.update(rows)


def _check_vectors(vectors: Floats, dimension: int) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise InvalidRequestError("embedding", f"vectors of {dimension} numbers are needed, not {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise InvalidRequestError("embedding", "must be finite numbers")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
