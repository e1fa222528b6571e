"""The comparison of the crash test sees every kind of difference."""

from dataclasses import replace

import pytest

from benchmarks.stream_truth import (
    Logged,
    Place,
    SinglePass,
    letter_differences,
    log_differences,
    partial_differences,
    state_differences,
)
from core.codec import from_ms
from core.settings import load_settings
from core.topics import Topics
from features import item_stats, windows
from headrace.v1.events_pb2 import Event, Impression, ImpressionList

TOPICS = Topics()
SOURCES = {topic: number for number, topic in enumerate(TOPICS.user_keyed)}
NOW_MS = 1_700_000_000_000


def logged(offset: int, message, topic=TOPICS.events) -> Logged:
    return Logged(Place(topic, 2, offset), b"u", message.SerializeToString(), [])


@pytest.fixture
def truth() -> SinglePass:
    one = SinglePass(load_settings().features, TOPICS, SOURCES, lambda logged: logged.value == b"\xff")
    for offset, event_id in enumerate(["a", "b", "a"]):
        one.add(
            logged(
                offset,
                Event(
                    event_id=event_id, user_id="u", item_id="i", kind="click", categories=["c"],
                    event_time=from_ms(NOW_MS + offset),
                ),
            )
        )  # fmt: skip
    shown = [Impression(item_id="i", propensity=1.0), Impression(item_id="j", propensity=1.0)]
    listed = ImpressionList(event_id="s", user_id="u", event_time=from_ms(NOW_MS), impressions=shown)
    one.add(logged(0, listed, TOPICS.impressions))
    one.add(Logged(Place(TOPICS.events, 2, 3), b"u", b"\xff", []))
    return one


def test_one_pass_counts_each_event_once(truth) -> None:
    assert (truth.states["u"].revision, truth.states["u"].duplicate_count) == (2, 1)
    assert {key: partial.revision for key, partial in truth.partials.items()} == {("i", 2): 3, ("j", 2): 1}
    assert len(truth.valid) == 4
    assert list(truth.malformed) == [Place(TOPICS.events, 2, 3)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("revision", 3),
        ("offsets", {}),
        ("history", []),
        ("duplicate_count", 0),
        ("kinds", {"click": (2, 2.1)}),
        ("affinity", []),
        ("dwell_seconds", 0.1),
    ],
)
def test_every_difference_of_a_state_is_named(truth, field, value) -> None:
    state = windows.decode(windows.encode(truth.states["u"]))
    assert state_differences(state, truth.states["u"]) == []
    setattr(state, field, value)
    assert state_differences(state, truth.states["u"]) == [field]


def test_every_difference_of_a_partial_sum_is_named(truth) -> None:
    expected = truth.partials["i", 2]
    stored = item_stats.decode(item_stats.as_message("i", 2, expected, load_settings().features))
    assert partial_differences(stored, expected) == []
    within = [(landmark, total * (1 + 1e-12)) for landmark, total in expected.popularity]
    assert partial_differences(replace(stored, popularity=within), expected) == []
    beyond = [(landmark, total * (1 + 1e-7)) for landmark, total in expected.popularity]
    assert partial_differences(replace(stored, popularity=beyond), expected) == ["popularity"]
    assert partial_differences(item_stats.ItemPartial(), expected) == [
        "revision", "watermark_ms", "offsets", "kinds", "popularity",
    ]  # fmt: skip


def test_positions_of_the_log_are_counted(truth) -> None:
    first, *others = sorted(truth.valid)
    assert log_differences(sorted(truth.valid), truth.valid) == (0, 0, 0)
    assert log_differences([*others, others[0], Place("else", 0, 0)], truth.valid) == (1, 1, 1)
    assert first in truth.valid


def test_dead_letters_are_compared_by_place_and_bytes(truth) -> None:
    place = Place(TOPICS.events, 2, 3)
    assert letter_differences({place: (b"u", b"\xff")}, truth.malformed) == 0
    assert letter_differences({}, truth.malformed) == 1
    assert letter_differences({place: (b"u", b"\xfe")}, truth.malformed) == 1
    assert letter_differences({place: (b"u", b"\xff"), Place("x", 0, 0): (b"", b"")}, truth.malformed) == 1
