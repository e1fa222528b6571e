"""The feed of a replica: what follows the two topics, in order, without what cannot be read."""

from collections import Counter

import pytest

from core.bundle import Manifest
from core.clock import ManualClock
from core.kafka import Record
from core.settings import load_settings
from core.topics import Topics
from features.catalog_feed import CatalogFeed, _start_offsets
from headrace.v1.events_pb2 import Item, ItemStats

TOPICS = Topics()


class Target:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def put_item(self, item: Item) -> None:
        self.told.append(("item", item.item_id))

    def remove_item(self, item_id: str) -> None:
        self.told.append(("removed", item_id))

    def put_stats(self, stats: ItemStats) -> None:
        self.told.append(("stats", stats.item_id))


def manifest(log_id: str = "", **follow_offsets: int) -> Manifest:
    offsets = {name.replace("_", "/"): offset for name, offset in follow_offsets.items()}
    return Manifest("v1", "", "", "", "", 0, 0, 8, 0, log_id=log_id, follow_offsets=offsets)


def record(topic: str, key: str, value: bytes | None) -> Record:
    return Record(topic, key.encode(), value, None, 0, 0)


@pytest.fixture
def house():
    target, malformed, batches = Target(), Counter(), []
    feed = CatalogFeed(
        target, manifest(), load_settings(), lambda topic: malformed.update([topic]), lambda: batches.append(1)
    )
    return feed, target, malformed, batches


def test_messages_are_applied_in_order_and_those_that_cannot_be_read_are_counted(house) -> None:
    feed, target, malformed, batches = house
    feed.apply(
        [
            record(TOPICS.items, "a", Item(item_id="a").SerializeToString()),
            record(TOPICS.items, "broken", b"\xff"),
            record(TOPICS.items, "nameless", Item(title="no id").SerializeToString()),
            record(TOPICS.item_stats, "a", ItemStats(item_id="a").SerializeToString()),
            record(TOPICS.item_stats, "broken", b"\xff"),
            record(TOPICS.item_stats, "of nobody", ItemStats().SerializeToString()),
            record(TOPICS.item_stats, "compacted away", None),
            record(TOPICS.items, "a", None),
        ]
    )
    assert target.told == [("item", "a"), ("stats", "a"), ("removed", "a")]
    assert malformed == {TOPICS.items: 2, TOPICS.item_stats: 1}
    assert len(batches) == 1


def test_it_begins_behind_what_the_bundle_includes_of_the_same_log_only() -> None:
    settings = load_settings(overrides={"kafka": {"log_id": "this"}})
    assert _start_offsets(manifest("this", items_3=7), settings) == {("items", 3): 7}
    assert _start_offsets(manifest("other", items_3=7), settings) == {}


def test_kafka_counts_as_away_when_nothing_is_heard_for_so_long() -> None:
    clock = ManualClock()
    settings = load_settings(overrides={"kafka": {"bootstrap_servers": "127.0.0.1:9"}})
    feed = CatalogFeed(Target(), manifest(), settings, lambda _: None, clock=clock)
    assert not feed.catch_up(5, is_stopping=lambda: True)
    clock.advance(6000)
    assert not feed.catch_up(5)
    feed.apply([])
    clock.advance(4000)
    stopped = iter([False, True])
    assert not feed.catch_up(5, is_stopping=lambda: next(stopped)), "not away yet: it went on until it was stopped"
    assert not feed.has_caught_up
