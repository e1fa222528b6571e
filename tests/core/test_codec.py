"""What comes in from a topic is a checked message, or an error that names the field."""

import json

import pytest
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import UInt64Value
from hypothesis import given
from hypothesis import strategies as st

from core import codec
from core.codec import varint
from core.errors import MalformedEventError
from features import windows
from headrace.v1.events_pb2 import Event, Feedback, Impression, ImpressionList, Item, User

NOW_MS = 1_700_000_000_000
JSON = [("content-type", b"application/json")]


def event(**changes) -> Event:
    fields = {"event_id": "e1", "user_id": "u1", "item_id": "i1", "kind": "click", "event_time": codec.from_ms(NOW_MS)}
    return Event(**{**fields, **changes})


def test_protobuf_and_json_of_the_same_event_are_equal() -> None:
    original = event(value=4.5, tags={"page": "home"})
    as_json = json_format.MessageToJson(original).encode()
    assert codec.decode(Event(), original.SerializeToString()) == original
    assert codec.decode(Event(), as_json, JSON) == original


OF_EACH_TOPIC = [
    event(value=2.0),
    Feedback(event_id="f1", user_id="u1", item_id="i1", kind="like", recommendation_id="r1"),
    ImpressionList(event_id="l1", user_id="u1", impressions=[Impression(item_id="i1", propensity=0.5)]),
    Item(item_id="i1", title="An item", price=3.5, categories=["a"], labels={"city": "Bern"}),
    User(user_id="u1", segment="anglers", numbers={"age": 33}),
]
each_topic = pytest.mark.parametrize("message", OF_EACH_TOPIC, ids=lambda message: type(message).__name__)


@each_topic
def test_fields_of_a_later_version_are_kept(message) -> None:
    later = message.SerializeToString() + b"\xa2\x06\x03new"
    read = codec.decode(type(message)(), later)
    assert read.SerializeToString() == later
    assert json_format.MessageToDict(read) == json_format.MessageToDict(message)


@each_topic
def test_json_says_the_same_and_its_fields_of_a_later_version_do_not_hurt(message) -> None:
    as_json = json_format.MessageToDict(message) | {"ofTheFuture": {"a": [1]}}
    assert codec.decode(type(message)(), json.dumps(as_json).encode(), JSON) == message


@each_topic
def test_fields_that_an_earlier_version_did_not_send_have_their_defaults(message) -> None:
    """An early producer: nothing but the ids."""
    ids = {name: getattr(message, name) for name in ("event_id", "user_id", "item_id") if hasattr(message, name)}
    early = type(message)(**ids)
    assert codec.decode(type(message)(), early.SerializeToString()) == early
    if isinstance(message, Event):
        seen = windows.as_user_event(early)
        assert (seen.value, seen.confidence, seen.categories, seen.segment) == (1.0, 1.0, (), "")
    if isinstance(message, Item):
        codec.check_item(early)
    if isinstance(message, User):
        codec.check_user(early)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"event_id": ""}, "event_id"),
        ({"user_id": "x" * 129}, "user_id"),
        ({"item_id": "a\0b"}, "item_id"),
        ({"kind": ""}, "kind"),
        ({"event_time": None}, "event_time"),
        ({"event_time": codec.from_ms(0)}, "event_time"),
        ({"event_time": codec.from_ms(4_200_000_000_000)}, "event_time"),
        ({"event_time": codec.from_ms(NOW_MS + 2 * 86_400_000)}, "event_time"),
        ({"value": float("nan")}, "value"),
        ({"confidence": 1.5}, "confidence"),
        ({"tags": {str(n): "x" for n in range(65)}}, "tags"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_field_out_of_its_limits_is_named(changes, field) -> None:
    with pytest.raises(MalformedEventError) as caught:
        codec.check_event(event(**changes), broker_time_ms=NOW_MS)
    assert caught.value.field == field


def test_a_good_event_passes_also_when_it_is_old() -> None:
    codec.check_event(event(event_time=codec.from_ms(874_724_710_000)), broker_time_ms=NOW_MS)


def test_impressions_are_checked_one_by_one() -> None:
    shown = ImpressionList(
        event_id="e", user_id="u", event_time=codec.from_ms(NOW_MS), impressions=[Impression(item_id="")]
    )
    with pytest.raises(MalformedEventError, match=r"impressions\[0\]\.item_id"):
        codec.check_impressions(shown)


def test_an_item_with_infinite_price_is_refused() -> None:
    with pytest.raises(MalformedEventError, match="price"):
        codec.check_item(Item(item_id="i", price=float("inf")))


@pytest.mark.parametrize("value", [1e308, -1e308, float("nan"), float("inf")])
def test_a_value_whose_sums_would_not_be_numbers_is_refused(value) -> None:
    codec.check_event(event(value=-1e15))
    with pytest.raises(MalformedEventError, match="value"):
        codec.check_event(event(value=value))


def test_a_users_numbers_and_times_must_fit_their_columns() -> None:
    codec.check_user(User(user_id="u", numbers={"age": 33}, update_time=codec.from_ms(NOW_MS)))
    with pytest.raises(MalformedEventError, match=r"numbers\.age"):
        codec.check_user(User(user_id="u", numbers={"age": float("nan")}))
    with pytest.raises(MalformedEventError, match="update_time"):
        codec.check_user(User(user_id="u", update_time=Timestamp(seconds=2**62)))


@pytest.mark.parametrize("field", ["publish_time", "expire_time", "update_time"])
def test_an_item_time_that_no_calendar_has_is_refused(field) -> None:
    codec.check_item(Item(item_id="i", **{field: Timestamp(seconds=-2_000_000_000)}))
    for seconds in (2**62, -(2**62)):
        with pytest.raises(MalformedEventError, match=field):
            codec.check_item(Item(item_id="i", **{field: Timestamp(seconds=seconds)}))


def test_a_key_that_is_not_the_users_is_refused() -> None:
    codec.check_key(b"u1", "u1", "user_id")
    with pytest.raises(MalformedEventError, match="key"):
        codec.check_key(b"u2", "u1", "user_id")


@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_give_a_message_or_the_one_error(value, as_json) -> None:
    try:
        message = codec.decode(Event(), value, JSON if as_json else None)
        codec.check_event(message, NOW_MS)
    except MalformedEventError as error:
        assert str(error)


def test_a_value_that_is_too_large_is_not_parsed() -> None:
    with pytest.raises(MalformedEventError, match="limit"):
        codec.decode(Event(), b"x" * (codec.MAX_VALUE_BYTES + 1))


@given(st.integers(codec.MIN_TIME_MS, codec.MAX_TIME_MS))
def test_times_survive_to_the_millisecond(time_ms) -> None:
    assert codec.to_ms(codec.from_ms(time_ms)) == time_ms


@pytest.mark.parametrize("bits", range(65))
def test_a_varint_is_what_protobuf_writes(bits) -> None:
    for number in {max(0, 2**bits - 2), max(0, 2**bits - 1), min(2**bits, 2**64 - 1), min(2**bits + 1, 2**64 - 1)}:
        assert UInt64Value.FromString(b"\x08" + varint(number)).value == number
        assert varint(number) == UInt64Value(value=number).SerializeToString()[1:] or number == 0
