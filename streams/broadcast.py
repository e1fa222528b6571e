"""Broadcasts item statistics on the compacted item-stats topic, for the catalogues of all replicas.

Fed by the reader with rows as they were written, and ticked by it. Invariant: what is sent is always the whole row of
one (item, source partition), so a lost or repeated message does no harm once the next one comes.
"""

from collections.abc import Collection, Mapping

from core.clock import Clock, SystemClock
from core.kafka import KafkaProducer
from core.topics import item_stats_key
from streams import metrics
from streams.processor import ItemKey

# Every replica, and this worker's own popularity, takes in each row: about 20 us apiece.
_ROWS_PER_SECOND = 1000


class StatsBroadcast:
    """The newest row of each changed item, until it is sent."""

    def __init__(self, producer: KafkaProducer, topic: str, interval_ms: int, clock: Clock | None = None) -> None:
        self._producer = producer
        self._topic = topic
        self._interval_seconds = interval_ms / 1000
        self._clock = clock or SystemClock()
        self._waiting: dict[ItemKey, bytes] = {}
        self._next = 0.0

    def put(self, stats: Mapping[ItemKey, bytes]) -> None:
        self._waiting.update(stats)

    def forget(self, partitions: Collection[int]) -> None:
        """These belong to another worker now, whose rows are newer."""
        for key in [key for key in self._waiting if key[1] in partitions]:
            del self._waiting[key]

    def tick(self, *, now: bool = False) -> bool:
        """Sends what waits, if it is time; what Kafka does not take stays. True when nothing waits any more."""
        moment = self._clock.monotonic()
        if not self._waiting:
            return True
        if moment < self._next and not now:
            return False
        # While catching up, thousands of rows change between two ticks: their readers need the newest, not each.
        self._next = moment + max(self._interval_seconds, len(self._waiting) / _ROWS_PER_SECOND)
        for key in list(self._waiting):
            if not self._producer.post(self._topic, item_stats_key(*key), self._waiting[key]):
                return False
            del self._waiting[key]
            metrics.BROADCASTS.inc()
        return True
