"""Whether live inputs and scores still look like training's: population stability, missing and stale features.

Fed by ranker/release.py with each batch, compared with the bundle's probe. Source of the index: PSI = sum over bins of
(live - expected) * ln(live / expected); by custom, below 0.1 is stable and above 0.25 needs a look. Invariant: looks
at a bounded sample of each batch, and never changes a score.
"""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.settings import FeaturesSettings
from features.catalog import Floats
from features.vectors import CANDIDATE_FEATURES, USER_FEATURES, RankerInput
from features.windows import UserState
from ranker import metrics

BINS = 10
# Rows looked at of one user's candidates, and rows after which the index is told and counting begins anew.
_SAMPLE, _WINDOW_ROWS = 16, 4000
_LEAST_SHARE = 1e-4
SCORE = "score"
NAMES = (*CANDIDATE_FEATURES, *(f"user_{name}" for name in USER_FEATURES), SCORE)


class Reference:
    """How each of NAMES is spread in training's sample."""

    def __init__(self, rows: Floats) -> None:
        """`rows`: [n, len(NAMES)], n > 0."""
        shares = np.arange(1, BINS) / BINS
        # [names, bins - 1]; a feature of few values has equal edges, and bins that stay empty.
        self.edges: Floats = np.quantile(rows, shares, axis=0).T.astype(np.float32)
        self.expected = shares_of(self.count(rows))

    def count(self, rows: Floats) -> npt.NDArray[np.int64]:
        """Rows in each bin of each name, [names, BINS]."""
        bins = (rows[:, :, None] > self.edges[None]).sum(axis=2)
        flat = bins + np.arange(len(self.edges)) * BINS
        counts: npt.NDArray[np.int64] = np.bincount(flat.ravel(), minlength=len(self.edges) * BINS)
        return counts.reshape(-1, BINS)


def rows_of(one: RankerInput, scores: Floats, sample: int | None = None) -> Floats:
    """Values of NAMES for one user's candidates, evenly thinned to `sample`; [n, len(NAMES)]."""
    step = 1 if sample is None else max(1, -(-len(scores) // sample))
    candidates = one.candidates[::step]
    users = np.broadcast_to(one.user, (len(candidates), len(one.user)))
    rows: Floats = np.concatenate([candidates, users, scores[::step, None]], axis=1).astype(np.float32, copy=False)
    np.nan_to_num(rows, copy=False, posinf=0.0, neginf=0.0)
    return rows


def shares_of(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    bounded: npt.NDArray[np.float64] = np.maximum(shares, _LEAST_SHARE)
    return bounded


def stability(expected: npt.NDArray[np.float64], live: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The index of each name; 0 = the same. Both [names, BINS]."""
    index: npt.NDArray[np.float64] = ((live - expected) * np.log(live / expected)).sum(axis=1)
    return index


class Health:
    """Counts of one release's live rows; several threads may add."""

    def __init__(self, reference: Reference | None, settings: FeaturesSettings) -> None:
        self._reference, self._settings = reference, settings
        self._lock = threading.Lock()
        self._counts = np.zeros((len(NAMES), BINS), np.int64)

    def see(
        self,
        states: Sequence[UserState],
        vectors: Sequence[Floats | None],
        times_ms: Sequence[int],
        inputs: Sequence[RankerInput],
        scores: Sequence[Floats],
    ) -> None:
        """Takes note of a batch of users and their scores."""
        for state, vector, now_ms in zip(states, vectors, times_ms, strict=True):
            metrics.features.labels("user_state", self._status(state, now_ms)).inc()
            metrics.features.labels("user_vector", "missing" if vector is None else "present").inc()
        if self._reference is None:
            return
        rows = [rows_of(one, made, _SAMPLE) for one, made in zip(inputs, scores, strict=True) if len(made)]
        if not rows:
            return
        counts = self._reference.count(np.concatenate(rows))
        with self._lock:
            self._counts += counts
            if self._counts[0].sum() < _WINDOW_ROWS:
                return
            whole, self._counts = self._counts, np.zeros_like(self._counts)
        for name, index in zip(NAMES, stability(self._reference.expected, shares_of(whole)), strict=True):
            metrics.stability.labels(name).set(float(index))

    def _status(self, state: UserState, now_ms: int) -> str:
        if not state.history:
            return "missing"
        is_stale = now_ms - state.watermark_ms > self._settings.stale_after_seconds * 1000
        return "stale" if is_stale else "present"
