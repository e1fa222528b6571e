"""Re-rank: the ranker's scores, batch scores and fresh signals become one order.

Fifth stage; the arithmetic is in `serving.rerank`. Invariant: every item's contributions add up to its score, equal
inputs give equal orders whatever the order they came in, and pins hold.
"""

from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from core.settings import FeaturesSettings, ServingSettings
from features.catalog import Catalog, Floats, Rows, category_number
from features.transforms import stable_hash
from features.vectors import affinity_of, popularity_at
from features.windows import UserState
from headrace.v1 import types_pb2 as types
from serving.query import SOURCE_BIT, Candidates, Query, Ranking, RankInputs, Signals, UserFeatures, places_of
from serving.release import Release
from serving.rerank.blend import blend
from serving.rerank.diversity import category_vectors, diversify, diversify_by_dpp, item_vectors
from serving.rerank.exploration import explore
from serving.rerank.quotas import hold_quotas
from serving.rerank.rules import MembersOf, place_pins
from serving.shown import Shown

_DAY_MS = 86_400_000


class ReRanker(Protocol):
    """Puts candidates into their final order."""

    # Changes with the settings that the order depends on.
    settings_digest: int

    def rerank(self, query: Query, user: UserFeatures, candidates: Candidates) -> Ranking: ...


class BlendingReRanker:
    """Blend, rules, fatigue, diversity, quotas and pins, exploration, in this order."""

    def __init__(self, settings: ServingSettings, features: FeaturesSettings, shown: Shown | None = None) -> None:
        self._settings = settings
        self._features = features
        self._shown = shown
        # Changes with everything in the settings that the order depends on.
        self.settings_digest = stable_hash(repr((settings, features)))

    def rerank(self, query: Query, user: UserFeatures, candidates: Candidates) -> Ranking:
        # From here on the earlier index wins a tie.
        hashes = query.release.catalog.column("id_hash")[candidates.rows]
        candidates = candidates.take(np.argsort(hashes, kind="stable"))
        trending = trending_lift(query.release.catalog, candidates.rows, query.now_ms, self._features)
        signals = Signals(trending, self._fatigue(query, user, candidates.rows))
        return self.order(query, user, RankInputs(candidates, signals))

    def order(self, query: Query, user: UserFeatures, inputs: RankInputs) -> Ranking:
        """The order of candidates in a fixed order; the same inputs, release and settings give the same one."""
        release, (candidates, signals) = query.release, inputs
        blended = blend(self._parts(query, user, inputs), release.weights_for(user.segment))
        parts, contributions, relevance = list(blended.parts), blended.contributions, blended.scores
        members_of = members_among(release.catalog, candidates.rows)
        ids = partial(release.ids, candidates.rows)
        for name, shift in (
            ("rules", release.rules.shifts(query.surface, user.segment, ids, members_of)),
            ("fatigue", self._fatigue_shift(signals)),
        ):
            if shift is not None:
                parts.append(name)
                contributions, relevance = np.vstack((contributions, shift)), relevance + shift

        vectors = _vectors(release, candidates.rows)
        place = diversify if self._settings.diversity_method == "mmr" else diversify_by_dpp
        order, penalties, scale = place(relevance, vectors, query.on.diversity, query.num_items)
        parts.append("diversity")
        contributions = np.vstack((scale * contributions, -penalties))

        order, pinned = self._pin(query, user, candidates, order, members_of)
        explored = explore(order, query.num_items, _new(candidates), self._rate(query), pinned, _draw(query))
        order = explored.order
        contributions = contributions[:, order]
        return Ranking(
            candidates.take(order),
            contributions.sum(axis=0),
            types.SERVING_TIER_RERANKED_BATCH if candidates.ranked is None else types.SERVING_TIER_RANKED,
            explored.propensities,
            tuple(parts),
            contributions,
            frozenset(int(candidates.rows[order[place]]) for place in pinned),
            inputs,
        )

    def _parts(self, query: Query, user: UserFeatures, inputs: RankInputs) -> dict[str, npt.NDArray[np.floating]]:
        """The raw score parts, by the names of the blend weights."""
        candidates = inputs.candidates
        parts: dict[str, npt.NDArray[np.floating]] = {}
        if candidates.ranked is not None:
            parts["ranker"] = candidates.ranked
        parts["batch"] = candidates.batch
        parts["retrieval"] = candidates.fused
        catalog, now_ms = query.release.catalog, query.now_ms
        parts["affinity"] = affinity(user.state, catalog, candidates.rows, now_ms, self._features)
        parts["trending"] = inputs.signals.trending
        parts["recency"] = recency(catalog, candidates.rows, now_ms)
        return parts

    def _pin(
        self,
        query: Query,
        user: UserFeatures,
        candidates: Candidates,
        order: npt.NDArray[np.intp],
        members_of: MembersOf,
    ) -> tuple[npt.NDArray[np.intp], frozenset[int]]:
        """The order with the pins in place and the quotas held, and the places that the pins fill."""
        rules = query.release.rules
        pins = rules.pins(query.surface, user.segment)
        if not pins and not rules.quota:
            return order, frozenset()
        # Positions are those of the whole list; a later page has its own part of them.
        catalog, first = query.release.catalog, query.page.offset
        index_of = {row: index for index, row in enumerate(candidates.rows.tolist())}
        wanted = [
            (index_of[row], min(pin.position - first, len(order) - 1))
            for pin in pins
            if pin.position >= first and (row := catalog.row(pin.item_id)) in index_of
        ]
        filled = frozenset(position for _, position in wanted)
        bounds = rules.bounds(query.surface, user.segment, members_of)
        return (hold_quotas(order, bounds, wanted) if bounds else place_pins(order, wanted)), filled

    def _fatigue(self, query: Query, user: UserFeatures, rows: Rows) -> Floats | None:
        if self._shown is None or self._settings.fatigue_weight <= 0:
            return None
        dealt_with = frozenset(entry.item_id for entry in user.state.history)
        tired = self._shown.fatigue(user.user_id, dealt_with, query.now_ms)
        at = places_of(query.release.catalog.rows(tired), rows)
        found = at >= 0
        if not found.any():
            return None
        fatigue = np.zeros(len(rows), np.float32)
        fatigue[at[found]] = np.array(list(tired.values()), np.float32)[found]
        return fatigue

    def _fatigue_shift(self, signals: Signals) -> npt.NDArray[np.float64] | None:
        if signals.fatigue is None:
            return None
        return -self._settings.fatigue_weight * signals.fatigue.astype(np.float64)

    def _rate(self, query: Query) -> float:
        return 0.0 if query.request.disable_exploration else query.on.exploration_rate


