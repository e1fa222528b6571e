"""From messages to changed rows, without Kafka or Redis: decode, apply to user states, count for items.

Called by the reader (through rows.py) for each batch. Invariant: what comes out depends on the rows and the messages
alone; a message that a row includes already changes nothing, so any batch may be played again.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from core import codec
from core.errors import MalformedEventError
from core.settings import FeaturesSettings
from core.topics import Topics
from features import item_stats, windows
from features.item_stats import ItemPartial
from features.windows import Outcome, Position, UserEvent, UserState, new_tuple
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList

_APPLIED, _DUPLICATE, _REPLAY = Outcome
# item_id and the partition that the sums are of.
ItemKey = tuple[str, int]
UserKeyed = Event | Feedback | ImpressionList


class RawMessage(NamedTuple):
    """A message as the broker gave it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Any
    # When the broker (or the producer) stamped it; 0 = unknown.
    time_ms: int


class Received(NamedTuple):
    """A checked message of a user-keyed topic, and what the state sees of it."""

    message: UserKeyed
    event: UserEvent
    # Items of an impression list, as often as they were shown.
    shown: tuple[str, ...]
    raw: RawMessage


@dataclass(slots=True)
class Changes:
    """What a batch did to user states, and what is to be counted for items."""

    # In the order of the batch.
    outcomes: list[Outcome] = field(default_factory=list)
    # Users whose row is to be written.
    users: set[str] = field(default_factory=set)
    # Users whose vector is, or may be, out of date now.
    dirty: set[str] = field(default_factory=set)
    # Events that counted, by item and partition, in order.
    items: dict[ItemKey, list[UserEvent]] = field(default_factory=dict)
    late: int = 0
    outside_horizon: int = 0
    # Items of events that were counted before, or were duplicates then.
    replayed_items: set[ItemKey] = field(default_factory=set)


def decode(raw: RawMessage, topics: Topics, sources: Mapping[str, int]) -> Received:
    """A user-keyed message, checked.

    Args:
        raw: the message.
        topics: their names.
        sources: identity of each topic (core.topics.source_id).

    Raises:
        MalformedEventError: the message can never be processed; names the field.
    """
    position = new_tuple(Position, (sources[raw.topic], raw.partition, raw.offset))
    topic = raw.topic
    is_event = topic == topics.events
    if not is_event and topic == topics.impressions:
        shown = codec.decode(ImpressionList(), raw.value, raw.headers)
        codec.check_impressions(shown, raw.time_ms)
        codec.check_key(raw.key, shown.user_id, "user_id")
        items = tuple(impression.item_id for impression in shown.impressions)
        return Received(shown, windows.as_impression_event(shown, position), items, raw)
    message: Event | Feedback = Event() if is_event else Feedback()
    codec.decode(message, raw.value, raw.headers)
    codec.check_event(message, raw.time_ms)
    codec.check_key(raw.key, message.user_id, "user_id")
    return new_tuple(Received, (message, windows.as_user_event(message, position), (), raw))  # type: ignore[no-any-return]


def try_decode(raw: RawMessage, topics: Topics, sources: Mapping[str, int]) -> Received | str:
    """The message, or the reason why it goes to the dead letters. Never raises."""
    try:
        return decode(raw, topics, sources)
    except MalformedEventError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - one message must never stop a partition
        return f"unexpected {type(error).__name__} while decoding: {error}"[:500]


def apply(batch: Sequence[Received], states: Mapping[str, UserState], settings: FeaturesSettings) -> Changes:
    """Applies a batch to the states of its users, in place."""
    changes = Changes()
    outcomes, dirty, users = changes.outcomes, changes.dirty, changes.users
    for received in batch:
        event = received.event
        user_id = event.user_id
        state = states[user_id]
        is_late, outside = event.time_ms < state.watermark_ms, state.outside_horizon_count
        outcome = windows.apply_one(state, event, settings)
        outcomes.append(outcome)
        if outcome is not _DUPLICATE and event.kind != windows.IMPRESSION:
            # A replay, too: whoever wrote that row may have died before its vector was made.
            dirty.add(user_id)
        if outcome is _REPLAY:
            changes.replayed_items.update(items_of(received))
            continue
        users.add(user_id)
        if outcome is _APPLIED:
            changes.late += is_late
            changes.outside_horizon += state.outside_horizon_count - outside
            _note_items(changes.items, received)
    return changes


def items_of(received: Received) -> Iterable[ItemKey]:
    """The item rows that a message counts in."""
    item_id, partition = received.event.item_id, received.raw.partition
    return [(item_id, partition)] if item_id else [(shown, partition) for shown in received.shown]


def count(partial: ItemPartial, events: Iterable[UserEvent], settings: FeaturesSettings) -> bool:
    """Adds events of one item to its partial sums, those that it includes already left out. True when it changed."""
    counted: Position | None = None
    for event in events:
        # A list may show an item twice: both are at one position, and neither was there before.
        position = event.position
        if position is not counted and item_stats.is_replay(partial, position):
            continue
        counted = position
        item_stats.apply(partial, event, settings)
    return counted is not None


def _note_items(items: MutableMapping[ItemKey, list[UserEvent]], received: Received) -> None:
    event = received.event
    for key in items_of(received):
        items.setdefault(key, []).append(event if event.item_id else event._replace(item_id=key[0]))
