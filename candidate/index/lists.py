"""The approximate part: inverted lists of half-precision vectors (FAISS IVF, SQfp16), searched as deep as is needed.

Measured against 8-bit codes, plain lists and HNSW in benchmarks/index.md. Made, merged and searched by ItemIndex;
pure: everything comes in as an argument. Invariant: a `Lists` is never changed once it is made, so any number of
searches run on it while its successor is made beside them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np

from candidate.index import bits, reach
from candidate.index.bits import Bits, Rows
from candidate.index.exact import Floats, on_one_core, search_all, with_infinities
from candidate.index.gpu import GpuLists, on_gpu
from candidate.index.reach import RECALL_K, RECALL_QUERIES, Reach, Sample

# k-means sees so many vectors for each list; FAISS asks for 39 at least.
_SAMPLE_PER_LIST, _LEAST_PER_LIST = 64, 39
# Vectors are copied and added so many at a time.
_SLICE = 131_072
# The lists fit the items until their number is this many times what they were trained for, or that much less.
_OUTGROWN = 2.0


@dataclass(frozen=True, slots=True)
class Lists:
    """Lists of vectors under the ids of their rows."""

    index: Any  # faiss.IndexIVF
    kind: str
    # How many lists to probe for what; and the recall measured with that.
    reach: Reach
    recall: float
    # Items when the centroids were trained.
    trained_items: int
    sample: Sample
    gpu: GpuLists | None

    @property
    def count(self) -> int:
        """Vectors in the lists, of removed items too."""
        return int(self.index.ntotal)

    def fit(self, items: int) -> bool:
        """Whether the centroids still suit so many items."""
        return self.trained_items / _OUTGROWN <= items <= self.trained_items * _OUTGROWN

    def search(self, queries: Floats, k: int, passing: Bits | None, excluded: int) -> tuple[Rows, Floats]:
        """The k best rows of each query [B, d], of those in `passing` (None = all); a filter has `excluded` some."""
        depth = k if passing is None else self.sample.depth(queries, k, passing, excluded)
        probes = self.reach.of_passing(k, depth)
        if self.gpu is not None:
            found = self.gpu.search(queries, k, depth, probes, passing)
            if found is not None:
                return with_infinities(*found)
        return self.search_lists(queries, k, probes, passing)

    def search_lists(self, queries: Floats, k: int, probes: int, passing: Bits | None = None) -> tuple[Rows, Floats]:
        """The k best within the nearest `probes` lists, by the CPU."""
        on_one_core()
        # Given to each search: on the index itself the probes would be state that searches share.
        parameters: Any = faiss.SearchParametersIVF()
        parameters.nprobe = probes
        if passing is not None:
            parameters.sel = faiss.IDSelectorBitmap(len(passing), faiss.swig_ptr(passing))
        scores, rows = self.index.search(queries, k, params=parameters)
        return with_infinities(rows, scores)


def train(vectors: Floats, live: Bits, queries: Floats | None = None, seed: int = 0) -> Lists:
    """Lists of the rows `live` of `vectors` [n, d], from nothing: centroids, vectors, reach.

    Args:
        vectors: by row.
        live: the rows to take.
        queries: what users ask [B, d], to measure the reach by; None = points between two items.
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
    made = Lists(index, kind, Reach.everywhere(lists), 0.0, len(rows), Sample.of(vectors, rows), on_gpu(index))
    return tuned(made, vectors, live, queries if queries is not None else between(vectors, rows, rng))


def merged(lists: Lists, keep: Bits, vectors: Floats, rows: Rows) -> Lists:
    """A copy of the lists with only the rows `keep`, and `rows` with their vectors (by row) added; same centroids."""
    on_one_core()
    index = faiss.clone_index(lists.index)
    selector = faiss.IDSelectorBitmap(len(keep), faiss.swig_ptr(keep))
    index.remove_ids(faiss.IDSelectorNot(selector))
    _add(index, vectors, rows)
    sample = Sample.of(vectors, np.concatenate([bits.members(keep), rows]))
    return replace(lists, index=index, sample=sample, gpu=on_gpu(index))


def tuned(lists: Lists, vectors: Floats, live: Bits, queries: Floats) -> Lists:
    """The same lists, their reach measured by these queries."""
    on_one_core()
    queries = np.ascontiguousarray(queries[:RECALL_QUERIES], np.float32)
    k = min(RECALL_K, lists.count)
    exact, _ = search_all(queries, vectors, min(reach.DEEPEST, lists.count), live)
    measured = reach.measure(_centroid_ranks(lists.index, queries, exact, len(vectors)), lists.index.nlist)
    found, _ = lists.search_lists(queries, k, measured.of_best(k))
    return replace(lists, reach=measured, recall=round(share_found(found, exact[:, :k]), 4))


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


def _centroid_ranks(index: Any, queries: Floats, rows: Rows, row_count: int) -> Rows:
    """How many lists are nearer to each query than that of each of its rows [B, n]: probes must go beyond. [B, n]."""
    list_of = np.zeros(row_count, np.int64)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            list_of[faiss.rev_swig_ptr(index.invlists.get_ids(number), size)] = number
    _, nearest = index.quantizer.search(queries, index.nlist)
    rank_of = np.empty_like(nearest)
    np.put_along_axis(rank_of, nearest, np.broadcast_to(np.arange(index.nlist), nearest.shape), 1)
    return np.take_along_axis(rank_of, list_of[rows], 1)
