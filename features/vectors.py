"""From a user's state and the catalogue to the arrays that the ranker reads: one function for training and request.

Called by the ranker for each request and by training for each replayed row. Invariant: the result depends only on
the arguments; a change of meaning, order or number of features changes `SIGNATURE`, and a model trained under another
signature refuses to load.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

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
    "mean_log_price_of_list",
    "score_of_last",
    "log2_place_of_last",
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
    "log_price_in_list",
    "log_price_place",
    "log_price_from_last",
    "log_price_from_recent",
    "affinity_short",
    "affinity_long",
    "log_times_in_history",
    "recency_in_history",
    "touch_freshness",
    "in_session",
    "shared_categories_with_last",
    "log_years_from_last",
    "log_years_from_recent",
    "retrieval_score",
    "log_place",
    "score_from_last",
    "log_places_from_last",
    *(f"from_{source}" for source in SOURCES),
)
_AT = {name: index for index, name in enumerate(CANDIDATE_FEATURES)}
# Columns of which an item that the catalogue does not know has none, and those of the sources, the last.
_OF_ITEMS, _SOURCES_AT = _AT["retrieval_score"], _AT[f"from_{SOURCES[0]}"]
# Items of the history whose years and prices say what the user likes now.
_RECENT = 10
# Of what was touched just now; it falls with log(1 + seconds) to nothing, which never touched has, in 90 days.
_FRESHEST = math.log1p(90 * 86_400)
# Prior of the click-through rate: as if each item had been shown this often at this rate.
_PRIOR_IMPRESSIONS, _PRIOR_CTR = 20.0, 0.05
_DAY_MS = 86_400_000
_SECONDS_AN_HOUR = 3600

SIGNATURE = hashlib.blake2b(repr((2, SOURCES, USER_FEATURES, CANDIDATE_FEATURES)).encode(), digest_size=8).hexdigest()


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


class ListContext(NamedTuple):
    """What is read of a list as a whole; it is part of the user's features."""

    # Over the items that have a price; 0 where none has.
    mean_log_price: np.float32
    # The retrieval score of the item in the list that the user touched last, and log2(2 + its place); 0 where none is.
    score_of_last: np.float32
    log2_place_of_last: np.float32

    @property
    def place_of_last(self) -> int | None:
        return round(2.0**self.log2_place_of_last) - 2 if self.log2_place_of_last > 0 else None


class WholeList(NamedTuple):
    """The list that candidates are a part of: catalogue rows and retrieval scores, [N] each."""

    rows: Rows
    scores: Floats


class Listed(NamedTuple):
    """What a list as a whole says of some of its candidates: enough to make their features again."""

    context: ListContext
    # How many of the list have a higher retrieval score, and how many have a lower price. [C], [C]
    places: Rows
    price_places: Rows

    @classmethod
    def of_features(cls, user: Floats, candidates: Floats) -> "Listed":
        """From the features [len(USER_FEATURES)], [C, len(CANDIDATE_FEATURES)] that were made before."""
        context = ListContext(*user[USER_FEATURES.index("mean_log_price_of_list") :])
        logs = candidates[:, [_AT["log_place"], _AT["log_price_place"]]].astype(np.float64)
        places, price_places = np.rint(np.expm1(logs)).astype(np.int32).T
        return cls(context, places, price_places)


class _History(NamedTuple):
    """The user's events on items, newest last, padded in front. [L] each."""

    rows: Rows
    weights: Floats
    # How long ago.
    seconds: npt.NDArray[np.float64]
    # Which entries are of items that the catalogue knows.
    known: npt.NDArray[np.bool_]

    @property
    def touched(self) -> Rows:
        """Rows [T] of the known items, newest last."""
        return self.rows[self.known]


