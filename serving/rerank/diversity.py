"""Diversity: maximal marginal relevance, or a determinantal point process, over categories or item vectors.

MMR gives each place to the item with the best `(1 - d) * relevance - d * (similarity to the most similar item placed)`.
Source: Carbonell and Goldstein, "The Use of MMR", SIGIR 1998. A DPP looks at the whole set instead: each place goes to
the item that makes `det(L)` largest, `L[i, j] = q[i] * similarity(i, j) * q[j]` and `q = exp(a * relevance)`. Source:
Chen, Zhang and Zhou, "Fast Greedy MAP Inference for Determinantal Point Process", NeurIPS 2018, algorithm 1.
Invariant: values fall along the order, so the score that an item is shown with agrees with its place; with d = 0 the
order is that of the relevance.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.catalog import Floats, Rows

Floats64 = npt.NDArray[np.float64]
# Places that are diversified one by one; what follows keeps the value it had then.
MAX_PLACES = 100
# What of an item is not in those placed before it, at least: the same again is worth little, not nothing.
_LEAST_NOVELTY = 1e-3


class Diversified(NamedTuple):
    """Indices, best first [C]; what each item loses for its likeness to those before it [C]; how relevance counts.

    An item's value, by which it is placed, is `scale * relevance - penalty`.
    """

    order: npt.NDArray[np.intp]
    penalties: Floats64
    scale: float


def category_vectors(categories: Rows) -> Floats:
    """Unit vectors of the items' categories.

    Args:
        categories: category numbers of each item, 0 = none. [C, K]

    Returns:
        [C, U], U the number of distinct categories; a zero row for an item with none.
    """
    # A table by number: they are few, and numpy.unique would sort them all.
    is_there = np.zeros(int(categories.max(initial=0)) + 1, np.bool_)
    is_there[categories] = True
    index = np.cumsum(is_there) - 1
    vectors = np.zeros((len(categories), int(index[-1]) + 1), np.float32)
    vectors[np.arange(len(categories))[:, None], index[categories]] = 1.0
    if is_there[0]:
        vectors[:, 0] = 0.0
    norms = np.sqrt(vectors.sum(axis=1, keepdims=True))
    unit: Floats = vectors / np.maximum(norms, np.float32(1.0))
    return unit


def item_vectors(vectors: Floats, rows: Rows) -> Floats:
    """Unit vectors of some items; zeros for one that has none.

    Args:
        vectors: unit vectors of the first n rows of the catalogue. [n, d]
        rows: catalogue rows. [C]
    """
    taken: Floats = np.where((rows < len(vectors))[:, None], vectors[np.minimum(rows, len(vectors) - 1)], 0.0)
    return taken


def diversify(relevance: Floats64, vectors: Floats, diversity: float, places: int) -> Diversified:
    """Orders items by maximal marginal relevance. Ties go to the earlier index.

    Args:
        relevance: [C]
        vectors: unit vectors. [C, U]
        diversity: 0..1, the d of the formula.
        places: how many to place one by one.

    Returns:
        The order, and `d * similarity` of each item, by its index.
    """
    count = len(relevance)
    penalties = np.zeros(count, np.float64)
    places = min(places, count, MAX_PLACES) if diversity > 0 else 0
    value = (1 - diversity) * relevance
    weighted = diversity * vectors
    order = np.empty(count, np.intp)
    current = value.copy()
    penalty = np.zeros(count, np.float64)
    placed = np.zeros(count, np.bool_)
    for place in range(places):
        best = int(current.argmax())
        order[place] = best
        placed[best] = True
        penalties[best] = penalty[best]
        np.maximum(penalty, weighted @ vectors[best], out=penalty)
        np.subtract(value, penalty, out=current)
        current[placed] = -np.inf
    rest = np.flatnonzero(~placed)
    penalties[rest] = penalty[rest]
    order[places:] = rest[np.argsort(-current[rest], kind="stable")] if places else np.argsort(-value, kind="stable")
    return Diversified(order, penalties, 1 - diversity)


def diversify_by_dpp(relevance: Floats64, vectors: Floats, diversity: float, places: int) -> Diversified:
    """Orders items by the greedy mode of a determinantal point process. Ties go to the earlier index.

    The logarithm of what an item adds to the determinant, divided by `2a`, is its relevance less a penalty for what of
    it is there already; `a = (1 - d) / 2d` makes d weigh about as much as in `diversify`.

    Args:
        relevance: [C]
        vectors: unit vectors. [C, U]
        diversity: 0..1, the d of the formula; 1 counts as 0.99.
        places: how many to place one by one.
    """
    count = len(relevance)
    places = min(places, count, MAX_PLACES) if diversity > 0 else 0
    weight = 1 / max((1 - diversity) / max(diversity, 1e-6), 1e-2)
    novelty = np.ones(count, np.float64)
    penalty = np.zeros(count, np.float64)
    penalties = np.zeros(count, np.float64)
    current = relevance.copy()
    order = np.empty(count, np.intp)
    placed = np.zeros(count, np.bool_)
    # Rows of the Cholesky factor of the similarities of those placed with all. [places, C]
    factor = np.zeros((places, count), np.float64)
    for place in range(places):
        best = int(current.argmax())
        order[place] = best
        placed[best] = True
        penalties[best] = penalty[best]
        row = vectors @ vectors[best]
        # An item without a vector is like itself alone.
        row[best] = 1.0
        row = (row - factor[:place].T @ factor[:place, best]) / np.sqrt(novelty[best])
        factor[place] = row
        novelty = np.maximum(novelty - row * row, _LEAST_NOVELTY)
        penalty = np.maximum(penalty, -np.log(novelty) * weight)
        np.subtract(relevance, penalty, out=current)
        current[placed] = -np.inf
    rest = np.flatnonzero(~placed)
    penalties[rest] = penalty[rest]
    order[places:] = rest[np.argsort(-current[rest], kind="stable")]
    return Diversified(order, penalties, 1.0)
