"""The vector index: a main part (exact, or IVF with 8-bit codes), a delta of what came since, and tombstones.

Searched by the sources, written by one thread (the follower of the items topic). Invariant: a search works on one
immutable state, so it runs beside any write; what `upsert` or `remove` returned from is in the next search; `allowed`
acts inside the search, so k items come back whenever k are allowed.
"""

import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from core.errors import ArtifactError

FORMAT = 1
# Probes are raised until this share of the exact neighbours is found; the queries lie between two items each, as
# users do: items themselves as queries would be too easy.
RECALL_TARGET, RECALL_QUERIES, RECALL_K = 0.98, 128, 500
# Where this share of the items passes a filter, or less, they are scored one by one: exact, and cheaper.
SCAN_MAX_SHARE = 0.05
# The delta is scanned by every search: past this size (or share of the main part) it is merged.
DELTA_MAX_ITEMS, DELTA_MAX_SHARE = 2_000, 0.05

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """How the main part was built."""

    kind: str
    dimension: int
    main_items: int
    build_time_ms: int
    # Lists probed per search, 0 where the search is exact; the recall measured with them.
    probes: int = 0
    recall: float = 1.0
    embedding_version: str = ""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class _State:
    """What one search sees. `alive` and `delta_rows` are replaced, never changed."""

    main: Any  # a faiss index; its ids are positions in main_rows
    main_rows: Rows  # [n]
    main_vectors: Floats  # [n, d]
    alive: Bools  # [n], False = replaced or removed since
    dead: int
    delta_rows: Rows  # [m], -1 = replaced or removed
    delta_vectors: Floats  # [m, d]
    info: IndexInfo


