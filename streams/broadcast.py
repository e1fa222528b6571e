"""Broadcasts item statistics on the compacted item-stats topic, for the catalogues of all replicas.

Fed by the reader with rows as they were written, and ticked by it. Invariant: what is sent is always the whole row of
one (item, source partition), and the newest one; what Kafka did not acknowledge is sent again, so once it is back the
replicas have everything that `told` says they have.
"""

from collections import deque
from collections.abc import Collection, Mapping
from functools import partial

from core.clock import Clock, SystemClock
from core.kafka import KafkaProducer
from core.topics import item_stats_key
from streams import metrics
from streams.processor import ItemKey

# Every replica, and this worker's own popularity, takes in each row: about 20 us apiece, three times that in between
# other work.
_ROWS_PER_SECOND = 1000
# Of items that were shown and nothing else.
_SHOWN_ROWS_PER_SECOND = 250

# Newest offset by topic and partition, as the reader counts them.
Reached = Mapping[tuple[str, int], int]


class StatsBroadcast:
    """The newest row of each changed item, until Kafka has it. Memory is bounded by the items: one row each.

    Args:
        producer: to Kafka.
        topic: of item statistics.
        interval_ms: between two rounds.
        shown_interval_ms: between two rounds that take items along which were shown and nothing else: an answer shows
            twenty of them, and one more showing changes little.
        clock: for both.
    """

    def __init__(
        self,
        producer: KafkaProducer,
        topic: str,
        interval_ms: int,
        shown_interval_ms: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self._producer = producer
        self._topic = topic
        self._interval_seconds = interval_ms / 1000
        self._shown_interval_seconds = shown_interval_ms / 1000
        self._clock = clock or SystemClock()
        self._waiting: dict[ItemKey, bytes] = {}
        # Those that can wait; none is in both.
        self._shown: dict[ItemKey, bytes] = {}
        # Newest row of each item that is on its way, and the round it went out in.
        self._on_the_way: dict[ItemKey, tuple[int, bytes]] = {}
        # Rows of each round that Kafka has not spoken of.
        self._unreported: dict[int, int] = {}
        # What the replicas will know when a round and all before it have arrived.
        self._promised: dict[int, Reached] = {}
        # (round, item, arrived), from the producer's thread.
        self._reports: deque[tuple[int, ItemKey, bool]] = deque()
        self._round = 0
        self._next = 0.0
        self._next_shown = 0.0

    def put(self, stats: Mapping[ItemKey, bytes], only_shown: Collection[ItemKey] = ()) -> None:
        """Rows as they were written, and those of them that changed by impressions alone."""
        for key, row in stats.items():
            if key in only_shown and key not in self._waiting:
                self._shown[key] = row
            else:
                self._shown.pop(key, None)
                self._waiting[key] = row

    def forget(self, partitions: Collection[int]) -> None:
        """These belong to another worker now, whose rows are newer."""
        for rows in (self._waiting, self._shown, self._on_the_way):
            for key in [key for key in rows if key[1] in partitions]:
                del rows[key]

    def tick(self, reached: Reached, *, now: bool = False) -> Reached | None:
        """Sends what waits, if it is time.

        Args:
            reached: up to where the rows that were put so far go.
            now: do not wait until it is time.

        Returns:
            Up to where Kafka has acknowledged everything, where that is news.
        """
        moment = self._clock.monotonic()
        self._read_reports()
        if not self._waiting and not self._shown:
            # All of it is in Kafka or on its way.
            self._promised[self._round] = dict(reached)
        elif now or moment >= self._next:
            self._take_shown(moment, now=now)
            # While catching up, thousands of rows change between two ticks: their readers need the newest, not each.
            self._next = moment + max(self._interval_seconds, len(self._waiting) / _ROWS_PER_SECOND)
            self._round += 1
            if self._send() and not self._shown:
                self._promised[self._round] = dict(reached)
        return self._told()

    def finish(self, reached: Reached, timeout_seconds: float) -> Reached | None:
        """Sends what waits and gives Kafka some time to acknowledge it; as `tick`."""
        self.tick(reached, now=True)
        self._producer.flush(timeout_seconds)
        return self.tick(reached)

    def _take_shown(self, moment: float, *, now: bool) -> None:
        """What can wait goes along, if it has waited long enough."""
        if now or moment >= self._next_shown:
            self._next_shown = moment + max(self._shown_interval_seconds, len(self._shown) / _SHOWN_ROWS_PER_SECOND)
            self._waiting.update(self._shown)
            self._shown.clear()

    def _send(self) -> bool:
        """False where Kafka's queue is full: the rest stays."""
        for key in list(self._waiting):
            report = partial(self._note, self._round, key)
            if not self._producer.post(self._topic, item_stats_key(*key), self._waiting[key], on_delivery=report):
                return False
            self._unreported[self._round] = self._unreported.get(self._round, 0) + 1
            self._on_the_way[key] = (self._round, self._waiting.pop(key))
            metrics.BROADCASTS.inc()
        return True

    def _note(self, number: int, key: ItemKey, arrived: bool) -> None:
        self._reports.append((number, key, arrived))

    def _read_reports(self) -> None:
        while self._reports:
            number, key, arrived = self._reports.popleft()
            self._unreported[number] -= 1
            if not self._unreported[number]:
                del self._unreported[number]
            newest = self._on_the_way.get(key)
            if newest is not None and newest[0] == number:
                del self._on_the_way[key]
            if not arrived and newest is not None:
                # Where a newer one is on its way, that once more: a message too many does no harm.
                self._waiting.setdefault(key, self._shown.pop(key, newest[1]))
                self._promised = {earlier: reached for earlier, reached in self._promised.items() if earlier < number}

    def _told(self) -> Reached | None:
        oldest = min(self._unreported, default=self._round + 1)
        arrived = [number for number in self._promised if number < oldest]
        told = self._promised[max(arrived)] if arrived else None
        for number in arrived:
            del self._promised[number]
        return told
