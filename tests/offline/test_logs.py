"""A log as a whole."""

import pytest

from core.codec import from_ms
from core.errors import ConfigError
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, ITEMS, to_table
from headrace.v1.events_pb2 import Event, Item
from offline.logs import log_fingerprint, open_log, read_items, with_new_items

START = 1_700_000_000_000


def events(*numbers):
    return to_table(
        EVENTS,
        [
            Event(event_id=f"e{n}", user_id=f"u{n % 3}", item_id=f"i{n}", kind="click", event_time=from_ms(START + n))
            for n in numbers
        ],
    )


def items(*names):
    return to_table(ITEMS, [Item(item_id=name, title=name.upper()) for name in names])


def test_no_log_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"no event log at .*nowhere; make one with `headrace import`"):
        open_log(tmp_path / "nowhere")


def test_a_log_without_events_says_what_to_do(tmp_path):
    EventLog(tmp_path).write(ITEMS, items("i1"), "x")
    with pytest.raises(ConfigError, match="has no events; import some"):
        open_log(tmp_path)
    EventLog(tmp_path).write(EVENTS, events(1), "x")
    assert open_log(tmp_path).root == str(tmp_path)
    with pytest.raises(ConfigError, match=r"no events before 2023-11-14T22:13:20"):
        open_log(tmp_path, START)


def test_items_that_only_events_name_are_there_but_not_to_be_recommended(tmp_path):
    log = EventLog(tmp_path)
    log.write(EVENTS, events(1, 2), "x")
    assert [(item.item_id, item.available) for item in read_items(log)] == [("i1", True), ("i2", True)]
    log.write(ITEMS, items("i2"), "x")
    described, bare = read_items(log)
    assert (described.item_id, described.title, described.HasField("available")) == ("i2", "I2", False)
    assert (bare.item_id, bare.HasField("available"), bare.available) == ("i1", True, False)


def test_known_items_keep_their_rows(tmp_path):
    log = EventLog(tmp_path)
    log.write(ITEMS, items("i1", "i2", "i3"), "x")
    before = [Item(item_id="gone"), Item(item_id="i3")]
    after = with_new_items(before, log)
    assert [item.item_id for item in after] == ["gone", "i3", "i1", "i2"]
    assert after[1].title == "I3"


def test_the_fingerprint_is_of_the_content(tmp_path):
    one, two = EventLog(tmp_path / "one"), EventLog(tmp_path / "two")
    one.write(EVENTS, events(1, 2, 3, 4), "x")
    two.write(EVENTS, events(3, 4), "x")
    two.write(EVENTS, events(1, 2), "y")
    assert log_fingerprint(one) == log_fingerprint(two)
    early = log_fingerprint(one, START + 3)
    two.write(EVENTS, events(5), "z")
    assert log_fingerprint(one) != log_fingerprint(two)
    assert log_fingerprint(two, START + 3) == early
    two.write(ITEMS, items("i1"), "x")
    assert log_fingerprint(two, START + 3) != early
