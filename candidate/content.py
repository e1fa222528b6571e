"""From items to what the content part of the item tower reads: hashed categories and words, and a few numbers.

Called for the whole catalogue in training and for each new item in the service. Invariant: depends on the item's own
attributes alone, so an item that no tower has seen has its content vector from the first second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from features.catalog import CATEGORY_VOCABULARY
from features.transforms import stable_hash, words
from headrace.v1.events_pb2 import Item

WORD_BUCKETS = 8192
MAX_CATEGORIES, MAX_WORDS = 16, 48
# Year, log of the price.
NUMBERS = 2

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bags:
    """Weighted bags of buckets, flat: bag i is `offsets[i]:offsets[i + 1]`."""

    offsets: Ints  # [n + 1]
    buckets: Ints
    weights: Floats

    def take(self, at: Ints) -> "Bags":
        """The bags at some positions, in that order."""
        sizes = self.offsets[at + 1] - self.offsets[at]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        source = np.arange(offsets[-1]) + np.repeat(self.offsets[at] - offsets[:-1], sizes)
        return Bags(offsets, self.buckets[source], self.weights[source])


@dataclass(frozen=True, slots=True)
class Content:
    """Content of n items."""

    categories: Bags
    words: Bags
    numbers: Floats  # [n, NUMBERS], NaN = not known

    def __len__(self) -> int:
        return len(self.numbers)

    def any(self) -> npt.NDArray[np.bool_]:
        """Whether anything is known of each item [n]."""
        sizes = np.diff(self.categories.offsets) + np.diff(self.words.offsets)
        known: npt.NDArray[np.bool_] = (sizes > 0) | ~np.isnan(self.numbers).all(axis=1)
        return known

    def take(self, at: Ints) -> "Content":
        return Content(self.categories.take(at), self.words.take(at), self.numbers[at])


def item_content(items: Sequence[Item]) -> Content:
    """Content of items, in order."""
    categories = [[_category(name) for name in list(item.categories)[:MAX_CATEGORIES]] for item in items]
    text = [[_word(word) for word in dict.fromkeys(words(f"{i.title} {i.text}"))][:MAX_WORDS] for i in items]
    return Content(
        _bags(categories), _bags(text), np.array([_numbers(i) for i in items], np.float32).reshape(-1, NUMBERS)
    )


def without_rare_words(content: Content, least_items: int) -> Content:
    """Weighs words of fewer items 0: to a model in training they would be one more item id, and teach it nothing."""
    counts = np.bincount(content.words.buckets, minlength=WORD_BUCKETS)
    weights = np.where(counts[content.words.buckets] >= least_items, content.words.weights, np.float32(0))
    return Content(content.categories, Bags(content.words.offsets, content.words.buckets, weights), content.numbers)


def _bags(lists: list[list[int]]) -> Bags:
    sizes = np.array([len(buckets) for buckets in lists], np.int64)
    weights = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes).astype(np.float32)
    flat = np.array([bucket for buckets in lists for bucket in buckets], np.int64)
    return Bags(np.concatenate([[0], np.cumsum(sizes)]), flat, weights)


def _numbers(item: Item) -> list[float]:
    return [
        float(item.year) if item.HasField("year") else math.nan,
        math.log1p(max(item.price, 0.0)) if item.HasField("price") else math.nan,
    ]


@lru_cache(maxsize=100_000)
def _category(name: str) -> int:
    return 1 + stable_hash(name) % (CATEGORY_VOCABULARY - 1)


@lru_cache(maxsize=200_000)
def _word(word: str) -> int:
    return stable_hash(word) % WORD_BUCKETS
