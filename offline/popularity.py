"""Popularity lists as of one time: for everybody, and per segment.

Part of the release bundle (serving's last rungs) and of the online store before the stream takes over. Invariant:
only items that may be recommended are listed; `all` is never empty while there is one such item.
"""

import math
from typing import TypedDict

from core.settings import Settings
from features import decay
from features.catalog import Catalog
from offline.replay import Replay

Ranked = list[tuple[str, float]]
# item_id -> landmark and forward-decayed sum.
Sums = dict[str, tuple[int, float]]


class PopularityLists(TypedDict):
    """Lists of (item_id, decayed engagement), best first."""

    all: Ranked
    segments: dict[str, Ranked]


def popularity_lists(replay: Replay, now_ms: int, settings: Settings) -> PopularityLists:
    """The lists as of `now_ms`, by the longest half-life."""
    catalog = replay.catalog
    limit, half_life_ms = settings.offline.popularity_items, settings.features.half_lives_seconds[-1] * 1000
    liked = {item_id: partial.popularity[-1] for item_id, partial in replay.partials.items() if partial.popularity}
    by_segment: dict[str, Sums] = {}
    for item_id, partial in replay.partials.items():
        for segment, summed in partial.segments.items():
            by_segment.setdefault(segment, {})[item_id] = summed
    return {
        "all": _ranked(liked, catalog, now_ms, half_life_ms, limit) or _first_items(catalog, now_ms, limit),
        "segments": {
            segment: _ranked(sums, catalog, now_ms, half_life_ms, limit) for segment, sums in sorted(by_segment.items())
        },
    }


def _ranked(sums: Sums, catalog: Catalog, now_ms: int, half_life_ms: int, limit: int) -> Ranked:
    servable = catalog.servable(now_ms)
    liked: list[tuple[float, str]] = []
    for item_id, (landmark, total) in sums.items():
        row = catalog.row(item_id)
        if total > 0 and row >= 0 and servable[row]:
            # By the logarithm: what has decayed below the smallest number still has its order.
            liked.append((-(math.log2(total) + landmark), item_id))
    return [(item_id, decay.value_at(*sums[item_id], half_life_ms, now_ms)) for _, item_id in sorted(liked)[:limit]]


def _first_items(catalog: Catalog, now_ms: int, limit: int) -> Ranked:
    rows = catalog.servable(now_ms).nonzero()[0][:limit]
    return [(catalog.item_ids[row], 0.0) for row in rows]