class ItemIndex:
    """Vectors by catalogue row, searched by inner product."""

    def __init__(self, state: _State, exact_max_items: int) -> None:
        self._state = state
        self._exact_max_items = exact_max_items
        self._writing = threading.Lock()
        self._main_at = {int(row): at for at, row in enumerate(state.main_rows)}
        self._delta_at: dict[int, int] = {}
        # Rows written since a rebuild began; None while there is none.
        self._touched: set[int] | None = None

    @classmethod
    def build(cls, vectors: Floats, rows: Rows, exact_max_items: int, embedding_version: str = "") -> "ItemIndex":
        """An index of `vectors` [n, d] under the catalogue rows `rows` [n], each once."""
        return cls(_build(vectors, rows, exact_max_items, embedding_version), exact_max_items)

    @property
    def info(self) -> IndexInfo:
        return self._state.info

    @property
    def main_count(self) -> int:
        return len(self._state.main_rows)

    @property
    def delta_count(self) -> int:
        return len(self._delta_at)

    @property
    def tombstone_count(self) -> int:
        return self._state.dead

    def __len__(self) -> int:
        return self.main_count - self.tombstone_count + self.delta_count

    def search(self, queries: Floats, k: int, allowed: Bools | None = None) -> tuple[Rows, Floats]:
        """The k best items of each query.

        Args:
            queries: [B, d]
            k: how many.
            allowed: by catalogue row; rows beyond its end are not allowed. None = all.

        Returns:
            Rows [B, k], best first, -1 where there are no more; inner products [B, k], -inf there.
        """
        state = self._state
        queries = np.ascontiguousarray(queries, np.float32)
        parts = [_search_main(state, queries, k, allowed), _search_delta(state, queries, allowed)]
        rows = np.concatenate([part[0] for part in parts], axis=1)
        scores = np.concatenate([part[1] for part in parts], axis=1)
        if rows.shape[1] < k:
            missing = ((0, 0), (0, k - rows.shape[1]))
            rows = np.pad(rows, missing, constant_values=-1)
            scores = np.pad(scores, missing, constant_values=-np.inf)
        if parts[1][0].shape[1]:
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return rows[:, :k], scores[:, :k]

    def upsert(self, row: int, vector: Floats) -> None:
        """Adds an item, or gives it another vector."""
        self.upsert_many([row], vector[None, :])

    def upsert_many(self, rows: Sequence[int], vectors: Floats) -> None:
        """The same for several rows at once, vectors [n, d]."""
        latest = {int(row): at for at, row in enumerate(rows)}
        with self._writing:
            self._forget(latest)
            state = self._state
            start = len(state.delta_rows)
            self._delta_at.update({row: start + at for at, row in enumerate(latest)})
            self._state = replace(
                state,
                delta_rows=np.concatenate([state.delta_rows, np.fromiter(latest, np.int64, len(latest))]),
                delta_vectors=np.concatenate([state.delta_vectors, vectors[list(latest.values())].astype(np.float32)]),
            )

    def remove(self, row: int) -> None:
        """Takes an item out; nothing happens where it is not in."""
        with self._writing:
            self._forget({row: 0})

    def wants_rebuild(self) -> bool:
        state = self._state
        waste = len(state.delta_rows) + state.dead
        return self._touched is None and waste > max(DELTA_MAX_ITEMS, int(DELTA_MAX_SHARE * len(state.main_rows)))

    def rebuild(self) -> None:
        """Merges delta and tombstones into a new main part, beside searches and writes; swaps it in at once."""
        with self._writing:
            if self._touched is not None:
                return
            self._touched = set()
            before = self._state
        vectors, rows = _live(before)
        built = _build(vectors, rows, self._exact_max_items, before.info.embedding_version)
        with self._writing:
            touched, self._touched = self._touched, None
            main_at = {int(row): at for at, row in enumerate(built.main_rows)}
            late = [row for row in touched if row in self._delta_at]
            late_vectors = self._state.delta_vectors[[self._delta_at[row] for row in late]]
            alive = built.alive
            alive[[main_at[row] for row in touched if row in main_at]] = False
            self._main_at, self._delta_at = main_at, {row: at for at, row in enumerate(late)}
            self._state = replace(
                built,
                dead=len(alive) - int(alive.sum()),
                delta_rows=np.array(late, np.int64),
                delta_vectors=late_vectors,
            )

    def save(self, path: Path) -> None:
        """Writes the live items (delta merged) as `path`, with their rows and facts in `path` + `.json`."""
        state = self._state
        if state.dead or len(state.delta_rows):
            state = _build(*_live(state), self._exact_max_items, state.info.embedding_version)
        faiss.write_index(state.main, str(path))
        facts = {**asdict(state.info), "exact_max_items": self._exact_max_items, "rows": state.main_rows.tolist()}
        _facts_path(path).write_text(json.dumps(facts) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> "ItemIndex":
        """Reads what `save` wrote.

        Raises:
            ArtifactError: missing, cut short, or not of its facts.
        """
        try:
            facts: dict[str, Any] = json.loads(_facts_path(path).read_text("utf-8"))
            rows = np.array(facts.pop("rows"), np.int64)
            exact_max_items = int(facts.pop("exact_max_items"))
            info = IndexInfo(**facts)
            main = faiss.read_index(str(path))
            vectors = main.reconstruct_n(0, main.ntotal) if main.ntotal else np.zeros((0, info.dimension), np.float32)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"index {path} cannot be read ({reason}); train again with `headrace train`") from error
        if main.ntotal != len(rows) or main.d != info.dimension or info.format != FORMAT:
            raise ArtifactError(
                f"index {path} is not what {_facts_path(path).name} describes; train again with `headrace train`"
            )
        return cls(_fresh(main, rows, vectors, info), exact_max_items)

    def _forget(self, rows: dict[int, int]) -> None:
        """Hides the present vectors of some rows. The caller holds the lock."""
        if self._touched is not None:
            self._touched.update(rows)
        state = self._state
        in_main = [self._main_at[row] for row in rows if row in self._main_at]
        in_delta = [self._delta_at.pop(row) for row in rows if row in self._delta_at]
        if in_main:
            alive = state.alive.copy()
            alive[in_main] = False
            state = replace(state, alive=alive, dead=len(alive) - int(alive.sum()))
        if in_delta:
            delta_rows = state.delta_rows.copy()
            delta_rows[in_delta] = -1
            state = replace(state, delta_rows=delta_rows)
        self._state = state


