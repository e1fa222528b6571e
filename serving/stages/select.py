"""Select: the first places of the order become the answer's items, with sources and reasons in words.

Sixth stage. Invariant: no item twice, never more than asked for, positions 0, 1, 2...
"""

from typing import NamedTuple, Protocol

import numpy as np

from core.settings import FeaturesSettings
from features.catalog import Floats
from features.transforms import category_bucket
from features.vectors import SOURCES, affinity_by_bucket
from headrace.v1 import types_pb2 as types
from headrace.v1.events_pb2 import Item
from headrace.v1.recommender_service_pb2 import Recommendation
from headrace.v1.types_pb2 import Contribution
from serving.query import SOURCE_BIT, Query, Ranking, UserFeatures
from serving.trace import Removed

_BY_SOURCE = (
    ("item_to_item", "similar to what you looked at lately"),
    ("co_visitation", "others who looked at the same went on to this"),
    ("ann", "fits what you did lately"),
    ("batch", "fits your taste"),
    ("trending", "many people like it"),
    ("new", "new here"),
)
_BY_TIER = {
    types.SERVING_TIER_LAST_GOOD: "from your last recommendations",
    types.SERVING_TIER_RULES: "picked by the editors",
    types.SERVING_TIER_POPULAR_SEGMENT: "popular with people like you",
    types.SERVING_TIER_POPULAR: "popular right now",
}
# A liking smaller than this is no reason to name.
_LIKED = 0.05


class Selected(NamedTuple):
    """The answer's items, and those that came too late in the order."""

    items: list[Recommendation]
    removed: tuple[Removed, ...]


class Selector(Protocol):
    """Cuts the order to the answer's length."""

    def select(self, query: Query, user: UserFeatures, ranking: Ranking) -> Selected: ...


class TopSelector:
    """Takes the first ones."""

    def __init__(self, features: FeaturesSettings) -> None:
        self._features = features

    def select(self, query: Query, user: UserFeatures, ranking: Ranking) -> Selected:
        count = min(query.num_items, len(ranking.candidates))
        liking = affinity_by_bucket(user.state, 0, query.now_ms, self._features)
        liking += affinity_by_bucket(user.state, -1, query.now_ms, self._features)
        items = [self._recommendation(query, ranking, place, liking) for place in range(count)]
        rows = ranking.candidates.rows[count:]
        if not len(rows):
            return Selected(items, ())
        ranks = np.arange(count, count + len(rows), dtype=np.int32)
        reason = f"ranked below the first {count}"
        return Selected(items, (Removed(reason, rows, ranks, ranking.scores[count:].astype(np.float32)),))

    def _recommendation(self, query: Query, ranking: Ranking, place: int, liking: Floats) -> Recommendation:
        candidates = ranking.candidates
        row, bits = int(candidates.rows[place]), int(candidates.source_bits[place])
        item = query.release.catalog.items[row]
        recommendation = Recommendation(
            item_id=query.release.catalog.item_ids[row],
            position=query.page.offset + place,
            score=float(ranking.scores[place]),
            propensity=float(ranking.propensities[place]),
            sources=[source for index, source in enumerate(SOURCES) if bits >> index & 1],
            reasons=self._reasons(ranking, row, bits, item, liking),
            title=item.title,
        )
        if query.request.explain and ranking.contributions is not None:
            values = ranking.contributions[:, place].tolist()
            recommendation.contributions.extend(
                Contribution(name=name, value=value) for name, value in zip(ranking.parts, values, strict=True)
            )
        return recommendation

    def _reasons(self, ranking: Ranking, row: int, bits: int, item: Item, liking: Floats) -> list[str]:
        if ranking.tier in _BY_TIER:
            return [_BY_TIER[ranking.tier]]
        reasons = ["picked by the editors"] if row in ranking.pinned else []
        buckets = self._features.category_buckets
        liked = max(item.categories, key=lambda name: liking[category_bucket(name, buckets)], default="")
        if liked and liking[category_bucket(liked, buckets)] > _LIKED:
            reasons.append(f"you like {liked}")
        reasons += [words for source, words in _BY_SOURCE if bits & SOURCE_BIT[source]]
        return reasons or ["a good match"]
