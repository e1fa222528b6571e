"""Keeps a catalogue of a replica fresh: follows the items and item-stats topics, from what its bundle includes.

Used by candidate, ranker and serving, each with a target of its own behind it. Invariant: a target has one writer, the
feed's thread (core/feed.py).
"""

from collections.abc import Callable
from typing import Protocol

from core.bundle import Manifest
from core.clock import Clock
from core.codec import check_item, decode
from core.feed import TopicFeed
from core.kafka import GATHER_MS, Record, StartOffsets
from core.settings import Settings
from core.topics import Topics
from headrace.v1.events_pb2 import Item, ItemStats


class CatalogTarget(Protocol):
    """What follows the topics."""

    def put_item(self, item: Item) -> None: ...

    def remove_item(self, item_id: str) -> None: ...

    def put_stats(self, stats: ItemStats) -> None: ...


class CatalogFeed(TopicFeed):
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
        self._target, self._on_applied = target, on_applied
        self._topics = Topics(settings.kafka.topic_prefix)
        followed = (self._topics.items, self._topics.item_stats)
        super().__init__(
            settings.kafka, followed, _start_offsets(manifest, settings), on_malformed, clock, gather_ms=GATHER_MS
        )

    def apply_one(self, record: Record) -> None:
        apply_record(record, self._topics, self._target)

    def batch_applied(self, count: int) -> None:  # noqa: ARG002
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


def _start_offsets(manifest: Manifest, settings: Settings) -> StartOffsets:
    """Where to begin: behind what the bundle includes, if it was made from this very log."""
    if manifest.log_id != settings.kafka.log_id:
        return {}
    offsets = {}
    for where, offset in manifest.follow_offsets.items():
        topic, _, partition = where.rpartition("/")
        offsets[(topic, int(partition))] = offset
    return offsets
