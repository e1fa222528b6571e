"""Diversity: maximal marginal relevance over categories.

Each place goes to the item with the best `(1 - d) * relevance - d * (similarity to the most similar item placed)`.
Source: Carbonell and Goldstein, "The Use of MMR", SIGIR 1998. Invariant: values fall along the order, so the score
that an item is shown with agrees with its place; with d = 0 the order is that of the relevance.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.catalog import Floats, Rows

Floats64 = npt.NDArray[np.float64]
# Places that are diversified one by one; what follows keeps the value it had then.
MAX_PLACES = 100


class Diversified(NamedTuple):
    """Indices, best first [C], and what each item loses for its likeness to those placed before it [C]."""

    order: npt.NDArray[np.intp]
    penalties: Floats64


def category_vectors(categories: Rows) -> Floats:
    """Unit vectors of the items' categories.

    Args:
        categories: category numbers of each item, 0 = none. [C, K]

    Returns:
        [C, U], U the number of distinct categories; a zero row for an item with none.
    """
    names, index = np.unique(categories, return_inverse=True)
    vectors = np.zeros((len(categories), len(names)), np.float32)
    vectors[np.arange(len(categories))[:, None], index.reshape(categories.shape)] = 1.0
    vectors[:, names == 0] = 0.0
    norms = np.sqrt(vectors.sum(axis=1, keepdims=True))
    unit: Floats = vectors / np.maximum(norms, np.float32(1.0))
    return unit


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
    return Diversified(order, penalties)
