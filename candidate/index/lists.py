"""The approximate part: inverted lists of half-precision vectors (FAISS IVF, SQfp16), tuned to a recall.

Measured against 8-bit codes, plain lists and HNSW in benchmarks/index.md. Made, merged and searched by ItemIndex;
pure: everything comes in as an argument. Invariant: a `Lists` is never changed once it is made, so any number of
searches run on it while its successor is made beside them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np

from candidate.index import bits
from candidate.index.bits import Bits, Rows
from candidate.index.exact import Floats, on_one_core, search_all, with_infinities

# Probes are raised until this share of the exact neighbours is found in held-out queries: with what other queries
# may differ from those, 0.98 holds.
RECALL_TARGET, RECALL_QUERIES, RECALL_K = 0.985, 256, 500
# k-means sees so many vectors for each list; FAISS asks for 39 at least.
_SAMPLE_PER_LIST, _LEAST_PER_LIST = 64, 39
# Vectors are added so many at a time: what waits for the interpreter's lock comes in between.
_SLICE = 16_384
# The lists fit the items until their number is this many times what they were trained for, or that much less.
_OUTGROWN = 2.0


@dataclass(frozen=True, slots=True)
class Lists:
    """Lists of vectors under the ids of their rows."""

    index: Any  # faiss.IndexIVF
    kind: str
    # Lists searched per query, and the recall measured with them when they were chosen.
    probes: int
    recall: float
    # Items when the centroids were trained.
    trained_items: int

    @property
    def count(self) -> int:
        """Vectors in the lists, of removed items too."""
        return int(self.index.ntotal)

    def fit(self, items: int) -> bool:
        """Whether the centroids still suit so many items."""
        return self.trained_items / _OUTGROWN <= items <= self.trained_items * _OUTGROWN

    def probes_for(self, share: float) -> int:
        """Lists to search where a share of the items passes: the k best of those that pass lie further apart."""
        return min(int(self.index.nlist), math.ceil(self.probes / share))

    def search(self, queries: Floats, k: int, probes: int, passing: Bits | None = None) -> tuple[Rows, Floats]:
        """The k best rows of each query [B, d], of those in `passing`, within the nearest `probes` lists."""
        on_one_core()
        # Given to each search: on the index itself the probes would be state that searches share.
        parameters: Any = faiss.SearchParametersIVF()
        parameters.nprobe = probes
        if passing is not None:
            parameters.sel = faiss.IDSelectorBitmap(len(passing), faiss.swig_ptr(passing))
        scores, rows = self.index.search(queries, k, params=parameters)
        return with_infinities(rows, scores)


def train(vectors: Floats, live: Bits, queries: Floats | None = None, seed: int = 0) -> Lists:
    """Lists of the rows `live` of `vectors` [n, d], from nothing: centroids, vectors, probes.

    Args:
        vectors: by row.
        live: the rows to take.
        queries: what users ask [B, d], to tune the probes; None = points between two items.
        seed: of the samples.
    """
    on_one_core()
    rows, rng = bits.members(live), np.random.default_rng(seed)
    # About 4 * sqrt(n) lists, a power of two; fewer where there are too few vectors to place them.
    most = math.floor(math.log2(max(1, len(rows) / _LEAST_PER_LIST)))
    lists = 2 ** min(most, round(math.log2(4 * math.sqrt(len(rows)))))
    kind = f"IVF{lists},SQfp16"
    index: Any = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(rng.choice(rows, min(len(rows), _SAMPLE_PER_LIST * lists), replace=False))
    index.train(vectors[sample])
    _add(index, vectors, rows)
    made = Lists(index, kind, 1, 0.0, len(rows))
    return tuned(made, vectors, live, queries if queries is not None else between(vectors, rows, rng))


def merged(lists: Lists, keep: Bits, vectors: Floats, rows: Rows) -> Lists:
    """A copy of the lists with only the rows `keep`, and `rows` with their vectors (by row) added; same centroids."""
    on_one_core()
    index = faiss.clone_index(lists.index)
    selector = faiss.IDSelectorBitmap(len(keep), faiss.swig_ptr(keep))
    index.remove_ids(faiss.IDSelectorNot(selector))
    _add(index, vectors, rows)
    return replace(lists, index=index)


def tuned(lists: Lists, vectors: Floats, live: Bits, queries: Floats) -> Lists:
    """The same lists with the fewest probes that reach the recall wanted, to within a sixteenth."""
    queries = np.ascontiguousarray(queries[:RECALL_QUERIES], np.float32)
    k = min(RECALL_K, lists.count)
    exact = search_all(queries, vectors, k, live)[0]

    def recall(probes: int) -> float:
        return share_found(lists.search(queries, k, probes)[0], exact)

    least, probes, most = 1, 8, int(lists.index.nlist)
    probes = min(probes, most)
    while probes < most and recall(probes) < RECALL_TARGET:
        least, probes = probes, min(most, 2 * probes)
    while probes - least > max(1, least // 16):
        middle = (least + probes) // 2
        least, probes = (least, middle) if recall(middle) >= RECALL_TARGET else (middle, probes)
    return replace(lists, probes=probes, recall=round(recall(probes), 4))


def between(vectors: Floats, rows: Rows, rng: np.random.Generator) -> Floats:
    """Made-up users, each between two items: items themselves would be too easy to find. [B, d]."""
    pairs = rng.choice(rows, (RECALL_QUERIES, 2))
    queries = vectors[pairs].sum(axis=1)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    return np.asarray(queries / np.maximum(lengths, 1e-9), np.float32)


def share_found(found: Rows, exact: Rows) -> float:
    """Recall: the share of the exact rows [B, k] that are among those found [B, k]; -1 is no row."""
    wanted = int((exact >= 0).sum())
    if not wanted:
        return 1.0
    hits = sum(len(np.intersect1d(ours, theirs[theirs >= 0])) for ours, theirs in zip(found, exact, strict=True))
    return hits / wanted


def _add(index: Any, vectors: Floats, rows: Rows) -> None:
    for start in range(0, len(rows), _SLICE):
        part = rows[start : start + _SLICE]
        index.add_with_ids(vectors[part], part)
