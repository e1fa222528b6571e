"""What came since the lists were made: few vectors, scored one by one by every search.

Grows by appending to arrays that older deltas share. Invariant: what a `Delta` shows never changes; only the one
writer calls `adding` and `without`, on the newest.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from candidate.index.bits import Bools, Rows, pack
from candidate.index.exact import Floats, nothing, search_all

_ROOM = 1024


@dataclass(frozen=True, slots=True)
class Delta:
    """Vectors by slot. Slots past `size` belong to later deltas."""

    rows: Rows  # [capacity]
    vectors: Floats  # [capacity, d]
    # False = replaced or removed since. [size]
    alive: Bools
    # row -> its slot; the writer's.
    slots: dict[int, int]

    @classmethod
    def empty(cls, dimension: int) -> "Delta":
        return cls(np.zeros(_ROOM, np.int64), np.zeros((_ROOM, dimension), np.float32), np.zeros(0, np.bool_), {})

    @property
    def size(self) -> int:
        """Slots in use, of replaced and removed vectors too."""
        return len(self.alive)

    def adding(self, rows: Rows, vectors: Floats) -> "Delta":
        """With vectors [n, d] under their rows [n], each once."""
        before = self.without(rows)
        start, end = before.size, before.size + len(rows)
        grown = before if end <= len(before.rows) else before._with_room(2 * end)
        grown.rows[start:end], grown.vectors[start:end] = rows, vectors
        grown.slots.update(zip(rows.tolist(), range(start, end), strict=True))
        return replace(grown, alive=np.concatenate([grown.alive, np.ones(len(rows), np.bool_)]))

    def without(self, rows: Iterable[int]) -> "Delta":
        """Without some rows, those that are in it."""
        slots = [self.slots.pop(int(row)) for row in rows if int(row) in self.slots]
        if not slots:
            return self
        alive = self.alive.copy()
        alive[slots] = False
        return replace(self, alive=alive)

    def search(self, queries: Floats, k: int, allowed: Bools | None) -> tuple[Rows, Floats]:
        """At most k best of the delta. [B, <= k] each, best first."""
        passing = self.alive
        rows = self.rows[: self.size]
        if allowed is not None:
            inside = rows < len(allowed)
            passing = passing & inside
            passing[inside] &= allowed[rows[inside]]
        some = None if passing.all() else pack(passing, self.size)
        if not self.size or (some is not None and not some.any()):
            return nothing(len(queries), 0)
        at, scores = search_all(queries, self.vectors[: self.size], min(k, self.size), some)
        return np.where(at >= 0, rows[at], -1), scores

    def _with_room(self, capacity: int) -> "Delta":
        rows, vectors = np.zeros(capacity, np.int64), np.zeros((capacity, self.vectors.shape[1]), np.float32)
        rows[: self.size], vectors[: self.size] = self.rows[: self.size], self.vectors[: self.size]
        return replace(self, rows=rows, vectors=vectors)


def merge_best(first: tuple[Rows, Floats], second: tuple[Rows, Floats], k: int) -> tuple[Rows, Floats]:
    """The k best of two answers [B, k] and [B, m], of which the second seldom has any."""
    rows, scores = first
    more_rows, more_scores = second
    for query in np.flatnonzero((more_scores > scores[:, -1:]).any(axis=1)) if more_rows.shape[1] and k else ():
        ours, theirs = scores[query], more_scores[query]
        chosen = theirs > ours[-1]
        together = np.concatenate([ours, theirs[chosen]])
        order = np.argsort(-together, kind="stable")[:k]
        rows[query] = np.concatenate([rows[query], more_rows[query][chosen]])[order]
        scores[query] = together[order]
    return rows, scores
