"""NDCG@10, which judges an order: what is relevant counts less the further down it stands, and not at all below ten.

Used where models are trained, exported and evaluated, and by the benchmarks. Invariant: the discount is written here
and nowhere else, so all figures of that name can be compared.
"""

import numpy as np
import numpy.typing as npt

from features.catalog import Floats

CUTOFF = 10


def ndcg(scores: Floats, gains: Floats, missed: int = 0) -> float:
    """Of one list with gains of 0 or 1; `missed` further relevant items are not in the list."""
    relevant = int(gains.sum()) + missed
    if relevant == 0:
        return 0.0
    best = np.argsort(-scores, kind="stable")[:CUTOFF]
    discounts = ndcg_of_ranks(np.arange(CUTOFF))
    return float((gains[best] * discounts[: len(best)]).sum() / discounts[:relevant].sum())


def ndcg_of_ranks(ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Of lists in which one item is relevant, by its rank, 0 = first: the discount of that rank."""
    return np.where(ranks < CUTOFF, 1 / np.log2(ranks + 2), 0.0)
