"""Which answers log what the ranker read, and of which items: those shown, and a sample of the others.

Asked by the rank stage before the ranker is called, and by the log stage when it is known what is shown. Invariant: an
answer that is not logged costs nothing; one that is takes at most `features.feature_log.MAX_BYTES`.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from features import feature_log
from features.transforms import stable_hash
from headrace.v1.feature_log_pb2 import LoggedFeatures
from serving.query import Query

_HASHES = 1 << 64
# For what is not an item's: user, history, positions.
_HEAD_BYTES = 8 * 1024


def is_logged(query: Query, share: float) -> bool:
    """Whether this answer is of the share that logs its features; by its id, so that anybody can tell again."""
    return share > 0 and not query.request.dry_run and _hash(query.recommendation_id) < share * _HASHES


def cut(features: LoggedFeatures, recommendation_id: str, shown: Sequence[str], others: int) -> bytes:
    """What is logged of an answer, encoded: the shown items first, then others drawn from what the ranker told of.

    Args:
        features: the ranker's; changed in place.
        recommendation_id: seeds the draw.
        shown: items in the order shown; those that the ranker did not tell of (nobody ranked them) are left out.
        others: how many to draw.
    """
    place_of = {item_id: place for place, item_id in enumerate(features.item_ids)}
    first = [place_of.pop(item_id) for item_id in shown if item_id in place_of]
    rest = list(place_of.values())
    rng = np.random.default_rng(_hash(recommendation_id))
    drawn = rng.choice(rest, min(others, len(rest)), replace=False).tolist() if rest and others else []
    places = _within(features, [*first, *drawn], feature_log.MAX_BYTES - _HEAD_BYTES)
    feature_log.keep(features, places)
    features.shown_count = min(len(first), len(places))
    encoded = features.SerializeToString()
    return encoded if len(encoded) <= feature_log.MAX_BYTES else b""


def _within(features: LoggedFeatures, places: Sequence[int], size_bytes: int) -> list[int]:
    """As many of the first as have room."""
    ends = accumulate(feature_log.item_bytes(features, place) for place in places)
    return [place for place, end in zip(places, ends, strict=True) if end <= size_bytes]


def _hash(recommendation_id: str) -> int:
    return stable_hash(f"features of {recommendation_id}")
