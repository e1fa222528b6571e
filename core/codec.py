"""Topic values to checked messages and back: protobuf, or JSON where the header says so.

Every consumer and producer goes through here. Invariant: what `decode_*` returns satisfies the limits below; what
does not raises MalformedEventError naming the field. Protobuf keeps fields that this version does not know.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from core.errors import MalformedEventError
from core.topics import CONTENT_TYPE, JSON_CONTENT
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList, Item, User

MAX_ID_CHARS = 128
MAX_KIND_CHARS = 64
MAX_VALUE_BYTES = 1_000_000
MAX_TEXT_CHARS = 20_000
MAX_CATEGORIES = 64
MAX_TAGS = 64
MAX_VECTOR_VALUES = 4096
MAX_IMPRESSIONS = 500
# What an event's value may measure: sums of it, also in single precision, stay finite.
MAX_NUMBER = 1e15
# 1971-01-01 and 2100-01-01: outside, a clock was not set or a unit was mistaken.
MIN_TIME_MS = 31_536_000_000
MAX_TIME_MS = 4_102_444_800_000
# The span of google.protobuf.Timestamp, which JSON holds to and protobuf does not; its earlier end lies nearer.
MAX_ITEM_TIME_SECONDS = 253_402_300_799
# An event may be this far ahead of the time at which the broker got it (clock skew), not more.
MAX_AHEAD_MS = 86_400_000

_UINT64 = 2**64 - 1

Headers = Iterable[tuple[str, bytes | None]] | None
M = TypeVar("M", bound=Message)


def decode(message: M, value: bytes | None, headers: Headers = None) -> M:
    """Parses `value` into `message` (empty, of the topic's type) and returns it."""
    if value is None:
        raise MalformedEventError("value", "empty; a tombstone is allowed on the items and users topics only")
    check_size(len(value))
    try:
        if is_json(headers):
            json_format.Parse(value, message, ignore_unknown_fields=True)
        else:
            message.ParseFromString(value)
    except (DecodeError, json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        kind = "JSON" if is_json(headers) else "protobuf"
        raise MalformedEventError("value", f"not {kind} of {type(message).__name__}: {_line(error)}") from error
    return message


def check_size(size_bytes: int) -> None:
    if size_bytes > MAX_VALUE_BYTES:
        raise MalformedEventError("value", f"{size_bytes} bytes, the limit is {MAX_VALUE_BYTES}")


def is_json(headers: Headers) -> bool:
    if not headers:
        return False
    return any(name == CONTENT_TYPE and (content or b"").startswith(JSON_CONTENT) for name, content in headers)


def check_event(event: Event | Feedback, broker_time_ms: int | None = None) -> None:
    """Raises MalformedEventError where a field is missing or out of its limits."""
    check_id("event_id", event.event_id)
    check_id("user_id", event.user_id)
    check_id("item_id", event.item_id)
    check_kind(event.kind)
    if len(event.segment) > MAX_KIND_CHARS:
        raise MalformedEventError("segment", f"at most {MAX_KIND_CHARS} characters")
    check_time("event_time", event.HasField("event_time"), event.event_time, broker_time_ms)
    if event.HasField("value") and not abs(event.value) <= MAX_NUMBER:
        raise MalformedEventError("value", f"must be a number within {MAX_NUMBER:g}")
    if event.HasField("confidence") and not 0.0 <= event.confidence <= 1.0:
        raise MalformedEventError("confidence", "must be in 0..1")
    if len(event.categories) > MAX_CATEGORIES:
        raise MalformedEventError("categories", f"at most {MAX_CATEGORIES}")
    if len(event.tags) > MAX_TAGS:
        raise MalformedEventError("tags", f"at most {MAX_TAGS}")


def check_impressions(shown: ImpressionList, broker_time_ms: int | None = None) -> None:
    check_id("event_id", shown.event_id)
    check_id("user_id", shown.user_id)
    check_time("event_time", shown.HasField("event_time"), shown.event_time, broker_time_ms)
    if not 1 <= len(shown.impressions) <= MAX_IMPRESSIONS:
        raise MalformedEventError("impressions", f"1..{MAX_IMPRESSIONS} items are needed")
    for index, impression in enumerate(shown.impressions):
        check_id(f"impressions[{index}].item_id", impression.item_id)
        if not 0.0 <= impression.propensity <= 1.0:
            raise MalformedEventError(f"impressions[{index}].propensity", "must be in 0..1")


def check_item(item: Item) -> None:
    check_id("item_id", item.item_id)
    if len(item.title) + len(item.text) > MAX_TEXT_CHARS:
        raise MalformedEventError("text", f"title and text together at most {MAX_TEXT_CHARS} characters")
    if len(item.categories) > MAX_CATEGORIES:
        raise MalformedEventError("categories", f"at most {MAX_CATEGORIES}")
    if item.HasField("price") and not math.isfinite(item.price):
        raise MalformedEventError("price", "must be a finite number")
    for field in ("publish_time", "expire_time", "update_time"):
        check_calendar(field, getattr(item, field))
    for name, number in item.numbers.items():
        if not math.isfinite(number):
            raise MalformedEventError(f"numbers.{name}", "must be a finite number")
    for name, vector in item.vectors.items():
        if len(vector.values) > MAX_VECTOR_VALUES or not all(map(math.isfinite, vector.values)):
            raise MalformedEventError(f"vectors.{name}", f"at most {MAX_VECTOR_VALUES} finite numbers")


def check_user(user: User) -> None:
    check_id("user_id", user.user_id)
    for index, preference in enumerate(user.preferences):
        if not -1.0 <= preference.weight <= 1.0:
            raise MalformedEventError(f"preferences[{index}].weight", "must be in -1..1")
    for name, number in user.numbers.items():
        if not math.isfinite(number):
            raise MalformedEventError(f"numbers.{name}", "must be a finite number")
    check_calendar("update_time", user.update_time)


def check_key(key: bytes | None, expected: str, field: str) -> None:
    """A message under a foreign key would sit in a foreign partition, where its order means nothing."""
    if key is None or key != expected.encode():
        raise MalformedEventError("key", f"must be the {field} in UTF-8")


def check_id(field: str, text: str) -> None:
    if not text:
        raise MalformedEventError(field, "must not be empty")
    if len(text) > MAX_ID_CHARS:
        raise MalformedEventError(field, f"{len(text)} characters, the limit is {MAX_ID_CHARS}")
    if "\0" in text:
        raise MalformedEventError(field, "must not contain a NUL character")


def check_kind(kind: str) -> None:
    if not kind or len(kind) > MAX_KIND_CHARS:
        raise MalformedEventError("kind", f"1..{MAX_KIND_CHARS} characters are needed, as in click or purchase")


def check_time(field: str, present: bool, time: Timestamp, broker_time_ms: int | None) -> None:
    if not present:
        raise MalformedEventError(field, "is required")
    time_ms = to_ms(time)
    if not MIN_TIME_MS <= time_ms <= MAX_TIME_MS:
        raise MalformedEventError(field, "is not between 1971 and 2100; is the unit right?")
    if broker_time_ms is not None and broker_time_ms > 0 and time_ms > broker_time_ms + MAX_AHEAD_MS:
        raise MalformedEventError(field, "is more than a day after the broker received it")


def check_calendar(field: str, time: Timestamp) -> None:
    """Old works and far ends are fine; what no calendar has would not fit a column."""
    if abs(time.seconds) > MAX_ITEM_TIME_SECONDS:
        raise MalformedEventError(field, "is outside the years 1 to 9999; is the unit right?")


def to_ms(time: Timestamp) -> int:
    """Milliseconds since the epoch."""
    return time.seconds * 1000 + time.nanos // 1_000_000


def from_ms(time_ms: int) -> Timestamp:
    return Timestamp(seconds=time_ms // 1000, nanos=time_ms % 1000 * 1_000_000)


def varint(number: int) -> bytes:
    """Protobuf's encoding of an integer of at most 64 bits: seven bits a byte, the lowest first."""
    if 0 <= number < 0x200000:
        # Lengths, counts and offsets: most that there is.
        if number < 0x80:
            return bytes((number,))
        if number < 0x4000:
            return bytes((number & 0x7F | 0x80, number >> 7))
        return bytes((number & 0x7F | 0x80, number >> 7 & 0x7F | 0x80, number >> 14))
    number &= _UINT64
    raw = bytearray()
    while number >= 0x80:
        raw.append(number & 0x7F | 0x80)
        number >>= 7
    raw.append(number)
    return bytes(raw)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


CHECKS: dict[type[Message], Callable[..., None]] = {
    Event: check_event,
    Feedback: check_event,
    ImpressionList: check_impressions,
    Item: check_item,
    User: check_user,
}
