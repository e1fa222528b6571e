"""The lists on a GPU, where there is one and faiss-gpu is installed: searched there, with the CPU's lists behind.

Used by candidate/index/lists.py. A GPU knows no filters: it is asked for as many as the filter will take away, and what
passes is kept. Invariant: no GPU, no faiss-gpu, or a GPU that has no room means None, said once, and never an error.
"""

import threading
from typing import Any

import faiss
import numpy as np

from candidate.index.bits import Bits, Rows, having
from candidate.index.exact import Floats
from core.telemetry import get_logger

_log = get_logger("candidate")
# What FAISS allows on a GPU, of results and of lists probed.
MAX_K = MAX_PROBES = 2048


class GpuLists:
    """A copy of an IVF index on a GPU. Safe from several threads, one at a time: FAISS's GPU memory is not."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._searching = threading.Lock()

    def search(
        self, queries: Floats, k: int, depth: int, probes: int, passing: Bits | None
    ) -> tuple[Rows, Floats] | None:
        """The k best that pass, of the `depth` best; None where those are too many for a GPU, or too few pass."""
        if depth > MAX_K or probes > MAX_PROBES:
            return None
        parameters: Any = faiss.SearchParametersIVF()
        parameters.nprobe = probes
        with self._searching:
            scores, rows = self._index.search(queries, depth, params=parameters)
        if passing is None:
            return rows, scores
        fits = (rows >= 0) & having(passing, np.maximum(rows, 0))
        if (fits.sum(axis=1) < k).any():
            return None
        # What passes first, in the order of the scores.
        first = np.argsort(~fits, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(rows, first, 1), np.take_along_axis(scores, first, 1)


def on_gpu(index: Any) -> GpuLists | None:
    """A copy of an IVF index on the first GPU."""
    # faiss-cpu has no such function, or says 0.
    if not getattr(faiss, "get_num_gpus", int)():
        return None
    try:
        return GpuLists(faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index))
    except (RuntimeError, AttributeError) as error:
        _log.warning("the index does not go on the GPU and is searched by the CPU", problem=str(error)[:200])
        return None
