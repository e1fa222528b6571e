"""Quotas: at most, or at least, so many items of a category among the first places; pins stay where they are.

After diversity, with the pins. Invariant: a permutation; a pin is never moved; an upper bound is passed only by pins,
or where there is nothing else to show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    waiting = order[~np.isin(order, list(pinned))] if pinned else order
    is_free = np.ones(len(waiting), np.bool_)
    # Pins count from the start: what they will take of a bound is not to be given away before.
    windows = [
        _Window(
            bound.members[waiting],
            bound.at_least,
            bound.at_most,
            min(bound.within, count),
            sum(bool(bound.members[index]) for place, index in fixed.items() if place < bound.within),
            min(bound.within, count) - sum(place < bound.within for place in fixed),
        )
        for bound in bounds
    ]
    placed: list[int] = []
    for place in range(max((window.end for window in windows), default=0)):
        if place in fixed:
            placed.append(fixed[place])
            continue
        open_windows = [window for window in windows if place < window.end]
        at = _next(is_free, open_windows)
        is_free[at] = False
        placed.append(int(waiting[at]))
        for window in open_windows:
            window.take(at)
    rest = iter(waiting[is_free].tolist())
    placed.extend(fixed[place] if place in fixed else next(rest) for place in range(len(placed), count))
    return np.array(placed, np.intp)


@dataclass(slots=True)
class _Window:
    """A bound while places are given away."""

    # Which of those waiting it counts. [W]
    members: Mask
    at_least: int
    at_most: int
    # It holds for the places before this one.
    end: int
    # Places of its own that are filled or promised to pins, and places of its window that are left.
    used: int
    left: int

    def take(self, at: int) -> None:
        self.left -= 1
        self.used += bool(self.members[at])

    @property
    def is_full(self) -> bool:
        return self.used >= self.at_most

    @property
    def is_pressing(self) -> bool:
        return 0 < self.at_least - self.used >= self.left


def _next(is_free: Mask, windows: Sequence[_Window]) -> int:
    """The first of those waiting that may stand here; the first of all where none may."""
    allowed = is_free
    for window in windows:
        if window.is_full:
            allowed = allowed & ~window.members
    if not allowed.any():
        return int(is_free.argmax())
    pressing = [allowed & window.members for window in windows if window.is_pressing]
    # All lower bounds at once where an item can, else any of them, else none.
    for chosen in (np.logical_and.reduce(pressing), np.logical_or.reduce(pressing)) if pressing else ():
        if chosen.any():
            return int(chosen.argmax())
    return int(allowed.argmax())


def _positions(pins: Sequence[tuple[int, int]], count: int) -> dict[int, int]:
    """Place -> index; pins past the end take the last places that are free, in their order."""
    fixed = {position: index for index, position in pins if position < count}
    for index, position in reversed(pins):
        if position >= count:
            place = next((place for place in range(count - 1, -1, -1) if place not in fixed), None)
            if place is not None:
                fixed[place] = index
    return fixed
