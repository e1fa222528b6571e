"""The replay is the stream's own functions in event time: nothing more, nothing less, nothing early."""

import random

import numpy as np
import pytest

from core.codec import from_ms
from core.settings import load_settings
from features import item_stats, windows
from features.catalog import Catalog
from features.item_stats import ItemPartial
from features.stores.event_log import EventLog, user_events
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, to_table
from features.windows import UserEvent, UserState
from headrace.v1.events_pb2 import Event, Feedback, Impression, ImpressionList, Item
from offline.logs import read_items
from offline.popularity import popularity_lists
from offline.replay import LOG_PARTITION, Replay, Shown, read_entries

DAY = 86_400_000
START = 20_000 * DAY
ITEMS = [Item(item_id=f"i{n}", categories=[f"c{n % 3}"]) for n in range(6)]


@pytest.fixture(scope="module")
def features():
    return load_settings().features


def event(number, user="u", item="i0", time_ms=None, kind="click"):
    return UserEvent(user, number, item, kind, START + number * 1000 if time_ms is None else time_ms)


def test_states_and_statistics_equal_those_of_the_plain_functions(shop, settings):
    entries = list(read_entries(shop))
    replay = Replay(read_items(shop), settings.features)
    applied = replay.advance(entries)

    states: dict[str, UserState] = {}
    partials: dict[str, ItemPartial] = {}
    for message in shop.events().to_pylist():
        states.setdefault(message["user_id"], UserState())
    for entry in entries:
        user_event = entry.event if isinstance(entry, Shown) else entry
        state = states.setdefault(user_event.user_id, UserState())
        windows.apply(state, [user_event], settings.features)
        for item_id in entry.item_ids if isinstance(entry, Shown) else [user_event.item_id]:
            partial = partials.setdefault(item_id, ItemPartial())
            item_stats.apply(partial, user_event._replace(item_id=item_id), settings.features)

    assert applied == len(entries) > 3000
    assert {user: windows.encode(state) for user, state in replay.states.items()} == {
        user: windows.encode(state) for user, state in states.items()
    }
    assert replay.partials == partials
    assert replay.watermark_ms == max(entry.time_ms for entry in entries)


def test_the_catalogue_is_exact_however_rarely_it_is_looked_at(shop, settings):
    entries, items = list(read_entries(shop))[:1500], read_items(shop)
    often, once = Replay(items, settings.features), Replay(items, settings.features)
    for entry in entries:
        often.advance([entry])
        assert often.catalog is not None
    once.advance(entries)
    rebuilt = Catalog(settings.features)
    for item in items:
        rebuilt.upsert(item)
    for stats in once.item_stats():
        assert stats.source_partition == LOG_PARTITION
        rebuilt.put_stats(stats)
    for name in ("impressions", "clicks", "log2_popularity", "stats_revision"):
        np.testing.assert_array_equal(often.catalog.column(name), once.catalog.column(name))
        np.testing.assert_array_equal(rebuilt.column(name), once.catalog.column(name))


def test_a_group_is_one_user_at_one_time_and_nothing_of_that_time_was_applied(features):
    replay = Replay(ITEMS, features)
    entries = [event(1, "a"), event(2, "a", time_ms=START + 1000), event(3, "b", time_ms=START + 1000), event(4, "a")]
    seen = []
    for group in replay.groups(entries):
        revisions = {user: replay.state(user).revision for user in "ab"}
        seen.append((group.user_id, [entry.event_hash for entry in group.events], revisions))
        assert replay.watermark_ms < group.time_ms
    assert seen == [
        ("a", [1, 2], {"a": 0, "b": 0}),
        ("b", [3], {"a": 0, "b": 0}),
        ("a", [4], {"a": 2, "b": 1}),
    ]
    assert replay.state("a").revision == 3


def test_what_was_merely_shown_counts_and_forms_no_group(features):
    replay = Replay(ITEMS, features)
    shown = Shown(UserEvent("a", 7, "", windows.IMPRESSION, START), ("i1", "i2"))
    assert list(replay.groups([shown])) == []
    assert replay.catalog.column("impressions")[:3].tolist() == [0, 1, 1]
    assert replay.state("a").revision == 0
    replay.advance([shown])
    assert replay.catalog.column("impressions")[:3].tolist() == [0, 1, 1], "a duplicate counts once"


def test_duplicates_count_once(features):
    replay = Replay(ITEMS, features)
    assert replay.advance([event(1), event(1), event(2)]) == 2
    assert replay.catalog.column("clicks")[0] == 2


def test_an_item_is_known_from_its_publication_or_its_first_event(features):
    items = [Item(item_id="published", publish_time=from_ms(START + 5000)), Item(item_id="i0"), Item(item_id="never")]
    replay = Replay(items, features)
    assert replay.known_items(START).tolist() == [False, False, False]
    assert replay.known_items(START + 5000).tolist() == [True, False, False]
    replay.advance([event(1)])
    assert replay.known_items(START).tolist() == [False, True, False]


def test_items_that_only_events_name_come_after_the_catalogue_in_any_order_of_reading(features):
    replay = Replay(ITEMS, features)
    events = [event(n, item=f"x{n}") for n in range(20)]
    random.Random(1).shuffle(events)
    replay.advance(sorted(events, key=lambda e: e.time_ms))
    assert replay.catalog.item_ids[len(ITEMS) :] == sorted(f"x{n}" for n in range(20))


def test_segments_are_counted_apart(features):
    replay = Replay(ITEMS, features)
    replay.advance([event(1, "a")._replace(segment="anglers"), event(2, "b")])
    assert replay.partials["i0"].revision == 2
    assert replay.partials["i0"].segments.keys() == {"anglers"}
    lists = popularity_lists(replay, replay.watermark_ms, load_settings())
    assert [item_id for item_id, _ in lists["segments"]["anglers"]] == ["i0"]


def test_events_feedback_and_lists_come_in_one_order_of_time(tmp_path):
    log = EventLog(tmp_path)
    log.write(
        EVENTS,
        to_table(EVENTS, [Event(event_id="e", user_id="u", item_id="i0", kind="view", event_time=from_ms(START + 2))]),
        "x",
    )
    log.write(
        FEEDBACK,
        to_table(
            FEEDBACK, [Feedback(event_id="f", user_id="u", item_id="i0", kind="click", event_time=from_ms(START + 3))]
        ),
        "x",
    )
    shown = ImpressionList(event_id="s", user_id="u", event_time=from_ms(START + 1))
    shown.impressions.extend([Impression(item_id="i0"), Impression(item_id="i1")])
    later = ImpressionList(event_id="t", user_id="v", event_time=from_ms(START + 4))
    later.impressions.add(item_id="i2")
    log.write(IMPRESSIONS, to_table(IMPRESSIONS, [shown, later]), "x")
    first, view, click, last = read_entries(log)
    assert (view.kind, click.kind) == ("view", "click")
    assert first == Shown(windows.as_impression_event(shown), ("i0", "i1"))
    assert last == Shown(windows.as_impression_event(later), ("i2",))
    assert [entry.time_ms for entry in read_entries(log, START + 2, START + 4)] == [START + 2, START + 3]


def test_events_of_the_simulated_shop_have_the_segment_of_their_user(shop):
    segments = {user.user_id: user.segment for user in shop.users()}
    events = list(user_events(shop.events()))
    assert any(event.segment for event in events)
    assert all(event.segment == segments[event.user_id] for event in events)
