"""How often two items go together, as sums that decay: what co-visitation knows, without users or events.

Filled by candidate/co_visitation.py, asked by its source. The pairs lie in sorted arrays (the main part) beside a small
dictionary of what came since (the delta), which is merged into them now and then; sums are forward-decayed
(features/decay.py), all at one landmark. Invariant: at most `pairs_max` pairs and a delta of a share of them, the
lightest go first; as long as none had to go, any order of the same additions gives the same sums, up to rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from features import decay

# Pairs of two items seen together once or twice are mostly chance: each item counts as if it had this much more
# weight in other pairs (a prior, as in Koren's shrinkage of item similarities).
PRIOR_WEIGHT = 5.0
# The delta is merged past this size, or this share of the pairs that may be held, or of those that are: a merge costs
# as much as there is to merge into.
_DELTA_LEAST, _DELTA_SHARE_OF_MAX, _DELTA_SHARE = 20_000, 0.05, 0.1
# A pair whose weight has decayed below this says nothing any more.
_LEAST_WEIGHT = 1e-3
# Doublings that sums may lie behind a new event before they are moved to its landmark.
_LANDMARK_AHEAD = 64
_UNDERFLOW = -1000

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass(slots=True)
class _State:
    """What one question sees; replaced as a whole when the delta is merged. Items are numbered here, and only here."""

    landmark: int
    names: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    # Weight of all pairs of an item, those that went included; by number.
    totals: list[float] = field(default_factory=list)
    # The main part: pairs of item i are starts[i]:starts[i + 1], of the items that it has. [k + 1], [m], [m]
    starts: Ints = field(default_factory=lambda: np.zeros(1, np.int64))
    others: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    sums: Doubles = field(default_factory=lambda: np.zeros(0, np.float64))
    # item -> other item -> weight since the last merge.
    delta: dict[int, dict[int, float]] = field(default_factory=dict)


class PairCounts:
    """Decayed weights of unordered pairs of items. One writer; readers may run beside it."""

    def __init__(self, half_life_ms: int, neighbours_max: int, pairs_max: int) -> None:
        """Keeps of each item its `neighbours_max` heaviest pairs, and of all items `pairs_max` (counted from both)."""
        self._half_life_ms = half_life_ms
        self._neighbours_max, self._pairs_max = neighbours_max, pairs_max
        self._delta_least = max(_DELTA_LEAST, int(_DELTA_SHARE_OF_MAX * pairs_max))
        self._latest_ms = 0
        self._delta_pairs = 0
        self._state = _State(0)

    @property
    def pair_count(self) -> int:
        """Pairs held, counted from both of their items."""
        return len(self._state.others) + self._delta_pairs

    def add(self, item: str, time_ms: int, others: Sequence[tuple[str, int, float]]) -> None:
        """Adds the pairs that an event on `item` makes: with whom, when that was (ms), and the weight.

        A pair counts from the later of its two times.
        """
        if not others:
            return
        latest_ms = max(time_ms, max(other[1] for other in others))
        landmark, growth = decay.landmark_weight(time_ms, self._half_life_ms)
        self._latest_ms = max(self._latest_ms, latest_ms)
        if landmark - self._state.landmark > _LANDMARK_AHEAD:
            self._merge(landmark)
        state = self._state
        # Of pairs whose other event is the earlier one: all of them, unless this one came late.
        scale = math.ldexp(growth, max(landmark - state.landmark, _UNDERFLOW))
        numbers, totals, delta = state.numbers, state.totals, state.delta
        one = _number(state, item)
        row = delta.setdefault(one, {})
        fresh, sum_one = -len(row), 0.0
        for other, other_ms, weight in others:
            gain = weight * (scale if other_ms <= time_ms else self._scale(other_ms, state.landmark))
            two = numbers.get(other)
            if two is None:
                two = _number(state, other)
            sum_one += gain
            totals[two] += gain
            row[two] = row.get(two, 0.0) + gain
            other_row = delta.get(two)
            if other_row is None:
                other_row = delta[two] = {}
            fresh -= len(other_row)
            other_row[one] = other_row.get(one, 0.0) + gain
            fresh += len(other_row)
        totals[one] += sum_one
        self._delta_pairs += fresh + len(row)
        if self._delta_pairs > max(self._delta_least, int(_DELTA_SHARE * len(state.others))):
            self._merge(max(landmark, state.landmark))

    def _scale(self, time_ms: int, landmark: int) -> float:
        own, growth = decay.landmark_weight(time_ms, self._half_life_ms)
        return math.ldexp(growth, min(max(own - landmark, _UNDERFLOW), -_UNDERFLOW))

    def similar(self, items: Sequence[str], now_ms: int) -> tuple[list[str], Doubles]:
        """Items that go with any of `items`, in no order, each once, and how well they do.

        The similarity to one item is its cosine with shrinkage, c_ij / sqrt((c_i + p) (c_j + p)), weights as of
        `now_ms`; several of them make 1 - prod(1 - s): within 0..1, and more for an item that goes with several.
        """
        state = self._state
        # To weights as of now; an exponent that no sane clock gives is cut.
        scale = 2.0 ** min(max(state.landmark - now_ms / self._half_life_ms, _UNDERFLOW), 100.0)
        found = [(state.totals[at], *_pairs_of(state, at)) for at in map(state.numbers.get, items) if at is not None]
        if not found:
            return [], np.zeros(0)
        others = np.concatenate([part[1] for part in found])
        own_totals = np.repeat([part[0] for part in found], [len(part[1]) for part in found])
        totals = np.fromiter(map(state.totals.__getitem__, others.tolist()), np.float64, len(others))
        norms = np.sqrt((own_totals * scale + PRIOR_WEIGHT) * (totals * scale + PRIOR_WEIGHT))
        similarity = np.minimum(np.concatenate([part[2] for part in found]) * scale / norms, 1 - 1e-9)
        distinct, inverse = np.unique(others, return_inverse=True)
        unlike = np.bincount(inverse, np.log1p(-similarity), len(distinct))
        return list(map(state.names.__getitem__, distinct.tolist())), -np.expm1(unlike)

    def arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Everything as arrays and plain facts, the delta merged; `of_arrays` takes them back."""
        self._merge(self._state.landmark)
        state = self._state
        arrays: dict[str, npt.NDArray[Any]] = {
            "starts": state.starts,
            "others": state.others.astype(np.int32),
            "sums": state.sums,
            "totals": np.array(state.totals, np.float64),
        }
        return arrays, {"landmark": state.landmark, "latest_ms": self._latest_ms, "item_ids": state.names}

    def load(self, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Takes what `arrays` gave. Raises ValueError or KeyError where that cannot be."""
        names = [str(name) for name in facts["item_ids"]]
        starts, others = arrays["starts"].astype(np.int64), arrays["others"].astype(np.int64)
        sums, totals = arrays["sums"].astype(np.float64), arrays["totals"].astype(np.float64)
        fits = (
            starts.shape == (len(names) + 1,)
            and starts[0] == 0
            and starts[-1] == len(others)
            and bool((np.diff(starts) >= 0).all())
            and others.shape == sums.shape
            and totals.shape == (len(names),)
            and bool(((others >= 0) & (others < max(1, len(names)))).all())
            and bool(
                np.isfinite(sums).all() and np.isfinite(totals).all() and (sums >= 0).all() and (totals >= 0).all()
            )
            and len(set(names)) == len(names)
            # Sorted, each pair once.
            and bool((np.diff(np.repeat(np.arange(len(names)), np.diff(starts)) * len(names) + others) > 0).all())
        )
        if not fits:
            raise ValueError("the arrays are not those of pairs of these items")
        self._state = _State(
            int(facts["landmark"]),
            names,
            {name: number for number, name in enumerate(names)},
            totals.tolist(),
            starts,
            others,
            sums,
        )
        self._latest_ms, self._delta_pairs = int(facts["latest_ms"]), 0

    def _merge(self, landmark: int) -> None:
        """Delta into main at a landmark; then what is too light, or too much, goes."""
        state = self._state
        items, others, sums = _all_pairs(state)
        shift = max(state.landmark - landmark, _UNDERFLOW)
        sums = np.ldexp(sums, shift)
        least = _LEAST_WEIGHT * 2.0 ** min(self._latest_ms / self._half_life_ms - landmark, 100.0)
        kept = _heaviest(items, sums, least, self._neighbours_max, self._pairs_max)
        items, others, sums = items[kept], others[kept], sums[kept]
        is_used = np.zeros(len(state.names), np.bool_)
        is_used[items] = is_used[others] = True
        used = np.flatnonzero(is_used)
        renumbered = np.cumsum(is_used) - 1
        starts = np.zeros(len(used) + 1, np.int64)
        np.cumsum(np.bincount(renumbered[items], minlength=len(used)), out=starts[1:])
        names = [state.names[number] for number in used.tolist()]
        self._state = _State(
            landmark,
            names,
            {name: number for number, name in enumerate(names)},
            np.ldexp(np.array(state.totals, np.float64)[used], shift).tolist(),
            starts,
            renumbered[others],
            sums,
        )
        self._delta_pairs = 0


def _number(state: _State, name: str) -> int:
    number = state.numbers.get(name)
    if number is None:
        number = len(state.names)
        state.names.append(name)
        state.totals.append(0.0)
        # Last: whoever finds the number finds its name and total.
        state.numbers[name] = number
    return number


def _pairs_of(state: _State, number: int) -> tuple[Ints, Doubles]:
    """The other items of an item's pairs, and their weights; one that is in both parts comes once."""
    part = slice(*state.starts[number : number + 2].tolist()) if number + 1 < len(state.starts) else slice(0)
    others, sums = state.others[part], state.sums[part]
    row = state.delta.get(number)
    if row is None:
        return others, sums
    # A copy in one step of the interpreter: the writer may be adding.
    fresh = row.copy()
    new_others = np.fromiter(fresh, np.int64, len(fresh))
    new_sums = np.fromiter(fresh.values(), np.float64, len(fresh))
    if not len(others):
        return new_others, new_sums
    # The main part's others are sorted.
    at = np.minimum(np.searchsorted(others, new_others), len(others) - 1)
    in_main = others[at] == new_others
    sums = sums.copy()
    sums[at[in_main]] += new_sums[in_main]
    return np.concatenate([others, new_others[~in_main]]), np.concatenate([sums, new_sums[~in_main]])


def _all_pairs(state: _State) -> tuple[Ints, Ints, Doubles]:
    """Every pair once, sorted by item and other item: items, other items, weights."""
    counts = [len(row) for row in state.delta.values()]
    fresh = sum(counts)
    delta_items = np.repeat(np.fromiter(state.delta, np.int64, len(counts)), counts)
    delta_others = np.fromiter(chain.from_iterable(state.delta.values()), np.int64, fresh)
    delta_sums = np.fromiter(chain.from_iterable(row.values() for row in state.delta.values()), np.float64, fresh)
    width = len(state.names)
    delta_keys = delta_items * width + delta_others
    order = np.argsort(delta_keys)
    main_keys = np.repeat(np.arange(len(state.starts) - 1), np.diff(state.starts)) * width + state.others
    keys = np.concatenate([main_keys, delta_keys[order]])
    sums = np.concatenate([state.sums, delta_sums[order]])
    # Two sorted runs, which the stable sort merges.
    order = np.argsort(keys, kind="stable")
    keys, sums = keys[order], sums[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    if not len(first):
        return keys, keys, sums
    items, others = np.divmod(keys[first], width)
    return items, others, np.add.reduceat(sums, first)


def _heaviest(items: Ints, sums: Doubles, least: float, neighbours_max: int, pairs_max: int) -> npt.NDArray[np.bool_]:
    """Which pairs to keep. Of equal ones the first."""
    kept: npt.NDArray[np.bool_] = sums >= least
    counts = np.bincount(items[kept])
    crowded = np.flatnonzero(kept)
    crowded = crowded[counts[items[crowded]] > neighbours_max]
    if len(crowded):
        order = crowded[np.lexsort((-sums[crowded], items[crowded]))]
        begins = np.flatnonzero(np.diff(items[order], prepend=-1))
        place = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
        kept[order[place >= neighbours_max]] = False
    if (over := int(np.count_nonzero(kept)) - pairs_max) > 0:
        at = np.flatnonzero(kept)
        limit = np.partition(sums[at], over)[over]
        lighter = at[sums[at] < limit]
        kept[lighter] = False
        # What is left over has just that weight.
        kept[at[sums[at] == limit][::-1][: over - len(lighter)]] = False
    return kept
