"""What the user tower reads of a user's interactions: one rule for training and for the request.

Positive interactions in event-time order, a run on one item counting once (a view, a click and a purchase of one item
in a row are one step), items without a vector stepped over. Invariant: training and serving both come through
`sequences` and `pad`, so the same events give the same model input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core.settings import FeaturesSettings
from features.transforms import engagement_weight
from features.windows import UserState

# Buckets of the time since the interaction before: 0 = there is none, then by powers of two of seconds.
GAP_BUCKETS = 32

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sequences:
    """Steps of several users, flat: those of user u are `starts[u]:starts[u + 1]`, oldest first."""

    starts: Ints  # [users + 1]
    rows: Ints  # [n] the items
    kinds: Ints  # [n] index of the kind, 0 = other
    weights: Floats  # [n] engagement, > 0
    times_ms: Ints  # [n]


@dataclass(frozen=True, slots=True)
class Padded:
    """Model input of B users, at most L steps each, first step first, padded behind."""

    rows: Ints  # [B, L], -1 = padding
    kinds: Ints  # [B, L]
    gaps: Ints  # [B, L]
    weights: Floats  # [B, L]
    lengths: Ints  # [B]


def step_weight(kind: str, value: float, settings: FeaturesSettings) -> float:
    """How much an interaction says "more of this"; 0 or less is no step (skips, low ratings)."""
    return engagement_weight(kind, value, 1.0, settings) if kind in settings.positive_kinds else 0.0


def kind_names(settings: FeaturesSettings) -> tuple[str, ...]:
    """Names behind the kind numbers 1, 2, ...; 0 is any other kind."""
    return tuple(sorted(settings.positive_kinds))


def sequences(users: Ints, user_count: int, rows: Ints, kinds: Ints, weights: Floats, times_ms: Ints) -> Sequences:
    """Steps from interactions that are sorted by user (0..user_count - 1), then by time.

    Rows below 0 are unknown items. All arrays [n].
    """
    keep = np.flatnonzero((rows >= 0) & (weights > 0))
    users, rows = users[keep], rows[keep]
    if not len(keep):
        nothing = np.zeros(0, np.int64)
        return Sequences(np.zeros(user_count + 1, np.int64), nothing, nothing, np.zeros(0, np.float32), nothing)
    begins = np.ones(len(keep), np.bool_)
    begins[1:] = (users[1:] != users[:-1]) | (rows[1:] != rows[:-1])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(keep)) - 1
    return Sequences(
        np.searchsorted(users[first], np.arange(user_count + 1)),
        rows[first],
        kinds[keep][last],
        np.maximum.reduceat(weights[keep], first),
        times_ms[keep][last],
    )


def of_states(
    states: Sequence[UserState], rows_of: Any, kinds: tuple[str, ...], settings: FeaturesSettings
) -> tuple[Ints, Ints, Ints, Floats, Ints]:
    """The histories of some users as the arrays that `sequences` takes.

    Args:
        states: B users.
        rows_of: from item ids to catalogue rows (Catalog.rows).
        kinds: as `kind_names` gave them when the towers were trained.
        settings: as the states were made with.

    Returns:
        users, rows, kinds, weights, times_ms; [n] each.
    """
    number = {kind: index for index, kind in enumerate(kinds, 1)}
    entries = [entry for state in states for entry in state.history]
    return (
        np.repeat(np.arange(len(states)), [len(state.history) for state in states]),
        rows_of(entry.item_id for entry in entries).astype(np.int64),
        np.fromiter((number.get(entry.kind, 0) for entry in entries), np.int64, len(entries)),
        np.fromiter((step_weight(e.kind, e.value, settings) for e in entries), np.float32, len(entries)),
        np.fromiter((entry.time_ms for entry in entries), np.int64, len(entries)),
    )


def pad(steps: Sequences, begin: Ints, end: Ints, length: int) -> Padded:
    """Model input from ranges of steps, of each the newest `length`.

    Args:
        steps: of any users.
        begin: first step of each of the B rows. [B]
        end: the step behind its last one; a range lies within one user. [B]
        length: most steps that the model reads.
    """
    begin = np.maximum(begin, end - length)
    lengths = end - begin
    longest = int(lengths.max(initial=1)) or 1
    offsets = np.arange(longest)
    inside = offsets < lengths[:, None]
    at = np.where(inside, begin[:, None] + offsets, 0)
    if not len(steps.rows):
        zeros = np.zeros(at.shape, np.int64)
        return Padded(zeros - 1, zeros, zeros, zeros.astype(np.float32), lengths)
    times = steps.times_ms[at]
    gaps = np.zeros(at.shape, np.int64)
    gaps[:, 1:] = gap_bucket(times[:, 1:] - times[:, :-1])
    return Padded(
        np.where(inside, steps.rows[at], -1),
        np.where(inside, steps.kinds[at], 0),
        np.where(inside, gaps, 0),
        np.where(inside, steps.weights[at], np.float32(0)),
        lengths,
    )


def gap_bucket(gap_ms: Ints) -> Ints:
    """1 + log2(1 + seconds), whole, at most GAP_BUCKETS - 1."""
    buckets: Ints = 1 + np.log2(1 + np.maximum(gap_ms, 0) / 1000).astype(np.int64)
    return np.minimum(buckets, GAP_BUCKETS - 1)
