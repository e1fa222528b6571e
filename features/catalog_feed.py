"""Keeps a catalogue of a replica fresh: follows the items and item-stats topics, from what its bundle includes.

Used by candidate, ranker and serving, each with a target of its own behind it. Invariant: a target has one writer, the
feed's thread; messages come in the order of their partitions, those that cannot be read are counted and left out, and
Kafka being away delays news and never ends the service.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from core.bundle import Manifest
from core.clock import Clock, SystemClock
from core.codec import check_item, decode
from core.errors import MalformedEventError
from core.kafka import Record, TopicFollower
from core.settings import Settings
from core.telemetry import get_logger
from core.topics import Topics
from headrace.v1.events_pb2 import Item, ItemStats

_log = get_logger("catalog_feed")
_WAIT_SECONDS = 0.05


class CatalogTarget(Protocol):
    """What follows the topics."""

    def put_item(self, item: Item) -> None: ...

    def remove_item(self, item_id: str) -> None: ...

    def put_stats(self, stats: ItemStats) -> None: ...


class CatalogFeed:
    """Applies the topics to one target, on a thread of its own.

    Args:
        target: what is kept fresh.
        manifest: of the bundle that the target was loaded from.
        settings: where Kafka is.
        on_malformed: told the topic of each message that was left out.
        on_applied: called after each batch.
    """

    def __init__(
        self,
        target: CatalogTarget,
        manifest: Manifest,
        settings: Settings,
        on_malformed: Callable[[str], None],
        on_applied: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        self._target, self._on_malformed, self._on_applied = target, on_malformed, on_applied
        self._topics = Topics(settings.kafka.topic_prefix)
        followed = (self._topics.items, self._topics.item_stats)
        self._follower = TopicFollower(settings.kafka, followed, self.apply, _start_offsets(manifest, settings))
        self._clock = clock or SystemClock()
        self._heard_at = self._clock.monotonic()

    def start(self) -> None:
        self._heard_at = self._clock.monotonic()
        self._follower.start()

    def stop(self) -> None:
        self._follower.stop()

    @property
    def has_caught_up(self) -> bool:
        """Whether everything that was in the topics at the start is applied."""
        return self._follower.caught_up.is_set()

    def wait(self, timeout_seconds: float) -> bool:
        """`has_caught_up`, within the time given."""
        return self._follower.caught_up.wait(timeout_seconds)

    def catch_up(self, away_seconds: float, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Waits until `has_caught_up`; False where Kafka is away (nothing comes for so long), or on stopping."""
        while not self.wait(_WAIT_SECONDS):
            if is_stopping() or self._clock.monotonic() - self._heard_at > away_seconds:
                return False
        return True

    def apply(self, records: list[Record]) -> None:
        """Applies messages in order."""
        self._heard_at = self._clock.monotonic()
        for record in records:
            try:
                apply_record(record, self._topics, self._target)
            except MalformedEventError as error:
                self._on_malformed(record.topic)
                _log.warning("left out", topic=record.topic, offset=record.offset, problem=str(error))
        self._on_applied()


def apply_record(record: Record, topics: Topics, target: CatalogTarget) -> None:
    """One message of the two topics. Raises MalformedEventError where it is none."""
    if record.topic == topics.items:
        if record.value is None:
            target.remove_item(record.key.decode("utf-8", "replace"))
            return
        item = decode(Item(), record.value, record.headers)
        check_item(item)
        target.put_item(item)
    elif record.value is not None:
        stats = decode(ItemStats(), record.value, record.headers)
        if stats.item_id:
            target.put_stats(stats)


def _start_offsets(manifest: Manifest, settings: Settings) -> Mapping[tuple[str, int], int]:
    """Where to begin: behind what the bundle includes, if it was made from this very log."""
    if manifest.log_id != settings.kafka.log_id:
        return {}
    offsets = {}
    for where, offset in manifest.follow_offsets.items():
        topic, _, partition = where.rpartition("/")
        offsets[(topic, int(partition))] = offset
    return offsets
