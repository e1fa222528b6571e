"""Popular items from process memory: the rungs that need nobody.

Made from the release's popularity snapshot and the catalogue's decayed statistics, refreshed beside the requests.
Invariant: `everybody` is an order over all items, so that whatever a request excludes, what is left can be served;
it never asks another process.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from core.errors import ArtifactError
from features.catalog import Catalog, Floats, Rows

# So many are in exact order; the rest follow, to be reached only by very narrow filters.
EXACT_DEPTH = 2000


class PopularList(NamedTuple):
    """Rows, best first, and their popularity as a share of the best one's."""

    rows: Rows
    scores: Floats


class PopularLists:
    """The list for everybody, and one per segment."""

    def __init__(self, catalog: Catalog, snapshot: Mapping[str, Any]) -> None:
        """Args: the catalogue, and the bundle's POPULARITY file.

        Raises:
            ArtifactError: the snapshot is not `{"all": [[item_id, score]...], "segments": {name: [...]}}`.
        """
        self._catalog = catalog
        try:
            self._snapshot = _listed(catalog, snapshot["all"])
            self._segments = {str(name): _listed(catalog, entries) for name, entries in snapshot["segments"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the bundle's popularity list is broken ({error!r}); train again") from error
        self._revision = -1
        self._everybody = self._snapshot
        self._live_segments: dict[str, PopularList] = {}
        self.refresh()

    def everybody(self) -> PopularList:
        return self._everybody

    def segment(self, name: str) -> PopularList | None:
        """The list of a segment, by what its users did lately; None where there is none."""
        return self._live_segments.get(name) or self._segments.get(name)

    def refresh(self) -> None:
        """Takes in what the catalogue has learned since. May run on another thread than the readers."""
        revision = self._catalog.revision
        if revision == self._revision:
            return
        count = len(self._catalog)
        # By the logarithm of the decayed sum: decay moves all by the same step, so the order needs no "now",
        # and statistics too old to be told from zero keep theirs.
        log2 = self._catalog.column("log2_popularity")[:count, -1]
        liked = np.flatnonzero(np.isfinite(log2))
        if len(liked) > EXACT_DEPTH:
            liked = liked[np.argpartition(-log2[liked], EXACT_DEPTH)[:EXACT_DEPTH]]
        liked = liked[np.lexsort((liked, -log2[liked]))]
        taken = np.zeros(count, np.bool_)
        taken[liked] = True
        snapshot = self._snapshot.rows[~taken[self._snapshot.rows]]
        taken[snapshot] = True
        # Newest of the catalogue first.
        others = np.flatnonzero(~taken)[::-1]
        rows = np.concatenate((liked, snapshot, others)).astype(np.int32)
        scores = np.zeros(len(rows), np.float32)
        if len(liked):
            scores[: len(liked)] = np.exp2(np.maximum(log2[liked] - log2[liked[0]], -100))
        else:
            scores[: len(snapshot)] = self._snapshot.scores
        self._everybody = PopularList(rows, scores)
        self._live_segments = {name: self._in_segment(name) for name in self._catalog.segments()}
        self._revision = revision

    def _in_segment(self, name: str) -> PopularList:
        """What the catalogue has counted of the segment, then the rest of the bundle's list."""
        rows, log2 = self._catalog.segment_popularity(name)
        rows, log2 = rows[:EXACT_DEPTH], log2[:EXACT_DEPTH]
        scores = np.exp2(np.maximum(log2 - log2[0], -100)).astype(np.float32)
        older = self._segments.get(name)
        if older is not None:
            rest = ~np.isin(older.rows, rows)
            rows = np.concatenate((rows, older.rows[rest]))
            scores = np.concatenate((scores, np.zeros(int(rest.sum()), np.float32)))
        return PopularList(rows, scores)


def _listed(catalog: Catalog, entries: Sequence[Sequence[Any]]) -> PopularList:
    rows = catalog.rows(str(item_id) for item_id, _ in entries)
    scores = np.array([float(score) for _, score in entries], np.float32)
    known = rows >= 0
    rows, scores = rows[known], scores[known]
    _, first = np.unique(rows, return_index=True)
    first.sort()
    rows, scores = rows[first], scores[first]
    best = float(scores.max(initial=0.0))
    return PopularList(rows, scores / np.float32(best) if best > 0 else scores)
