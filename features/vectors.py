"""From a user's state and the catalogue to the arrays that the ranker reads: one function for training and request.

Called by the ranker for each request and by training for each replayed row. Invariant: the result depends only on
the arguments; a change of meaning, order or number of features changes `SIGNATURE`, and a model trained under another
signature refuses to load.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from core.settings import FeaturesSettings
from features import decay, windows
from features.catalog import Catalog, Floats, Rows
from features.transforms import engagement_weight
from features.windows import UserState

# Candidate sources; a candidate's `source_bits` has bit i set when SOURCES[i] proposed it.
SOURCES = ("ann", "item_to_item", "co_visitation", "trending", "new", "batch")

USER_FEATURES = (
    "log_events",
    "log_distinct_items",
    "log_session_events",
    "log_hours_since_last",
    "mean_engagement",
    "is_known",
)
CANDIDATE_FEATURES = (
    "log_impressions",
    "log_clicks",
    "smoothed_ctr",
    "log_popularity_short",
    "log_popularity_long",
    "trend",
    "log_age_days",
    "year",
    "log_price",
    "affinity_short",
    "affinity_long",
    "log_times_in_history",
    "recency_in_history",
    "in_session",
    "shared_categories_with_last",
    "log_years_from_last",
    "log_years_from_recent",
    "retrieval_score",
    *(f"from_{source}" for source in SOURCES),
)
# Items of the history whose years say from which time the user likes things.
_RECENT_YEARS = 10
# Prior of the click-through rate: as if each item had been shown this often at this rate.
_PRIOR_IMPRESSIONS, _PRIOR_CTR = 20.0, 0.05
_DAY_MS = 86_400_000
_HOUR_MS = 3_600_000

SIGNATURE = hashlib.blake2b(repr((1, SOURCES, USER_FEATURES, CANDIDATE_FEATURES)).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class RankerInput:
    """Model input of one user with C candidates and a history of at most L, newest last, padded in front."""

    # Catalogue rows, -1 = padding or unknown. [L]
    history_rows: Rows
    # Engagement weight of each entry, and log(1 + hours) since it. [L], [L]
    history_weights: Floats
    history_ages: Floats
    # [len(USER_FEATURES)]
    user: Floats
    # [C], [C, len(CANDIDATE_FEATURES)]
    candidate_rows: Rows
    candidates: Floats


def ranker_input(
    state: UserState,
    catalog: Catalog,
    candidate_rows: Rows,
    retrieval_scores: Floats,
    source_bits: Rows,
    now_ms: int,
    settings: FeaturesSettings,
) -> RankerInput:
    """Features of one user and C candidates as of `now_ms`.

    Args:
        state: the user's state; an empty one for an unknown user.
        catalog: attributes and statistics of the items.
        candidate_rows: catalogue rows, -1 for items that the catalogue does not know. [C]
        retrieval_scores: [C]
        source_bits: [C]
        now_ms: time of the request.
        settings: the same as the state was made with.
    """
    history_rows, weights, ages = _history(state, catalog, now_ms, settings)
    current = windows.session(state, now_ms, settings.session_gap_seconds)
    session_rows = catalog.rows(entry.item_id for entry in current)
    return RankerInput(
        history_rows,
        weights,
        ages,
        _user(state, len(current), weights, now_ms),
        candidate_rows,
        _candidates(
            state, catalog, candidate_rows, retrieval_scores, source_bits, history_rows, session_rows, now_ms, settings
        ),
    )


def _history(
    state: UserState, catalog: Catalog, now_ms: int, settings: FeaturesSettings
) -> tuple[Rows, Floats, Floats]:
    length = settings.history_length
    rows = np.full(length, -1, np.int32)
    weights = np.zeros(length, np.float32)
    ages = np.zeros(length, np.float32)
    count = len(state.history)
    if count:
        rows[-count:] = catalog.rows(entry.item_id for entry in state.history)
        weights[-count:] = [engagement_weight(e.kind, e.value, 1.0, settings) for e in state.history]
        elapsed_ms = np.array([now_ms - entry.time_ms for entry in state.history], np.float64)
        ages[-count:] = np.log1p(np.maximum(elapsed_ms, 0) / _HOUR_MS)
    return rows, weights, ages


def _user(state: UserState, session_events: int, weights: Floats, now_ms: int) -> Floats:
    known = bool(state.history)
    hours = max(0, now_ms - state.watermark_ms) / _HOUR_MS if known else 0.0
    return np.array(
        [
            math.log1p(state.revision),
            math.log1p(len({entry.item_id for entry in state.history})),
            math.log1p(session_events),
            math.log1p(hours),
            float(weights.sum()) / max(1, len(state.history)),
            float(known),
        ],
        np.float32,
    )


def _candidates(
    state: UserState,
    catalog: Catalog,
    rows: Rows,
    retrieval_scores: Floats,
    source_bits: Rows,
    history_rows: Rows,
    session_rows: Rows,
    now_ms: int,
    settings: FeaturesSettings,
) -> Floats:
    out = np.zeros((len(rows), len(CANDIDATE_FEATURES)), np.float32)
    known = rows >= 0
    at = np.where(known, rows, 0)
    if len(catalog) and len(rows):
        impressions, clicks = catalog.column("impressions")[at], catalog.column("clicks")[at]
        popularity = popularity_at(catalog, at, now_ms, settings)
        out[:, 0] = np.log1p(impressions)
        out[:, 1] = np.log1p(clicks)
        out[:, 2] = (clicks + _PRIOR_IMPRESSIONS * _PRIOR_CTR) / (np.maximum(impressions, clicks) + _PRIOR_IMPRESSIONS)
        out[:, 3] = np.log1p(popularity[:, 0])
        out[:, 4] = np.log1p(popularity[:, -1])
        out[:, 5] = out[:, 3] - out[:, 4]
        publish_ms = catalog.column("publish_ms")[at]
        age_days = np.maximum(now_ms - publish_ms, 0) / _DAY_MS
        out[:, 6] = np.where(publish_ms > 0, np.log1p(age_days), 0.0)
        out[:, 7] = catalog.column("year")[at]
        out[:, 8] = catalog.column("log_price")[at]
        buckets = catalog.column("buckets")[at]
        for index in (0, -1):
            out[:, 9 if index == 0 else 10] = affinity_of(state, buckets, index, now_ms, settings)
        times = history_rows[None, :] == at[:, None]
        out[:, 11] = np.log1p(times.sum(axis=1))
        # 1 for the last item, 1/2 for the one before it, ...: people come back to what they have just looked at.
        out[:, 12] = np.where(times.any(axis=1), 1.0 / (1.0 + times[:, ::-1].argmax(axis=1)), 0.0)
        out[:, 13] = np.isin(at, session_rows)
        last = history_rows[-1]
        if last >= 0:
            own = catalog.column("buckets")[last]
            out[:, 14] = (np.isin(buckets, own[own >= 0])).sum(axis=1) / max(1, int((own >= 0).sum()))
            out[:, 15:17] = _years_apart(out[:, 7], catalog.column("year")[history_rows[history_rows >= 0]])
        out[~known, :17] = 0.0
    out[:, 17] = retrieval_scores
    first = CANDIDATE_FEATURES.index(f"from_{SOURCES[0]}")
    for bit in range(len(SOURCES)):
        out[:, first + bit] = (source_bits >> bit) & 1
    return out


def _years_apart(years: Floats, of_history: Floats) -> Floats:
    """From the last item and from the mean of the last ten, [C, 2]; as log(1 + years)."""
    recent = of_history[-_RECENT_YEARS:]
    # The catalogue counts in steps of twenty years.
    apart: Floats = np.log1p(20 * np.abs(years[:, None] - np.array([[recent[-1], recent.mean()]], np.float32)))
    return apart


def popularity_at(catalog: Catalog, rows: Rows, now_ms: int, settings: FeaturesSettings) -> Floats:
    """Decayed engagement of some items as of `now_ms`, [C, half-lives]. Also the trending signal."""
    half_lives_ms = np.array(settings.half_lives_seconds, np.float64) * 1000
    exponent = catalog.column("log2_popularity")[rows] - now_ms / half_lives_ms
    popularity: Floats = np.exp2(np.clip(exponent, -1000, 100)).astype(np.float32)
    return popularity


def affinity_by_bucket(state: UserState, index: int, now_ms: int, settings: FeaturesSettings) -> Floats:
    """The user's liking of each category bucket as of `now_ms`, scaled so that the magnitudes add up to at most 1.

    Args:
        state: the user's state.
        index: which half-life, of `features.half_lives_seconds`.
        now_ms: the time to decay to.
        settings: as the state was made with.
    """
    out = np.zeros(settings.category_buckets, np.float32)
    if not state.affinity:
        return out
    landmark, sums = state.affinity[index]
    half_life_ms = settings.half_lives_seconds[index] * 1000
    for bucket, total in sums.items():
        out[bucket] = decay.value_at(landmark, total, half_life_ms, now_ms)
    # A liking that has decayed to nothing must not be blown up again: at least one event's worth is the scale.
    out /= max(1.0, float(np.abs(out).sum()))
    return out


def affinity_of(state: UserState, buckets: Rows, index: int, now_ms: int, settings: FeaturesSettings) -> Floats:
    """Mean liking of the categories of each candidate, from their `buckets` [C, 4]; [C]. A signal of the re-ranker."""
    by_bucket = np.append(affinity_by_bucket(state, index, now_ms, settings), np.float32(0))
    total = by_bucket[buckets].sum(axis=1)  # bucket -1 is the appended zero
    mean: Floats = (total / np.maximum(1, (buckets >= 0).sum(axis=1))).astype(np.float32)
    return mean
