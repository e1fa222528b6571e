"""What one search of the index sees, and the search: arrays and lists in, rows and scores out.

Between ItemIndex, which replaces states, and the parts that find. Invariant: a state's arrays are replaced, never
changed, but for the vectors: those of a row are overwritten by its next, so a search that runs beside that write may
score this one row by parts of both.
"""

from dataclasses import dataclass, replace

import numpy as np

from candidate.index import bits, exact
from candidate.index.bits import Bits, Bools, Rows
from candidate.index.delta import Delta, merge_best
from candidate.index.exact import Floats
from candidate.index.lists import Lists

# Where this share of the rows, or so few, pass a filter, those are scored one by one: exact, and cheaper.
SCAN_MAX_SHARE, SCAN_MIN_ITEMS = 0.05, 2_000


@dataclass(frozen=True, slots=True)
class State:
    """Vectors by row, and who has which of them."""

    vectors: Floats  # by row, with room for more; [capacity, d]
    # Rows in use: the highest and all below.
    count: int
    # Rows that are in the index, and how many.
    present: Bits
    size: int
    # None: every vector is scored. Else the rows that the lists have as they are now, and how many.
    lists: Lists | None
    listed: Bits
    listed_size: int
    delta: Delta
    build_time_ms: int


def search(state: State, queries: Floats, k: int, allowed: Bools | None) -> tuple[Rows, Floats]:
    made, vectors = state.lists, state.vectors[: state.count]
    within, size = (state.present, state.size) if made is None else (state.listed, state.listed_size)
    passing, left = _passing(within, size, allowed)
    width = min(k, left)
    if not width:
        found = exact.nothing(len(queries), 0)
    elif left <= SCAN_MIN_ITEMS or left <= SCAN_MAX_SHARE * state.count:
        found = exact.search_some(queries, vectors, passing, width)
    elif made is None:
        found = exact.search_all(queries, vectors, width, passing if left < state.count else None)
    else:
        found = made.search(queries, width, passing if left < made.count else None, size - left)
        found = _completed(found, queries, vectors, passing)
    rows, scores = _padded(found, k)
    if made is not None and state.delta.size:
        rows, scores = merge_best((rows, scores), state.delta.search(queries, k, allowed), k)
    return rows, scores


def search_exact(state: State, queries: Floats, k: int, allowed: Bools | None) -> Rows:
    passing, _ = _passing(state.present, state.size, allowed)
    return exact.search_all(queries, state.vectors[: state.count], k, passing)[0]


def _completed(found: tuple[Rows, Floats], queries: Floats, vectors: Floats, passing: Bits) -> tuple[Rows, Floats]:
    """Exact answers for queries whose lists held too few that pass: the filter lies elsewhere than the query."""
    rows, scores = found
    short = np.flatnonzero(rows[:, -1] < 0)
    if len(short):
        rows[short], scores[short] = exact.search_all(queries[short], vectors, rows.shape[1], passing)
    return rows, scores


def _passing(within: Bits, size: int, allowed: Bools | None) -> tuple[Bits, int]:
    """The rows of `within` that are allowed, and how many."""
    if allowed is None:
        return within, size
    passing = bits.pack(allowed, 8 * len(within)) & within
    return passing, bits.count(passing)


def _padded(found: tuple[Rows, Floats], k: int) -> tuple[Rows, Floats]:
    rows, scores = found
    if rows.shape[1] == k:
        return found
    missing = ((0, 0), (0, k - rows.shape[1]))
    return np.pad(rows, missing, constant_values=-1), np.pad(scores, missing, constant_values=-np.inf)


def with_room(state: State, count: int) -> State:
    """With at least `count` rows in use."""
    if count <= state.count:
        return state
    if count <= len(state.vectors):
        return replace(state, count=count)
    vectors = np.zeros((2 * count, state.vectors.shape[1]), np.float32)
    vectors[: state.count] = state.vectors[: state.count]
    present, listed = bits.grown(state.present, len(vectors)), bits.grown(state.listed, len(vectors))
    return replace(state, vectors=vectors, count=count, present=present, listed=listed)


def counted(state: State) -> State:
    """With the sizes of its sets; an exact index has no other set than what is present."""
    size = bits.count(state.present)
    if state.lists is None:
        return replace(state, size=size, listed=state.present, listed_size=size)
    return replace(state, size=size, listed_size=bits.count(state.listed))
