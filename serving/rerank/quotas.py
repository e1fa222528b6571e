"""Quotas: at most, or at least, so many items of a category among the first places; pins stay where they are.

After diversity, with the pins. Invariant: a permutation; a pin is never moved; an upper bound is passed only by pins,
or where there is nothing else to show.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


class Bound(NamedTuple):
    """A quota as it holds for one request's candidates."""

    # Which candidates it counts. [C]
    members: Mask
    at_least: int
    at_most: int
    # It holds for the first so many places.
    within: int


def hold_quotas(order: Indices, bounds: Sequence[Bound], pins: Sequence[tuple[int, int]]) -> Indices:
    """The order with the quotas held and some entries at fixed positions.

    Each place goes to the first item that no upper bound forbids; where a lower bound needs all places that are left in
    its window, to the first item that it counts.

    Args:
        order: indices, best first. [C]
        bounds: the quotas.
        pins: (index, position), one a position, by rising position; a position past the end means the end.
    """
    count = len(order)
    fixed = _positions(pins, count)
    pinned = set(fixed.values())
    waiting = [int(index) for index in order if int(index) not in pinned]
    # Pins count from the start: what they will take of a bound is not to be given away before.
    used = [
        sum(bool(bound.members[index]) for place, index in fixed.items() if place < bound.within) for bound in bounds
    ]
    free = [min(bound.within, count) - sum(place < bound.within for place in fixed) for bound in bounds]
    placed: list[int] = []
    for place in range(min(max((bound.within for bound in bounds), default=0), count)):
        if place in fixed:
            placed.append(fixed[place])
            continue
        index = _next(waiting, place, bounds, used, free)
        waiting.remove(index)
        placed.append(index)
        for number, bound in enumerate(bounds):
            if place < bound.within:
                free[number] -= 1
                used[number] += bool(bound.members[index])
    rest = iter(waiting)
    placed.extend(fixed[place] if place in fixed else next(rest) for place in range(len(placed), count))
    return np.array(placed, np.intp)


def _next(waiting: list[int], place: int, bounds: Sequence[Bound], used: Sequence[int], free: Sequence[int]) -> int:
    """The first of those waiting that may stand here; the first of all where none may."""
    holding = [number for number, bound in enumerate(bounds) if place < bound.within]
    full = [bounds[number].members for number in holding if used[number] >= bounds[number].at_most]
    needed = [
        bounds[number].members for number in holding if 0 < bounds[number].at_least - used[number] >= free[number]
    ]
    allowed = [index for index in waiting if not any(members[index] for members in full)]
    for index in allowed:
        if all(members[index] for members in needed):
            return index
    for index in allowed:
        if any(members[index] for members in needed):
            return index
    return (allowed or waiting)[0]


def _positions(pins: Sequence[tuple[int, int]], count: int) -> dict[int, int]:
    """Place -> index; pins past the end take the last places that are free, in their order."""
    fixed = {position: index for index, position in pins if position < count}
    for index, position in reversed(pins):
        if position >= count:
            place = next((place for place in range(count - 1, -1, -1) if place not in fixed), None)
            if place is not None:
                fixed[place] = index
    return fixed
