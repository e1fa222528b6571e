"""Messages to changes, pure."""

import math

import pytest
from google.protobuf import json_format

from core.codec import from_ms
from core.errors import MalformedEventError
from core.settings import load_settings
from core.topics import Topics
from features.item_stats import ItemPartial
from features.windows import Outcome, UserState
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList
from streams.processor import RawMessage, apply, count, decode, try_decode

TOPICS = Topics()
SOURCES = {topic: number for number, topic in enumerate(TOPICS.user_keyed)}
NOW_MS = 1_700_000_000_000
FEATURES = load_settings().features


def event(**fields) -> Event:
    defaults = {"event_id": "e1", "user_id": "u", "item_id": "i", "kind": "click", "event_time": from_ms(NOW_MS)}
    return Event(**{**defaults, **fields})


def raw(message, *, topic=TOPICS.events, key=b"u", offset=0, headers=(), partition=0) -> RawMessage:
    value = message if isinstance(message, bytes | None) else message.SerializeToString()
    return RawMessage(topic, partition, offset, key, value, headers, NOW_MS)


def test_protobuf_and_json_say_the_same() -> None:
    message = event(value=3.5, categories=["a"])
    as_json = json_format.MessageToJson(message).encode()
    plain = decode(raw(message), TOPICS, SOURCES)
    from_json = decode(raw(as_json, headers=[("content-type", b"application/json")]), TOPICS, SOURCES)
    assert plain.event == from_json.event
    assert plain.event.position == (SOURCES[TOPICS.events], 0, 0)


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        (raw(b"\xff\xff\xff"), "value"),
        (raw(None), "value"),
        (raw(event(event_id="")), "event_id"),
        (raw(event(user_id="x" * 129), key=b"x" * 129), "user_id"),
        (raw(event(value=math.nan)), "value"),
        (raw(event(event_time=from_ms(1000))), "event_time"),
        (raw(event(event_time=from_ms(NOW_MS + 2 * 86_400_000))), "event_time"),
        (raw(event(), key=b"someone else"), "key"),
        (raw(event(), key=None), "key"),
        (raw(b"{", headers=[("content-type", b"application/json")]), "value"),
        (raw(b'{"userId": "\\ud800"}', headers=[("content-type", b"application/json")]), ""),
        (raw(ImpressionList(event_id="e", user_id="u", event_time=from_ms(NOW_MS)), topic=TOPICS.impressions),
         "impressions"),
    ],
    ids=["bytes", "tombstone", "no-id", "long-id", "nan", "1970", "future", "foreign-key", "no-key", "half-json",
         "half-a-character", "empty-list"],
)  # fmt: skip
def test_what_is_malformed_names_its_field_and_never_raises(broken, field) -> None:
    reason = try_decode(broken, TOPICS, SOURCES)
    assert isinstance(reason, str)
    assert reason.startswith(field)
    if field:
        with pytest.raises(MalformedEventError):
            decode(broken, TOPICS, SOURCES)


def test_a_duplicate_writes_the_user_and_counts_no_item() -> None:
    states = {"u": UserState()}
    batch = [decode(raw(event(), offset=n), TOPICS, SOURCES) for n in (5, 6)]
    changes = apply(batch, states, FEATURES)
    assert changes.outcomes == [Outcome.APPLIED, Outcome.DUPLICATE]
    assert changes.users == changes.dirty == {"u"}
    assert [len(events) for events in changes.items.values()] == [1]


def test_a_replay_changes_nothing_but_has_the_vector_looked_at() -> None:
    """Whoever wrote the row may have died before the vector was made."""
    states = {"u": UserState()}
    batch = [decode(raw(event(), offset=5), TOPICS, SOURCES)]
    apply(batch, states, FEATURES)
    changes = apply(batch, states, FEATURES)
    assert changes.outcomes == [Outcome.REPLAY]
    assert not changes.users
    assert not changes.items
    assert changes.dirty == {"u"}


def test_an_impression_list_counts_each_showing_once_and_makes_nobody_dirty() -> None:
    shown = ImpressionList(event_id="e", user_id="u", event_time=from_ms(NOW_MS))
    for item_id in ("a", "b", "a"):
        shown.impressions.add(item_id=item_id, propensity=1)
    received = decode(raw(shown, topic=TOPICS.impressions, offset=7), TOPICS, SOURCES)
    changes = apply([received], {"u": UserState()}, FEATURES)
    assert changes.users == {"u"}
    assert not changes.dirty
    partial = ItemPartial()
    assert count(partial, changes.items["a", 0], FEATURES)
    assert partial.kinds == {"impression": (2, 2.0)}
    assert not count(partial, changes.items["a", 0], FEATURES)
    assert partial.revision == 2


def test_feedback_and_events_have_positions_of_their_own() -> None:
    fed_back = Feedback(event_id="f", user_id="u", item_id="i", kind="click", event_time=from_ms(NOW_MS))
    batch = [
        decode(raw(event(), offset=9), TOPICS, SOURCES),
        decode(raw(fed_back, topic=TOPICS.feedback, offset=3), TOPICS, SOURCES),
    ]
    partial, states = ItemPartial(), {"u": UserState()}
    changes = apply(batch, states, FEATURES)
    count(partial, changes.items["i", 0], FEATURES)
    assert partial.revision == states["u"].revision == 2
    assert partial.offsets == {(SOURCES[TOPICS.events], 0): 9, (SOURCES[TOPICS.feedback], 0): 3}


def test_late_events_and_those_before_a_full_horizon_are_counted() -> None:
    features = FEATURES.model_copy(update={"history_length": 2, "duplicate_horizon": 3})
    times = [100, 200, 150, 300, 400, 500, 1]
    batch = [
        decode(raw(event(event_id=f"e{n}", event_time=from_ms(NOW_MS + ms)), offset=n), TOPICS, SOURCES)
        for n, ms in enumerate(times)
    ]
    changes = apply(batch, {"u": UserState()}, features)
    assert (changes.late, changes.outside_horizon) == (2, 1)
