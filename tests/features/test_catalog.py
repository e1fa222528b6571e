"""The catalogue's columns fit each other also while items come in."""

import threading

import pytest

from core.settings import load_settings
from features import item_stats
from features.catalog import Catalog
from features.item_stats import ItemPartial
from features.windows import UserEvent
from headrace.v1.events_pb2 import Item

NOW_MS = 1_780_000_000_000


def test_a_segments_items_are_in_the_order_of_its_users() -> None:
    features = load_settings().features
    catalog = Catalog(features)
    for item_id, segments in {"a": "xyy", "b": "xxxy", "c": "y"}.items():
        partial = ItemPartial()
        for number, segment in enumerate(segments):
            item_stats.apply(partial, UserEvent("u", number, item_id, "click", NOW_MS, segment=segment), features)
        catalog.put_stats(item_stats.as_message(item_id, 0, partial, features))
    assert catalog.segments() == ["x", "y"]
    rows, log2 = catalog.segment_popularity("x")
    assert [catalog.item_ids[row] for row in rows] == ["b", "a"]
    assert catalog.decayed(log2, NOW_MS).tolist() == pytest.approx([3.0, 1.0], rel=1e-5)
    assert len(catalog.segment_popularity("nobody")[0]) == 0


@pytest.mark.parametrize("put_again", ["as a message", "as the same object"])
def test_columns_follow_clicks_and_showings_alike(put_again) -> None:
    features = load_settings().features
    catalog, partial = Catalog(features), ItemPartial()
    for number, kind in enumerate(("impression", "click", "impression", "impression", "click")):
        item_stats.apply(partial, UserEvent("u", number, "a", kind, NOW_MS, segment="x"), features)
        if put_again == "as a message":
            catalog.put_stats(item_stats.as_message("a", 0, partial, features))
        else:
            catalog.put_partial("a", 0, partial)
        clicks = ("impression", "click", "impression", "impression", "click")[: number + 1].count("click")
        assert catalog.column("clicks")[0] == clicks
        assert catalog.column("impressions")[0] == number + 1 - clicks
        assert catalog.column("stats_revision")[0] == number + 1
        assert catalog.popularity(NOW_MS)[0] == pytest.approx(clicks, rel=1e-5)
        assert len(catalog.segment_popularity("x")[0]) == (clicks > 0)


def test_readers_beside_the_writer_see_columns_of_one_length() -> None:
    catalog = Catalog(load_settings().features)
    done = threading.Event()
    problems: list[Exception] = []

    def read() -> None:
        while not done.is_set():
            try:
                known = len(catalog)
                assert len(catalog.servable(NOW_MS)) >= known
                assert len(catalog.column("year")) >= known
            except Exception as error:  # noqa: BLE001 - a thread's exception is for the test to see
                problems.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(20_000):
        catalog.upsert(Item(item_id=str(number)))
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []
