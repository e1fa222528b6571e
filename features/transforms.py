"""Small pure functions from raw values to feature values: hashes, weights, scales.

Called by windows, catalog and vectors. Invariant: results depend on the arguments alone (no process hash seed).
"""

import re
from functools import lru_cache
from hashlib import blake2b

from core.settings import FeaturesSettings

# Stars run from 0.5 to 5; the middle says nothing, the ends say most.
_RATING_MIDDLE, _RATING_RANGE = 2.75, 2.25
_WORDS = re.compile(r"[a-z0-9]+")


def stable_hash(text: str) -> int:
    """64 bits of `text`, the same in every process and version."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=100_000)
def category_bucket(category: str, buckets: int) -> int:
    return stable_hash(category) % buckets


def words(text: str) -> list[str]:
    """Lower-case words of two letters and more."""
    return [word for word in _WORDS.findall(text.lower()) if len(word) > 1]


def engagement_weight(kind: str, value: float, confidence: float, settings: FeaturesSettings) -> float:
    """How much an event says that the user likes the item; negative = dislikes.

    A rating counts by its stars (5 = full weight, 2.75 = nothing, 0.5 = the opposite), a dwell by its seconds up to
    two minutes; other kinds by their configured weight. All are scaled by the producer's confidence.
    """
    weight = settings.kind_weights.get(kind)
    if weight is None:
        weight = settings.kind_weights["default"]
    if kind == "rating":
        weight *= max(-1.0, min(1.0, (value - _RATING_MIDDLE) / _RATING_RANGE))
    elif kind == "dwell":
        weight *= max(0.0, min(value, 120.0)) / 60.0
    return weight * confidence
