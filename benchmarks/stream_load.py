"""A stream of messages with everything that goes wrong in life: duplicates, late events, broken messages.

Pure: the same arguments give the same messages, in the same order. The crash test and the fuzzing tests produce them.
Invariant: `malformed` names exactly the messages that no reader can process, by what was sent; all others are valid.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from google.protobuf import json_format

from core.codec import from_ms
from core.topics import CONTENT_TYPE, JSON_CONTENT, Topics
from headrace.v1.events_pb2 import Event, Feedback, Impression, ImpressionList, Item

KINDS = ("view", "view", "view", "click", "click", "like", "rating", "cart", "purchase", "dwell", "skip", "wave")
_VALUED = frozenset(("rating", "purchase", "dwell"))
HOUR_MS = 3_600_000
# Event time between two messages.
_STEP_MS = 20
# A duplicate repeats one of this many messages before it.
_DUPLICATE_REACH = 2000
_JSON_SHARE = 0.2
_SHOWN_ITEMS = 6
_SEGMENTS = ("", "anglers", "campers")
# Order is kept within a topic only. Users with feedback and impressions stay below the duplicate horizon, where the
# order of topics makes no difference; the busiest users, far beyond it, have events alone.
_MIXED_EVENTS_MAX = 100

Message = Event | Feedback | ImpressionList


class Sent(NamedTuple):
    """One message as a producer sends it."""

    topic: str
    key: bytes
    value: bytes | None
    headers: Mapping[str, bytes]


# What tells a malformed message from all others: topic, key, value.
Identity = tuple[str, bytes | None, bytes | None]


@dataclass(frozen=True)
class LoadConfig:
    """What to send."""

    messages: int
    users: int
    seed: int = 7
    zipf: float = 1.1
    duplicate_share: float = 0.05
    late_share: float = 0.10
    late_ms: int = HOUR_MS
    malformed_share: float = 0.005
    start_ms: int = 1_780_000_000_000


class StreamLoad:
    """The messages, and which of them are malformed.

    Args:
        config: what to send.
        topics: names of the topics.
        items: the catalogue that users act on.
    """

    def __init__(self, config: LoadConfig, topics: Topics, items: Sequence[Item]) -> None:
        self.config = config
        self.malformed: set[Identity] = set()
        self._topics = topics
        self._items = list(items)
        self._random = random.Random(config.seed)
        weights = [(rank + 1) ** -config.zipf for rank in range(config.users)]
        self._user_weights = list(accumulate(weights))
        busiest = [weight * config.messages / self._user_weights[-1] for weight in weights]
        self._mixed = [expected <= _MIXED_EVENTS_MAX for expected in busiest]
        self._recent: deque[Sent] = deque(maxlen=_DUPLICATE_REACH)

    def __iter__(self) -> Iterator[Sent]:
        config = self.config
        for number in range(config.messages):
            draw = self._random.random()
            if draw < config.malformed_share:
                sent = self._broken(number)
                self.malformed.add((sent.topic, sent.key, sent.value))
            elif draw < config.malformed_share + config.duplicate_share and self._recent:
                sent = self._random.choice(self._recent)
            else:
                sent = self._valid(number)
                self._recent.append(sent)
            yield sent

    def _valid(self, number: int) -> Sent:
        message = self._message(number)
        key = message.user_id.encode()
        if self._random.random() < _JSON_SHARE:
            return Sent(
                self._topic(message), key, json_format.MessageToJson(message).encode(), {CONTENT_TYPE: JSON_CONTENT}
            )
        return Sent(self._topic(message), key, message.SerializeToString(), {})

    def _message(self, number: int) -> Message:
        draw, config = self._random, self.config
        (user,) = draw.choices(range(config.users), cum_weights=self._user_weights)
        time_ms = config.start_ms + number * _STEP_MS
        if draw.random() < config.late_share:
            time_ms -= draw.randrange(config.late_ms)
        # The id tells nothing of the order.
        event_id, user_id = f"e{draw.getrandbits(48):012x}-{number}", f"user-{user}"
        which = draw.random() if self._mixed[user] else 1.0
        if which < 0.15:
            shown = [
                Impression(item_id=item.item_id, position=position, propensity=1.0)
                for position, item in enumerate(draw.choices(self._items, k=_SHOWN_ITEMS))
            ]
            return ImpressionList(
                event_id=event_id, user_id=user_id, event_time=from_ms(time_ms), impressions=shown, served_tier="ranked"
            )
        item, kind = draw.choice(self._items), draw.choice(KINDS)
        message: Event | Feedback = Feedback(recommendation_id=f"r{number}") if which < 0.3 else Event()
        message.event_id, message.user_id, message.item_id, message.kind = event_id, user_id, item.item_id, kind
        message.event_time.CopyFrom(from_ms(time_ms))
        message.categories.extend(item.categories)
        message.segment = _SEGMENTS[user % len(_SEGMENTS)]
        if kind in _VALUED:
            message.value = round(draw.uniform(0.5, 60.0), 3)
        if draw.random() < 0.2:
            message.confidence = round(draw.random(), 3)
        return message

    def _topic(self, message: Message) -> str:
        topics = self._topics
        return {Event: topics.events, Feedback: topics.feedback, ImpressionList: topics.impressions}[type(message)]

    # --- what no reader can process ---

    def _broken(self, number: int) -> Sent:
        message = self._message(number)
        how: Callable[[Message], Sent] = self._random.choice(
            [self._noise, self._cut, self._no_id, self._foreign_key, self._no_number, self._false_json, self._no_time]
        )
        return how(message)

    def _sent(self, message: Message) -> Sent:
        return Sent(self._topic(message), message.user_id.encode(), message.SerializeToString(), {})

    def _noise(self, message: Message) -> Sent:
        # A field of a wire type that does not exist, then anything.
        return self._sent(message)._replace(value=b"\xff\xff" + self._random.randbytes(self._random.randrange(1, 300)))

    def _cut(self, message: Message) -> Sent:
        # Within the first field, whose length is then a lie.
        value = message.SerializeToString()
        return self._sent(message)._replace(value=value[: self._random.randrange(3, 10)])

    def _no_id(self, message: Message) -> Sent:
        message.event_id = ""
        return self._sent(message)

    def _foreign_key(self, message: Message) -> Sent:
        return self._sent(message)._replace(key=f"not-{message.user_id}".encode())

    def _no_number(self, message: Message) -> Sent:
        if isinstance(message, ImpressionList):
            message.impressions[0].propensity = float("nan")
        else:
            message.value = float("nan")
        return self._sent(message)

    def _false_json(self, message: Message) -> Sent:
        return self._sent(message)._replace(headers={CONTENT_TYPE: JSON_CONTENT})

    def _no_time(self, message: Message) -> Sent:
        message.ClearField("event_time")
        return self._sent(message)
