"""Messages that nobody should send, between good ones, on all inbound topics.

Pure: the same arguments give the same messages, in the same order. The fuzzing test produces them. Invariant: what
`expected` says comes from the contract alone; nothing here asks the code that reads the messages.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.fuzz_messages import HUGE, JSON_HEADER, LONG_ID_CHARS, MAKERS, STRANGE_IDS, Expected, Headers, Make
from benchmarks.stream_load import LoadConfig, Sent, StreamLoad
from core import codec
from core.topics import Topics
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList, Item, User

_TYPES: tuple[type[Event] | type[Feedback] | type[ImpressionList], ...] = (Event, Feedback, ImpressionList)
_GOOD_SHARE = 0.4
_PROFILE_SHARE = 0.1
# One in so many: they are megabytes each.
_ONE_HUGE_IN = 2000
_PROFILES = 200
# Not the users and items of the events: a user's tombstone is meant to erase them.
PROFILE_PREFIX = "profile-"


class Fuzzed(NamedTuple):
    """One message, and what it is."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    what: str
    expected: Expected


@dataclass(frozen=True)
class FuzzConfig:
    """How much of it."""

    messages: int
    users: int = 500
    seed: int = 7


class FuzzLoad:
    """The messages.

    Args:
        config: how many.
        topics: names of the topics.
        items: the catalogue that good messages are about.
    """

    def __init__(self, config: FuzzConfig, topics: Topics, items: Sequence[Item]) -> None:
        self._config, self._topics, self._items = config, topics, list(items)
        self._random = random.Random(config.seed)
        load = LoadConfig(config.messages, config.users, config.seed, zipf=0.0, malformed_share=0.0)
        self._good = iter(StreamLoad(load, topics, items))
        self._types = dict(zip(topics.user_keyed, _TYPES, strict=True))

    @property
    def user_ids(self) -> list[str]:
        """All users that any valid message may be about."""
        return [*(f"user-{number}" for number in range(self._config.users)), *STRANGE_IDS]

    def __iter__(self) -> Iterator[Fuzzed]:
        bad, huge = list(MAKERS.items()), list(HUGE.items())
        for number in range(self._config.messages):
            draw, good = self._random.random(), next(self._good)
            if number % _ONE_HUGE_IN == _ONE_HUGE_IN // 2:
                yield self._of(good, *self._random.choice(huge))
            elif draw < _GOOD_SHARE:
                yield _as_fuzzed(good, "good", Expected.PROCESSED)
            elif draw < _GOOD_SHARE + _PROFILE_SHARE:
                yield self._profile()
            else:
                yield self._of(good, *self._random.choice(bad))

    def _of(self, good: Sent, what: str, make: Make) -> Fuzzed:
        message = codec.decode(self._types[good.topic](), good.value, good.headers.items())
        made = make(message, self._random)
        key = None if made.keyless else good.key if made.key is None else made.key
        return Fuzzed(good.topic, key, made.value, made.headers, what, made.expected)

    def _profile(self) -> Fuzzed:
        """Something for the items or the users topic."""
        draw = self._random
        profile_id = f"{PROFILE_PREFIX}{draw.randrange(_PROFILES)}"
        key, which = profile_id.encode(), draw.random()
        if draw.random() < 0.5:
            topic = self._topics.items
            item = Item(item_id=profile_id, title="A title", categories=["a"], price=9.5)
            good, bad = item.SerializeToString(), _spoilt_item(item, draw)
        else:
            topic = self._topics.users
            user = User(user_id=profile_id, segment="a", labels={"country": "it"})
            good, bad = user.SerializeToString(), _spoilt_user(user, draw)
        if which < 0.4:
            return Fuzzed(topic, key, good, (), "good profile", Expected.PROCESSED)
        if which < 0.5:
            return Fuzzed(topic, key, None, (), "tombstone", Expected.PROCESSED)
        if which < 0.6:
            return Fuzzed(topic, key, draw.randbytes(draw.randrange(1, 300)), (), "profile noise", Expected.EITHER)
        if which < 0.7:
            return Fuzzed(topic, b"\xff" + key, None, (), "tombstone of no text", Expected.DEAD_LETTER)
        if which < 0.8:
            return Fuzzed(topic, key, b'{"item_id": [', JSON_HEADER, "profile of broken JSON", Expected.DEAD_LETTER)
        return Fuzzed(topic, key, bad, (), "profile out of limits", Expected.DEAD_LETTER)


def _spoilt_item(item: Item, draw: random.Random) -> bytes:
    which = draw.randrange(5)
    if which == 0:
        item.price = float("nan")
    elif which == 1:
        item.text = "x" * (codec.MAX_TEXT_CHARS + 1)
    elif which == 2:
        item.vectors["image"].values.extend((1.0, float("inf")))
    elif which == 3:
        item.update_time.seconds = draw.choice((2**63 - 1, -(2**63)))
    else:
        item.item_id = "x" * LONG_ID_CHARS
    return item.SerializeToString()


def _spoilt_user(user: User, draw: random.Random) -> bytes:
    which = draw.randrange(4)
    if which == 0:
        user.preferences.add(category="a", weight=float("nan"))
    elif which == 1:
        user.numbers["age"] = float("nan")
    elif which == 2:
        user.update_time.seconds = 2**63 - 1
    else:
        user.user_id = "x" * LONG_ID_CHARS
    return user.SerializeToString()


def _as_fuzzed(sent: Sent, what: str, expected: Expected) -> Fuzzed:
    return Fuzzed(sent.topic, sent.key, sent.value, tuple(sent.headers.items()), what, expected)
