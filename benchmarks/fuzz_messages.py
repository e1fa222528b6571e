"""Ways to spoil a message of a user-keyed topic: each makes, of a good one, something that nobody should send.

The fuzzing load draws from `MAKERS` and `HUGE`. Invariant: `expected` is what the contract says of a message, where
the contract decides; nothing here asks the code that reads them.
"""

import random
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from google.protobuf import json_format

from core import codec
from core.topics import CONTENT_TYPE, JSON_CONTENT
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList, Item

Message = Event | Feedback | ImpressionList
Headers = tuple[tuple[str, bytes | None], ...]

_HUGE_BYTES = 2_000_000
# Below the contract's limit for a value.
_LARGE_BYTES = 900_000
LONG_ID_CHARS = 10_240
JSON_HEADER: Headers = ((CONTENT_TYPE, JSON_CONTENT),)

# Ids that are allowed, and unpleasant.
STRANGE_IDS = (
    "' OR 1=1 --",
    "../../etc/passwd",
    "{{7*7}}${7*7}%s%n",
    "line\nbreak\r\ttab",
    " ",
    "\u202eright to left\u202c",
    "\u200b\u200d\ufeffzero width",
    "Z\u0335\u0321a\u0334l\u0338g\u0337o\u0336",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0010ffff\ufffe\uffff",
    "\x7f\x1b[31mred\x07",
    "\u0130\u0131\u00df\ufb03",
    "\u1100\u1161\u11a8",
    "user:{7}:*?[a]",
    "0",
    "null",
    "-1e999",
    "\U0001f9ff" * codec.MAX_ID_CHARS,
    "x" * codec.MAX_ID_CHARS,
    "\U000e0001\U000e007f",
)


class Expected(StrEnum):
    """What the contract says of a message."""

    PROCESSED = "processed"
    DEAD_LETTER = "dead letter"
    EITHER = "either"


class Made(NamedTuple):
    """What a maker of bad messages makes."""

    value: bytes | None
    expected: Expected
    headers: Headers = ()
    # None is the user's.
    key: bytes | None = None
    keyless: bool = False


Make = Callable[[Message, random.Random], Made]


def _letter(message: Message) -> Made:
    return Made(message.SerializeToString(), Expected.DEAD_LETTER)


def _fine(message: Message, key: str | None = None) -> Made:
    return Made(message.SerializeToString(), Expected.PROCESSED, key=None if key is None else key.encode())


# --- bytes ---


def _noise(message: Message, draw: random.Random) -> Made:  # noqa: ARG001 - one signature for all
    return Made(draw.randbytes(draw.randrange(0, 2000)), Expected.EITHER)


def _cut(message: Message, draw: random.Random) -> Made:
    value = message.SerializeToString()
    # What is left may be a message of its own.
    return Made(value[: draw.randrange(1, len(value))], Expected.EITHER)


def _flipped(message: Message, draw: random.Random) -> Made:
    value = bytearray(message.SerializeToString())
    for _ in range(draw.randrange(1, 6)):
        value[draw.randrange(len(value))] ^= 1 << draw.randrange(8)
    return Made(bytes(value), Expected.EITHER)


