"""Exact search: every vector that passes is scored, by FAISS, on the caller's thread alone.

Answers small indexes, narrow filters and the question what an approximate search has missed. Invariant: nothing is
copied or kept but the rows of a narrow filter; what does not exist is -1 with a score of -inf.
"""

import threading

import faiss
import numpy as np
import numpy.typing as npt

from candidate.index.bits import Bits, Rows, members

Floats = npt.NDArray[np.float32]

_of_thread = threading.local()


def on_one_core() -> None:
    """Keeps FAISS on the calling thread: that setting is each thread's own, and one query gains nothing by two."""
    if not getattr(_of_thread, "is_set", False):
        faiss.omp_set_num_threads(1)
        _of_thread.is_set = True


def search_all(queries: Floats, vectors: Floats, k: int, passing: Bits | None = None) -> tuple[Rows, Floats]:
    """The k best rows of `vectors` [n, d] for queries [B, d]; `passing` = None means all of them.

    Returns:
        Rows [B, k], best first, and inner products [B, k].
    """
    on_one_core()
    count = len(queries)
    rows, scores = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    if not len(vectors) or not k:
        return nothing(count, k)
    # The bits are kept alive by our argument while FAISS looks at them.
    selector = None if passing is None else faiss.IDSelectorBitmap(len(passing), faiss.swig_ptr(passing))
    faiss.knn_inner_product(
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        vectors.shape[1],
        count,
        len(vectors),
        k,
        faiss.swig_ptr(scores),
        faiss.swig_ptr(rows),
        selector,
    )
    return with_infinities(rows, scores)


def search_some(queries: Floats, vectors: Floats, passing: Bits, k: int) -> tuple[Rows, Floats]:
    """The same for a filter that few rows pass: they are gathered first."""
    some = members(passing)
    at, scores = search_all(queries, vectors[some], k)
    return np.where(at >= 0, some[at], -1) if len(some) else at, scores


def nothing(count: int, k: int) -> tuple[Rows, Floats]:
    """The answer to `count` queries where there is nothing."""
    return np.full((count, k), -1, np.int64), np.full((count, k), -np.inf, np.float32)


def with_infinities(rows: Rows, scores: Floats) -> tuple[Rows, Floats]:
    """What FAISS returns, with -inf for what does not exist (it says -3.4e38)."""
    if len(rows) and rows[:, -1].min() < 0:
        scores[rows < 0] = -np.inf
    return rows, scores
