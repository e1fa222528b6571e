"""Which items are one process's own, where the index is spread over several.

Read by the snapshot, which searches only those, and by candidate/shards.py. Invariant: an item has one owner, the same
for all processes, by its id alone.
"""

from dataclasses import dataclass

from core.settings import CandidateSettings
from features.transforms import stable_hash


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` processes; the only one where the index is not spread."""

    number: int = 0
    count: int = 1

    @classmethod
    def of(cls, settings: CandidateSettings) -> "Shard":
        return cls(settings.shard, max(1, len(settings.shard_targets)))

    def owner(self, item_id: str) -> int:
        return stable_hash(item_id) % self.count

    def owns(self, item_id: str) -> bool:
        return self.count == 1 or self.owner(item_id) == self.number