def affinity(state: UserState, catalog: Catalog, rows: Rows, now_ms: int, settings: FeaturesSettings) -> Floats:
    """The user's liking of each item's categories, this session's and the long one together. Shape [C]."""
    buckets = catalog.column("buckets")[rows]
    short = affinity_of(state, buckets, 0, now_ms, settings)
    return short + affinity_of(state, buckets, -1, now_ms, settings)


def members_among(catalog: Catalog, rows: Rows) -> MembersOf:
    """Which of these rows are items of a category."""

    def members_of(category: str) -> npt.NDArray[np.bool_]:
        numbers = catalog.column("categories")[rows]
        # Categories past those of the column are looked for in the item.
        has_more = numbers[:, -1] > 0
        members: npt.NDArray[np.bool_] = has_more | (numbers == category_number(category)).any(axis=1)
        for index in np.flatnonzero(members).tolist():
            members[index] = category in catalog.items[rows[index]].categories
        return members

    return members_of


def _vectors(release: Release, rows: Rows) -> Floats:
    """What diversity compares: the items' vectors where the release holds them, else their categories. Shape [C, U]."""
    if release.vectors is not None:
        return item_vectors(release.vectors, rows)
    return category_vectors(release.catalog.column("categories")[rows])


def trending_lift(catalog: Catalog, rows: Rows, now_ms: int, settings: FeaturesSettings) -> Floats:
    """How much more an item is liked now than usually, as a difference of logarithms. Shape [C]."""
    logs = np.log1p(popularity_at(catalog, rows, now_ms, settings))
    lift: Floats = logs[:, 0] - logs[:, -1]
    return lift


def recency(catalog: Catalog, rows: Rows, now_ms: int) -> Floats:
    """Newer is higher; an item without a publish time counts as the oldest. Shape [C]."""
    publish_ms = catalog.column("publish_ms")[rows]
    age_days = np.maximum(now_ms - publish_ms, 0) / _DAY_MS
    fresh: Floats = np.where(publish_ms > 0, 1 / (1 + age_days), 0.0).astype(np.float32)
    return fresh


def _new(candidates: Candidates) -> npt.NDArray[np.intp]:
    return np.flatnonzero(candidates.source_bits & SOURCE_BIT["new"])


def _draw(query: Query) -> float:
    """Uniform in 0..1, and the same again when this answer is rebuilt."""
    return stable_hash(query.recommendation_id) / 2.0**64
