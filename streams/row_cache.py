"""Rows in memory, with what is needed to write them back only where nobody else has: one cache for each view.

Part of streams/rows.py, which alone fills and reads it, on the reader's thread. Invariant: nothing leaves by itself
while a batch is under way; after it, what was used least recently goes first.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class Entry(Generic[V]):
    """A row and the raw bytes of the offsets column that it was read or written with."""

    value: V
    raw: bytes
    partition: int


class RowCache(OrderedDict[K, Entry[V]]):
    """Entries by key, least recently used first. The owner calls `shrink`, between batches."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def missing(self, wanted: Iterable[K]) -> list[K]:
        """What is not in memory; what is becomes the newest."""
        missing = []
        for key in wanted:
            if key in self:
                self.move_to_end(key)
            else:
                missing.append(key)
        return missing

    def drop(self, partitions: set[int]) -> None:
        """Forgets the rows of some partitions."""
        for key in [key for key, entry in self.items() if entry.partition in partitions]:
            del self[key]

    def shrink(self) -> None:
        """Down to the capacity."""
        while len(self) > self._capacity:
            self.popitem(last=False)