def _other_type(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    return Made(Item(item_id=message.user_id, title="not here", price=1.5).SerializeToString(), Expected.DEAD_LETTER)


def _wrong_wire_type(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    # Field 2 (user_id) as a number: unknown to the parser, so the id is missing.
    value = type(message)(event_id=message.event_id).SerializeToString() + b"\x10\x07"
    return Made(value, Expected.DEAD_LETTER)


def _not_utf8(message: Message, draw: random.Random) -> Made:
    user = message.user_id.encode() + bytes([draw.choice((0xC0, 0xED, 0xFF))])
    return Made(b"\x12" + bytes([len(user)]) + user, Expected.DEAD_LETTER, key=user)


def _unknown_fields(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    # Field 999, of a later version of the contract.
    return Made(message.SerializeToString() + b"\xba\x3e\x03new", Expected.PROCESSED)


def _fields_twice(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    # The last one counts: the user is the one of the key.
    return Made(b"\x12\x03abc" + message.SerializeToString(), Expected.PROCESSED)


def _nothing(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    return Made(draw.choice((b"", None)), Expected.DEAD_LETTER)


_BYTES: dict[str, Make] = {
    "noise": _noise,
    "cut short": _cut,
    "bits flipped": _flipped,
    "another type": _other_type,
    "wrong wire type": _wrong_wire_type,
    "not UTF-8": _not_utf8,
    "unknown fields": _unknown_fields,
    "fields twice": _fields_twice,
    "nothing": _nothing,
}


# --- fields ---


def _id_missing(message: Message, draw: random.Random) -> Made:
    message.ClearField(draw.choice(("event_id", "user_id")))
    return Made(message.SerializeToString(), Expected.DEAD_LETTER)


def _id_long(message: Message, draw: random.Random) -> Made:
    which = draw.choice(("event_id", "user_id"))
    setattr(message, which, draw.choice("x\u00e9\U0001f9ff") * LONG_ID_CHARS)
    return Made(message.SerializeToString(), Expected.DEAD_LETTER, key=message.user_id.encode())


def _id_nul(message: Message, draw: random.Random) -> Made:
    message.event_id = f"a\0{draw.random()}"
    return _letter(message)


def _id_strange(message: Message, draw: random.Random) -> Made:
    message.user_id = draw.choice(STRANGE_IDS)
    return _fine(message, message.user_id)


def _item_strange(message: Message, draw: random.Random) -> Made:
    if isinstance(message, ImpressionList):
        message.impressions[0].item_id = draw.choice(STRANGE_IDS)
    else:
        message.item_id = draw.choice(STRANGE_IDS)
        message.categories.append(draw.choice(STRANGE_IDS))
    return _fine(message)


def _no_number(message: Message, draw: random.Random) -> Made:
    bad = draw.choice((float("nan"), float("inf"), float("-inf")))
    if isinstance(message, ImpressionList):
        message.impressions[0].propensity = bad
    elif draw.random() < 0.5:
        message.value = bad
    else:
        message.confidence = bad
    return _letter(message)


def _number_large(message: Message, draw: random.Random) -> Made:
    if isinstance(message, ImpressionList):
        message.impressions[0].position = 2**31 - 1
        message.impressions[0].score = draw.choice((1e308, -1e308, float("nan")))
        return _fine(message)
    message.value = draw.choice((1e308, -1e308, 5e-324, -0.0))
    # Sums of such values would not be numbers.
    return _letter(message) if abs(message.value) > 1 else _fine(message)


def _time_wrong(message: Message, draw: random.Random) -> Made:
    # 1970, 2100 and beyond, seconds that were milliseconds, and the ends of the type.
    message.event_time.seconds = draw.choice((0, 1, 4_102_444_801, 1_780_000_000_000, -1, 2**63 - 1, -(2**63)))
    return _letter(message)


def _nanos_wrong(message: Message, draw: random.Random) -> Made:
    message.event_time.nanos = draw.choice((-1, 2**31 - 1, -(2**31)))
    return Made(message.SerializeToString(), Expected.EITHER)


def _time_missing(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    message.ClearField("event_time")
    return _letter(message)


def _too_many(message: Message, draw: random.Random) -> Made:
    count = draw.randrange(codec.MAX_IMPRESSIONS + 1, 2 * codec.MAX_IMPRESSIONS)
    if isinstance(message, ImpressionList):
        for _ in range(count):
            message.impressions.add(item_id="item", propensity=1.0)
    else:
        message.categories.extend(f"category-{number}" for number in range(count))
    return _letter(message)


_FIELDS: dict[str, Make] = {
    "id missing": _id_missing,
    "id of 10 KB": _id_long,
    "id with NUL": _id_nul,
    "strange user id": _id_strange,
    "strange item id": _item_strange,
    "NaN or infinite": _no_number,
    "huge number": _number_large,
    "time of 1970 or 2100": _time_wrong,
    "nanos out of range": _nanos_wrong,
    "time missing": _time_missing,
    "too many": _too_many,
}


# --- JSON ---


def _json(message: Message, draw: random.Random) -> Made:
    as_written = draw.random() < 0.5
    text = json_format.MessageToJson(message, preserving_proto_field_name=as_written)
    return Made(text.encode(), Expected.PROCESSED, JSON_HEADER)


def _json_broken(message: Message, draw: random.Random) -> Made:
    text = json_format.MessageToJson(message).encode().rstrip()
    return Made(text[: draw.randrange(len(text))], Expected.DEAD_LETTER, JSON_HEADER)


def _json_twice(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    text = json_format.MessageToJson(message).lstrip("{")
    return Made(('{"eventId": "first",' + text).encode(), Expected.DEAD_LETTER, JSON_HEADER)


_JSON_TEXTS = (
    b'{"userId": "\\ud800"}',
    b'{"userId": "\\udfff\\ud800", "eventId": "e"}',
    b'{"value": NaN, "eventId": "e"}',
    b'{"value": 1e999, "eventId": "e"}',
    b'{"value": ' + b"9" * 5000 + b"}",
    b'{"tags": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"unknown": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
    b'{"eventTime": "the day before yesterday"}',
    b'{"eventTime": 1780000000000}',
    b'{"userId": 7, "eventId": {}, "itemId": []}',
    b'{"categories": {"a": 1}}',
    b"[]",
    b"null",
    b"true",
    b'"text"',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
    b"\x00",
    b"{}",
)


def _json_hostile(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    return Made(draw.choice(_JSON_TEXTS), Expected.DEAD_LETTER, JSON_HEADER)


def _json_unannounced(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    return Made(json_format.MessageToJson(message).encode(), Expected.DEAD_LETTER)


def _json_announced(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    return Made(message.SerializeToString(), Expected.DEAD_LETTER, JSON_HEADER)


_JSON: dict[str, Make] = {
    "JSON": _json,
    "broken JSON": _json_broken,
    "JSON keys twice": _json_twice,
    "hostile JSON": _json_hostile,
    "JSON without the header": _json_unannounced,
    "the header without JSON": _json_announced,
}


# --- keys and headers ---


def _key_foreign(message: Message, draw: random.Random) -> Made:
    key = draw.choice((b"someone-else", message.user_id.encode() + b" ", b"\xff\xfe\x00", b"k" * 10_240))
    return Made(message.SerializeToString(), Expected.DEAD_LETTER, key=key)


def _key_missing(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    return Made(message.SerializeToString(), Expected.DEAD_LETTER, keyless=True)


def _headers_strange(message: Message, draw: random.Random) -> Made:
    headers = draw.choice(
        (
            ((CONTENT_TYPE, None),),
            ((CONTENT_TYPE, b"\xff\xfe"), ("\u202e\U0001f9ff", b"\x00" * 100), ("", b"")),
            tuple((f"h{number}", b"v" * 100) for number in range(500)),
            (("same", b"1"), ("same", b"2"), ("same", None)),
        )
    )
    return Made(message.SerializeToString(), Expected.PROCESSED, headers)


_ENVELOPES: dict[str, Make] = {
    "foreign key": _key_foreign,
    "no key": _key_missing,
    "strange headers": _headers_strange,
}


# --- megabytes ---


def _huge_valid(message: Message, draw: random.Random) -> Made:
    message.tags["note"] = "x" * (_HUGE_BYTES + draw.randrange(1000))
    return _letter(message)


def _huge_noise(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    return Made(draw.randbytes(_HUGE_BYTES), Expected.DEAD_LETTER)


def _huge_header(message: Message, draw: random.Random) -> Made:  # noqa: ARG001
    return Made(b"\xff\xff", Expected.DEAD_LETTER, (("note", b"x" * _HUGE_BYTES),))


def _large_valid(message: Message, draw: random.Random) -> Made:
    message.tags["note"] = "x" * (_LARGE_BYTES + draw.randrange(1000))
    return _fine(message)


HUGE: dict[str, Make] = {
    "2 MB": _huge_valid,
    "2 MB of noise": _huge_noise,
    "a header of 2 MB": _huge_header,
    "900 KB, valid": _large_valid,
}


MAKERS: dict[str, Make] = {**_BYTES, **_FIELDS, **_JSON, **_ENVELOPES}
