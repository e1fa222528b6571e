"""The watchdog: asks the broker how long each partition is, and notices when one does not move.

Outside the consumer, on a thread and a connection of its own, because a consumer that hangs cannot say so. Invariant:
a partition counts as stalled only while it has messages that are not processed.
"""

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from core.clock import Clock, SystemClock
from core.kafka import client_config
from core.settings import Settings
from core.telemetry import get_logger
from streams import metrics

_log = get_logger("streams.watchdog")

Where = tuple[str, int]
_REQUEST_SECONDS = 5.0
_PAUSE_SECONDS = 2.0


class Bounds(NamedTuple):
    """What Kafka has of a topic-partition."""

    oldest: int
    # The offset that the next message will get.
    end: int


class Watchdog:
    """Lag and stalls of the partitions that `processed` names (newest processed offset, -1 for none).

    `on_oldest` is told the oldest offset of each that Kafka still has.
    """

    def __init__(
        self,
        settings: Settings,
        processed: Callable[[], Mapping[Where, int]],
        on_oldest: Callable[[Mapping[Where, int]], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._processed = processed
        self._on_oldest = on_oldest or (lambda _: None)
        self._clock = clock or SystemClock()
        self._stall_seconds = settings.streams.stall_timeout_ms / 1000
        # Of partitions with lag: where each was when it was first seen there, and when that was.
        self._moved: dict[Where, tuple[int, float]] = {}
        self._stalled: list[Where] = []
        # Partitions whose lag is in the metrics.
        self._told: set[Where] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def problem(self) -> str | None:
        """The partitions that do not move, or nothing."""
        if not self._stalled:
            return None
        names = ", ".join(f"{topic}/{partition}" for topic, partition in self._stalled[:3])
        return f"{len(self._stalled)} partitions have not moved for {self._stall_seconds:g} s: {names}"

    def look(self, bounds: Mapping[Where, Bounds], processed: Mapping[Where, int]) -> None:
        """Compares what Kafka has of the partitions with how far they are processed."""
        now = self._clock.monotonic()
        stalled = []
        for where in [where for where in self._moved if where not in processed]:
            del self._moved[where]
        for topic, partition in self._told - processed.keys():
            # Another worker's now, who tells its lag: sums over workers must not count it twice.
            metrics.LAG.labels(topic, str(partition)).set(0)
        self._told = set(processed)
        for where, offset in processed.items():
            oldest, end = bounds.get(where, Bounds(0, 0))
            # What Kafka no longer has is not waited for.
            lag = max(0, end - max(oldest, offset + 1))
            metrics.LAG.labels(where[0], str(where[1])).set(lag)
            before = self._moved.get(where)
            if lag == 0:
                self._moved.pop(where, None)
            elif before is None or before[0] != offset:
                self._moved[where] = (offset, now)
            elif now - before[1] >= self._stall_seconds:
                stalled.append(where)
        metrics.STALLED.set(len(stalled))
        self._stalled = sorted(stalled)
        self._on_oldest({where: oldest for where, (oldest, _) in bounds.items()})

    def _run(self) -> None:
        admin = AdminClient(client_config(self._settings.kafka))
        pause = min(_PAUSE_SECONDS, self._stall_seconds / 4)
        while not self._stopping.wait(pause):
            processed = self._processed()
            try:
                self.look(_bounds(admin, processed) if processed else {}, processed)
            except (KafkaException, TimeoutError) as error:
                # Kafka is away: nothing can be said about lag, and the reader says that itself.
                _log.debug("no offsets from kafka", problem=str(error))


def _bounds(admin: AdminClient, wheres: Mapping[Where, int]) -> dict[Where, Bounds]:
    asked = [TopicPartition(*where) for where in wheres]
    found = []
    for spec in (OffsetSpec.earliest(), OffsetSpec.latest()):  # type: ignore[no-untyped-call]
        answers = admin.list_offsets(dict.fromkeys(asked, spec), request_timeout=_REQUEST_SECONDS)
        found.append({(tp.topic, tp.partition): future.result(_REQUEST_SECONDS) for tp, future in answers.items()})
    oldest, ends = found
    return {where: Bounds(oldest[where].offset, ends[where].offset) for where in wheres}
