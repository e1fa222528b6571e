"""Item statistics that a Redis Cluster may have lost: noticed, said, and remembered until a rebuild.

The row of an item and those of its users lie on different primaries. Where one primary loses what it had acknowledged,
reading again finds that the users' rows count the events already, so nobody counts them for the item a second time:
which of them were duplicates is known to nobody but the log. Asked by the reader before it believes markers. Invariant:
says nothing of a single Redis, which loses users and items together and is caught up by itself.
"""

import time
from collections.abc import Sequence

from core.clock import Clock, SystemClock
from core.telemetry import get_logger
from features.stores.online import ITEM_STATS_IN_DOUBT, OnlineStore
from streams import metrics

_log = get_logger("streams.doubts")
_AGAIN_SECONDS = 0.1


class ItemDoubts:
    """Watches one store, on the thread of its owner."""

    def __init__(self, store: OnlineStore, clock: Clock | None = None) -> None:
        self._store = store
        self._clock = clock or SystemClock()
        self._changes = 0

    def look(self, partitions: Sequence[int]) -> bool:
        """Whether statistics may lack events, because a primary is another one than before, or lost its markers.

        Raises:
            StageError: the store does not answer.
        """
        if not self._store.is_cluster():
            return False
        changed = self._store.changes > self._changes or self._are_torn(partitions)
        self._changes = self._store.changes
        if changed:
            self._store.put_text(ITEM_STATS_IN_DOUBT, str(self._clock.now_ms()))
            _log.error(
                "a primary of the Redis Cluster is another one than before, or lost rows: users' rows are caught up, "
                "item statistics may lack what it had not kept; stop the workers and run `headrace rebuild`"
            )
        in_doubt = changed or self._store.read_text(ITEM_STATS_IN_DOUBT) is not None
        metrics.ITEM_STATS_IN_DOUBT.set(in_doubt)
        return in_doubt

    def _are_torn(self, partitions: Sequence[int]) -> bool:
        """Twice, since another worker may just be writing them, one primary after the other."""
        for attempt in range(2):
            if attempt:
                time.sleep(_AGAIN_SECONDS)
            self._store.read_markers(partitions)
            if not any(map(self._store.is_torn, partitions)):
                return False
        return True
