"""Exploration: now and then a new item gets a place, and the chance of that is written down.

Last step of the re-ranker. Invariant: the propensity of every shown item is the exact probability that this place
went to it, given the order without exploration.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.intp]
Floats64 = npt.NDArray[np.float64]


class Explored(NamedTuple):
    """Indices, best first [C], and propensities by place [C]."""

    order: Indices
    propensities: Floats64


def explore(order: Indices, shown: int, pool: Indices, rate: float, closed: frozenset[int], draw: float) -> Explored:
    """With probability `rate`, gives one of the shown places to an item of the pool, all of them alike.

    The place is the first open one of the answer's second half; who stood there is left out of the answer.

    Args:
        order: indices, best first. [C]
        shown: how many of them the answer shows.
        pool: indices that may be tried; those shown anyway are ignored.
        rate: probability of exploring.
        closed: places that a rule has filled.
        draw: uniform in 0..1: below `rate` explores, and where it falls there chooses the item.
    """
    propensities = np.ones(len(order), np.float64)
    shown = min(shown, len(order))
    place = next((place for place in range(shown // 2, shown) if place not in closed), None)
    is_shown = np.zeros(len(order), np.bool_)
    is_shown[order[:shown]] = True
    pool = pool[~is_shown[pool]]
    if place is None or rate <= 0 or not len(pool) or shown < 2:
        return Explored(order, propensities)
    propensities[place] = 1 - rate
    if draw >= rate:
        return Explored(order, propensities)
    tried = int(pool[min(int(draw / rate * len(pool)), len(pool) - 1)])
    changed = order.copy()
    at = int(np.flatnonzero(order == tried)[0])
    changed[place], changed[at] = tried, order[place]
    propensities[place] = rate / len(pool)
    return Explored(changed, propensities)
