"""The row of the most popular items."""

import threading

import pytest

from core.kafka import Record
from core.settings import load_settings
from core.topics import Topics, item_stats_key
from features import item_stats
from features.definitions import POPULARITY
from features.item_stats import ItemPartial
from features.stores.online import OnlineStore
from features.windows import UserEvent
from headrace.v1.events_pb2 import Item
from streams.popularity import PopularityWriter

# Long ago: popularity is as of the newest event, not of now.
THEN_MS = 1_000_000_000_000
TOPICS = Topics()


@pytest.fixture
def writer(shared_redis, tmp_path, request):
    settings = load_settings(
        overrides={
            "redis": {"url": shared_redis.url},
            "features": {"project": f"popularity-{request.node.name}"},
            "registry": {"path": str(tmp_path)},
        }
    )
    return PopularityWriter(settings, OnlineStore(settings.redis, settings.features.project))


def stats(item_id: str, clicks: int, partition: int = 0, segment: str = "") -> Record:
    features, partial = load_settings().features, ItemPartial()
    for number in range(clicks):
        event = UserEvent("u", number, item_id, "click", THEN_MS + number, segment=segment)
        item_stats.apply(partial, event, features)
    value = item_stats.encode(item_id, partition, partial, features)
    return Record(TOPICS.item_stats, item_stats_key(item_id, partition), value, None, 0, 0)


def item(item_id: str, **fields) -> Record:
    value = Item(item_id=item_id, **fields).SerializeToString()
    return Record(TOPICS.items, item_id.encode(), value, None, 0, 0)


def read(writer, segment: str = "all") -> tuple:
    cells = writer._store.read(POPULARITY, [(segment,)])[0].cells
    return cells.get("popular_item_ids"), cells.get("popular_watermark_ms")


def test_partials_of_all_partitions_are_added_up(writer) -> None:
    writer.on_records([stats("a", 5), stats("b", 3), stats("b", 4, partition=1), stats("c", 1)])
    assert writer.write()
    assert read(writer) == (["b", "a", "c"], THEN_MS + 4)
    assert not writer.write()
    writer.on_records([stats("c", 9)])
    assert writer.write()
    assert read(writer)[0] == ["c", "b", "a"]


def test_each_segment_has_a_row_of_its_own(writer) -> None:
    partitions = [stats("b", 3, 1, segment="anglers"), stats("b", 9, 2, segment="campers")]
    writer.on_records([stats("a", 4, segment="anglers"), *partitions, stats("c", 20), item("d", available=False)])
    writer.on_records([item(item_id) for item_id in "abc"])
    writer.write()
    assert read(writer)[0] == ["c", "b", "a"]
    assert read(writer, "anglers") == (["a", "b"], THEN_MS + 19)
    assert read(writer, "campers")[0] == ["b"]


def test_items_that_cannot_be_recommended_are_left_out(writer) -> None:
    writer.on_records([item("a"), item("b", available=False), item("c"), stats("a", 1), stats("b", 9), stats("c", 2)])
    writer.write()
    assert read(writer)[0] == ["c", "a"]
    writer.on_records([Record(TOPICS.items, b"c", None, None, 0, 0)])
    writer.write()
    assert read(writer)[0] == ["a"]


def test_one_worker_of_the_group_writes(shared_redis, writer) -> None:
    other = PopularityWriter(writer._settings, writer._store, lambda: False)
    other.on_records([stats("a", 5)])
    assert not other.write()
    assert read(writer) == (None, None)


def test_an_odd_row_does_not_end_the_thread(writer, monkeypatch) -> None:
    broken = threading.Event()

    def fail() -> bool:
        if broken.is_set():
            return True
        broken.set()
        raise ValueError("a row of other half-lives")

    monkeypatch.setattr(writer, "write", fail)
    writer._thread.start()
    assert broken.wait(10)
    assert writer._thread.is_alive()
    writer._stopping.set()


def test_malformed_records_are_passed_over(writer) -> None:
    writer.on_records([Record(TOPICS.items, b"x", b"\xff", None, 0, 0), stats("a", 1)])
    writer.write()
    assert read(writer)[0] == ["a"]