def _build(vectors: Floats, rows: Rows, exact_max_items: int, embedding_version: str) -> _State:
    vectors = np.ascontiguousarray(vectors, np.float32)
    count, dimension = vectors.shape
    kind, probes, recall = "Flat", 0, 1.0
    main: Any
    if count <= exact_max_items:
        main = faiss.IndexFlatIP(dimension)
        main.add(vectors)
    else:
        # About 4 * sqrt(n) lists, a power of two; a 39th of the vectors trains each centroid at least.
        lists = 2 ** round(math.log2(min(4 * math.sqrt(count), count / 39)))
        kind = f"IVF{lists},SQ8"
        main = faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).choice(count, min(count, 64 * lists), replace=False)
        main.train(vectors[sample])
        main.add(vectors)
        probes, recall = _tune(main, vectors, lists)
    info = IndexInfo(kind, dimension, count, time.time_ns() // 1_000_000, probes, recall, embedding_version)
    return _fresh(main, np.asarray(rows, np.int64).copy(), vectors, info)


def _fresh(main: Any, rows: Rows, vectors: Floats, info: IndexInfo) -> _State:
    no_vectors = np.zeros((0, info.dimension), np.float32)
    return _State(main, rows, vectors, np.ones(len(rows), np.bool_), 0, np.zeros(0, np.int64), no_vectors, info)


def _tune(main: Any, vectors: Floats, lists: int) -> tuple[int, float]:
    """Fewest probes (by doubling) that reach the recall wanted, and the recall that they have."""
    pairs = np.random.default_rng(1).choice(len(vectors), (RECALL_QUERIES, 2))
    queries, k = vectors[pairs].sum(axis=1), min(RECALL_K, len(vectors))
    exact = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    probes = 8
    while True:
        found = main.search(queries, k, params=_ivf_parameters(probes))[1]
        hits = sum(len(np.intersect1d(ours, theirs)) for ours, theirs in zip(found, exact, strict=True))
        recall = hits / exact.size
        if recall >= RECALL_TARGET or probes >= lists:
            return probes, round(recall, 4)
        probes = min(lists, 2 * probes)


def _ivf_parameters(probes: int) -> Any:
    """Given to each search: on the index itself they would be state that searches share."""
    parameters: Any = faiss.SearchParametersIVF()
    parameters.nprobe = probes
    return parameters


def _live(state: _State) -> tuple[Floats, Rows]:
    in_delta = state.delta_rows >= 0
    return (
        np.concatenate([state.main_vectors[state.alive], state.delta_vectors[in_delta]]),
        np.concatenate([state.main_rows[state.alive], state.delta_rows[in_delta]]),
    )


def _search_main(state: _State, queries: Floats, k: int, allowed: Bools | None) -> tuple[Rows, Floats]:
    count = len(state.main_rows)
    passing: Bools | None = state.alive if state.dead else None
    if allowed is not None:
        by_filter = _at_rows(allowed, state.main_rows)
        passing = by_filter if passing is None else by_filter & passing
    left = count if passing is None else int(np.count_nonzero(passing))
    if left == 0:
        return np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
    if passing is not None and left <= SCAN_MAX_SHARE * count:
        return _scan(queries, state.main_vectors, state.main_rows, np.flatnonzero(passing), k)
    bits = np.packbits(passing, bitorder="little") if passing is not None and left < count else None
    selector = faiss.IDSelectorBitmap(count, faiss.swig_ptr(bits)) if bits is not None else None
    parameters: Any = _ivf_parameters(state.info.probes) if state.info.probes else faiss.SearchParameters()
    parameters.sel = selector
    scores, at = state.main.search(queries, min(k, left), params=parameters)
    short = np.flatnonzero(at[:, -1] < 0)
    rows = np.where(at >= 0, state.main_rows[at], -1)
    if len(short):
        # The lists probed held too few that pass: the filter lies elsewhere than the query.
        everything = np.arange(count) if passing is None else np.flatnonzero(passing)
        rows[short], scores[short] = _scan(queries[short], state.main_vectors, state.main_rows, everything, at.shape[1])
    return rows, scores


def _scan(queries: Floats, vectors: Floats, rows: Rows, at: Rows, k: int) -> tuple[Rows, Floats]:
    scores = queries @ vectors[at].T
    if k < len(at):
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        scores, at = np.take_along_axis(scores, best, 1), at[best]
    else:
        at = np.broadcast_to(at, scores.shape)
    order = np.argsort(-scores, axis=1, kind="stable")
    return rows[np.take_along_axis(at, order, 1)], np.take_along_axis(scores, order, 1)


def _search_delta(state: _State, queries: Floats, allowed: Bools | None) -> tuple[Rows, Floats]:
    passing = state.delta_rows >= 0
    if allowed is not None:
        passing &= _at_rows(allowed, state.delta_rows)
    at = np.flatnonzero(passing)
    rows = np.broadcast_to(state.delta_rows[at], (len(queries), len(at)))
    return rows, queries @ state.delta_vectors[at].T


def _at_rows(allowed: Bools, rows: Rows) -> Bools:
    """`allowed` at some rows; False for those beyond its end (items that came after the filter was made)."""
    if len(allowed) == 0:
        return np.zeros(len(rows), np.bool_)
    inside = rows < len(allowed)
    at: Bools = allowed[np.minimum(rows, len(allowed) - 1)] & inside
    return at


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