def ranker_input(
    state: UserState,
    catalog: Catalog,
    candidate_rows: Rows,
    retrieval_scores: Floats,
    source_bits: Rows,
    now_ms: int,
    settings: FeaturesSettings,
    part_of: WholeList | Listed | None = None,
    log_prices: Floats | None = None,
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
        part_of: the list that the candidates are a part of, or what is known of it; None: they are the whole list.
        log_prices: log(1 + price) that the candidates were offered at, where it was not the catalogue's. [C]
    """
    history = _history(state, catalog, now_ms, settings)
    current = windows.session(state, now_ms, settings.session_gap_seconds)
    session_rows = catalog.rows(entry.item_id for entry in current)
    if log_prices is None:
        log_prices = _log_prices(catalog, candidate_rows)
    if isinstance(part_of, Listed):
        listed = part_of
    else:
        whole = part_of or WholeList(candidate_rows, retrieval_scores)
        of_whole = _log_prices(catalog, whole.rows) if part_of else log_prices
        listed = _listed(whole, of_whole, retrieval_scores, log_prices, history.touched)
    return RankerInput(
        history.rows,
        history.weights,
        np.log1p(history.seconds / _SECONDS_AN_HOUR).astype(np.float32),
        _user(state, len(current), history.weights, now_ms, listed.context),
        candidate_rows,
        _candidates(
            state,
            catalog,
            candidate_rows,
            retrieval_scores,
            source_bits,
            log_prices,
            history,
            session_rows,
            listed,
            now_ms,
            settings,
        ),
    )


def _history(state: UserState, catalog: Catalog, now_ms: int, settings: FeaturesSettings) -> _History:
    length = settings.history_length
    rows = np.full(length, -1, np.int32)
    weights = np.zeros(length, np.float32)
    seconds = np.zeros(length, np.float64)
    count = len(state.history)
    if count:
        rows[-count:] = catalog.rows(entry.item_id for entry in state.history)
        weights[-count:] = [engagement_weight(e.kind, e.value, 1.0, settings) for e in state.history]
        elapsed_ms = np.array([now_ms - entry.time_ms for entry in state.history], np.float64)
        seconds[-count:] = np.maximum(elapsed_ms, 0) / 1000
    return _History(rows, weights, seconds, rows >= 0)


def _log_prices(catalog: Catalog, rows: Rows) -> Floats:
    """[C], 0 = not known."""
    if not len(catalog):
        return np.zeros(len(rows), np.float32)
    prices: Floats = np.where(rows >= 0, catalog.column("log_price")[rows], np.float32(0))
    return prices


def _listed(whole: WholeList, of_whole: Floats, scores: Floats, log_prices: Floats, touched: Rows) -> Listed:
    """What the whole list (with its prices) says of those of its candidates that have these scores and prices."""
    in_order = np.sort(whole.scores)

    def places(of: Floats) -> Rows:
        higher: Rows = (len(in_order) - np.searchsorted(in_order, of, side="right")).astype(np.int32)
        return higher

    priced = np.sort(of_whole[of_whole > 0])
    mean = np.float32(priced.mean(dtype=np.float64)) if len(priced) else np.float32(0)
    # What has no price has none below it either.
    cheaper = np.searchsorted(priced, log_prices).astype(np.int32)
    there = touched[(touched[:, None] == whole.rows).any(axis=1)]
    if not len(there):
        return Listed(ListContext(mean, np.float32(0), np.float32(0)), places(scores), cheaper)
    last = whole.scores[np.flatnonzero(whole.rows == there[-1])[:1]]
    context = ListContext(mean, np.float32(last[0]), np.float32(np.log2(2 + places(last)[0])))
    return Listed(context, places(scores), cheaper)


def _user(state: UserState, session_events: int, weights: Floats, now_ms: int, context: ListContext) -> Floats:
    known = bool(state.history)
    seconds = max(0, now_ms - state.watermark_ms) / 1000 if known else 0.0
    return np.array(
        [
            math.log1p(state.revision),
            math.log1p(len({entry.item_id for entry in state.history})),
            math.log1p(session_events),
            math.log1p(seconds / _SECONDS_AN_HOUR),
            float(weights.sum()) / max(1, len(state.history)),
            float(known),
            *context,
        ],
        np.float32,
    )


def _candidates(
    state: UserState,
    catalog: Catalog,
    rows: Rows,
    retrieval_scores: Floats,
    source_bits: Rows,
    log_prices: Floats,
    history: _History,
    session_rows: Rows,
    listed: Listed,
    now_ms: int,
    settings: FeaturesSettings,
) -> Floats:
    out = np.zeros((len(rows), len(CANDIDATE_FEATURES)), np.float32)
    context, places, price_places = listed

    def put(name: str, values: npt.NDArray[Any]) -> None:
        out[:, _AT[name]] = values

    known = rows >= 0
    at = np.where(known, rows, 0)
    if len(catalog) and len(rows):
        impressions, clicks = catalog.column("impressions")[at], catalog.column("clicks")[at]
        short, long = np.log1p(popularity_at(catalog, at, now_ms, settings)[:, [0, -1]]).T
        put("log_impressions", np.log1p(impressions))
        put("log_clicks", np.log1p(clicks))
        shown = np.maximum(impressions, clicks)
        put("smoothed_ctr", (clicks + _PRIOR_IMPRESSIONS * _PRIOR_CTR) / (shown + _PRIOR_IMPRESSIONS))
        put("log_popularity_short", short)
        put("log_popularity_long", long)
        put("trend", short - long)
        publish_ms, years = catalog.column("publish_ms")[at], catalog.column("year")[at]
        age_days = np.maximum(now_ms - publish_ms, 0) / _DAY_MS
        put("log_age_days", np.where(publish_ms > 0, np.log1p(age_days), 0.0))
        put("year", years)
        put("log_price", log_prices)
        buckets = catalog.column("buckets")[at]
        put("affinity_short", affinity_of(state, buckets, 0, now_ms, settings))
        put("affinity_long", affinity_of(state, buckets, -1, now_ms, settings))
        put("log_price_in_list", _where_priced(log_prices, context.mean_log_price))
        put("log_price_place", np.log1p(price_places))
        touched = history.touched
        if len(touched):
            _put_touched(put, at, history, session_rows)
            own = catalog.column("buckets")[touched[-1]]
            own = own[own >= 0]
            is_shared = (buckets[:, :, None] == own).any(axis=2)
            put("shared_categories_with_last", _over_categories(is_shared.astype(np.int32)) / max(1, len(own)))
            from_last, from_recent = _years_apart(years, catalog.column("year")[touched])
            put("log_years_from_last", from_last)
            put("log_years_from_recent", from_recent)
            of_history = catalog.column("log_price")[touched[-_RECENT:]]
            priced = of_history[of_history > 0]
            if len(priced):
                put("log_price_from_last", _where_priced(log_prices, of_history[-1]))
                put("log_price_from_recent", _where_priced(log_prices, priced.mean()))
        out[~known, :_OF_ITEMS] = 0.0
    put("retrieval_score", retrieval_scores)
    put("log_place", np.log1p(places))
    if (place_of_last := context.place_of_last) is not None:
        put("score_from_last", retrieval_scores - context.score_of_last)
        apart = places - place_of_last
        put("log_places_from_last", np.sign(apart) * np.log1p(np.abs(apart)))
    out[:, _SOURCES_AT:] = (source_bits[:, None] >> np.arange(len(SOURCES), dtype=np.int32)) & 1
    return out


def _put_touched(put: Callable[[str, Floats], None], at: Rows, history: _History, session_rows: Rows) -> None:
    """What of the history was of the candidate itself; people come back to what they have just looked at."""
    # Distinct items in the order of their rows: their newest event (0 = the last of all), and how many they have.
    items, newest, times = np.unique(history.touched[::-1], return_index=True, return_counts=True)
    # 1 for the last item, 1/2 for the one before it, ...
    recency = np.empty(len(items))
    recency[np.argsort(newest)] = 1.0 / np.arange(1, len(items) + 1)
    seconds = history.seconds[history.known][::-1][newest]
    freshness = np.maximum(_FRESHEST - np.log1p(seconds), 0.0)
    place = np.minimum(np.searchsorted(items, at), len(items) - 1)
    ever = items[place] == at
    for name, of_items in (
        ("log_times_in_history", np.log1p(times)),
        ("recency_in_history", recency),
        ("touch_freshness", freshness),
        ("in_session", (items[:, None] == session_rows).any(axis=1)),
    ):
        put(name, np.where(ever, of_items[place], 0))


def _where_priced(log_prices: Floats, reference: np.float32) -> Floats:
    """How much dearer than the reference, [C]; 0 where either has no price."""
    if not reference > 0:
        return np.zeros(len(log_prices), np.float32)
    apart: Floats = np.where(log_prices > 0, log_prices - reference, np.float32(0))
    return apart


def _years_apart(years: Floats, of_history: Floats) -> Floats:
    """From the last item and from the mean of the last ten, [2, C]; as log(1 + years)."""
    recent = of_history[-_RECENT:]
    # The catalogue counts in steps of twenty years.
    apart: Floats = np.log1p(20 * np.abs(years - np.array([[recent[-1]], [recent.mean()]], np.float32)))
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
    total = _over_categories(by_bucket[buckets])  # bucket -1 is the appended zero
    mean: Floats = (total / np.maximum(1, _over_categories((buckets >= 0).astype(np.int32)))).astype(np.float32)
    return mean


def _over_categories(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sums of rows [C, 4] as three additions: NumPy takes ten times as long along so short an axis."""
    total: npt.NDArray[Any] = reduce(np.add, values.T)
    return total
