"""The state of a user as a pure function of their events: `apply(state, events) -> outcomes`.

The stream applies it to each batch, training replays the log through it, tests compare the two. Invariant: inside
the duplicate horizon, any order, duplication, batching and restart of the same events gives the same state; an
event at or below the row's offset is a replay, a known event_id is a duplicate, both change nothing but a count.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate
from operator import sub
from typing import Any, NamedTuple

from core.codec import to_ms, varint
from core.errors import MalformedEventError
from core.settings import FeaturesSettings
from features import decay, positions, wire
from features.positions import Offsets
from features.transforms import category_bucket, engagement_weight, stable_hash
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList
from headrace.v1.state_pb2 import UserState as UserStateProto

ENCODING = 1
IMPRESSION = "impression"
OTHER_KINDS = "other"
_OFFSETS_FIELD = UserStateProto.OFFSETS_FIELD_NUMBER
_KIND, _AFFINITY = map(
    wire.tag, (UserStateProto.KIND_COUNTERS_FIELD_NUMBER, UserStateProto.CATEGORY_AFFINITY_FIELD_NUMBER)
)


# What a NamedTuple's own constructor calls, at half its cost; whoever uses it gives each field, in order.
new_tuple: Any = tuple.__new__


class Position(NamedTuple):
    """Where an event lies in the log. `source` is `core.topics.source_id`."""

    source: int
    partition: int
    offset: int


class UserEvent(NamedTuple):
    """What the state needs of an event, whichever topic or file it came from."""

    user_id: str
    event_hash: int
    item_id: str
    kind: str
    time_ms: int
    value: float = 1.0
    confidence: float = 1.0
    categories: tuple[str, ...] = ()
    position: Position | None = None
    # Of the user at that time; the state does not keep it, statistics of items count by it.
    segment: str = ""


class Interaction(NamedTuple):
    """One entry of a user's history. Ordered by time, then by event hash."""

    time_ms: int
    event_hash: int
    item_id: str
    kind: str
    value: float


class Outcome(IntEnum):
    """What became of an event."""

    APPLIED = 0
    DUPLICATE = 1
    REPLAY = 2


# Plain names: until Python 3.12 a member of an enum is looked up by a call.
_APPLIED, _DUPLICATE, _REPLAY = Outcome


@dataclass(slots=True)
class UserState:
    """What is kept of one user."""

    revision: int = 0
    watermark_ms: int = 0
    first_event_time_ms: int = 0
    offsets: Offsets = field(default_factory=dict)
    # The last N interactions, oldest first.
    history: list[Interaction] = field(default_factory=list)
    # (time_ms, event_hash) of the events before them, oldest first, up to the duplicate horizon.
    horizon: list[tuple[int, int]] = field(default_factory=list)
    # Hashes of both.
    known: set[int] = field(default_factory=set)
    # kind -> (count, sum of values)
    kinds: dict[str, tuple[int, float]] = field(default_factory=dict)
    # One per half-life: landmark, and forward-decayed weight per category bucket.
    affinity: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    dwell_seconds: float = 0.0
    duplicate_count: int = 0
    outside_horizon_count: int = 0


def apply(state: UserState, events: Iterable[UserEvent], settings: FeaturesSettings) -> list[Outcome]:
    """Applies events of one user to `state`, in place.

    Returns:
        The outcome of each event, in order: what else counts events (item statistics) counts the APPLIED ones.
    """
    return [apply_one(state, event, settings) for event in events]


def apply_one(state: UserState, event: UserEvent, settings: FeaturesSettings) -> Outcome:
    """`apply` of one event."""
    position = event.position
    if position is not None:
        where = position[:2]
        if position.offset <= state.offsets.get(where, -1):
            return _REPLAY
        state.offsets[where] = position.offset
    if event.event_hash in state.known:
        state.duplicate_count += 1
        return _DUPLICATE
    _remember(state, event, settings)
    if event.event_hash not in state.known:
        state.outside_horizon_count += 1
    kind = event.kind if event.kind in settings.kind_weights else OTHER_KINDS
    count, value_sum = state.kinds.get(kind, (0, 0.0))
    state.kinds[kind] = (count + 1, value_sum + event.value)
    if event.kind == IMPRESSION:
        return _APPLIED
    state.revision += 1
    time_ms = event.time_ms
    if time_ms > state.watermark_ms:
        state.watermark_ms = time_ms
    if time_ms < state.first_event_time_ms or not state.first_event_time_ms:
        state.first_event_time_ms = time_ms
    if event.kind == "dwell":
        state.dwell_seconds += event.value
    if event.categories:
        _count_categories(state, event, settings)
    return _APPLIED


def _remember(state: UserState, event: UserEvent, settings: FeaturesSettings) -> None:
    """Puts the event into the history and the duplicate horizon, and drops what falls out at the old end."""
    if event.kind == IMPRESSION:
        # What was merely shown is not an interaction: it takes part in the horizon alone.
        _remember_id(state, (event.time_ms, event.event_hash), settings)
        return
    entry = new_tuple(Interaction, (event.time_ms, event.event_hash, event.item_id, event.kind, event.value))
    history = state.history
    if history and entry < history[-1]:
        insort(history, entry)
    else:
        history.append(entry)
    state.known.add(event.event_hash)
    if len(history) > settings.history_length:
        oldest = history.pop(0)
        state.known.discard(oldest.event_hash)
        _remember_id(state, oldest[:2], settings)


def _remember_id(state: UserState, entry: tuple[int, int], settings: FeaturesSettings) -> None:
    horizon = state.horizon
    if horizon and entry < horizon[-1]:
        insort(horizon, entry)
    else:
        horizon.append(entry)
    state.known.add(entry[1])
    if len(horizon) > settings.duplicate_horizon - settings.history_length:
        state.known.discard(horizon.pop(0)[1])


def _count_categories(state: UserState, event: UserEvent, settings: FeaturesSettings) -> None:
    weight = engagement_weight(event.kind, event.value, event.confidence, settings) / len(event.categories)
    buckets = [category_bucket(category, settings.category_buckets) for category in event.categories]
    if not state.affinity:
        state.affinity = [(0, {}) for _ in settings.half_lives_seconds]
    marks = decay.landmark_weights(event.time_ms, settings.half_lives_seconds)
    for index, (event_landmark, growth) in enumerate(marks):
        landmark, sums = state.affinity[index]
        gain = weight * growth
        if event_landmark > landmark:
            sums = {bucket: decay.add(landmark, total, event_landmark, 0.0)[1] for bucket, total in sums.items()}
            state.affinity[index] = (event_landmark, sums)
        elif event_landmark < landmark:
            _, gain = decay.add(landmark, 0.0, event_landmark, gain)
        for bucket in buckets:
            sums[bucket] = sums.get(bucket, 0.0) + gain


def recent_items(state: UserState, kinds: frozenset[str] | None = None) -> list[str]:
    """Item ids of the history, newest first, each once."""
    return list(dict.fromkeys(e.item_id for e in reversed(state.history) if kinds is None or e.kind in kinds))


def session(state: UserState, now_ms: int, gap_seconds: int) -> list[Interaction]:
    """The interactions of the session that is still open at `now_ms`, oldest first; empty when none is."""
    gap_ms, end_ms = gap_seconds * 1000, now_ms
    start = bisect_left(state.history, (now_ms + 1,))
    first = start
    while first > 0 and end_ms - state.history[first - 1].time_ms <= gap_ms:
        end_ms = state.history[first - 1].time_ms
        first -= 1
    return state.history[first:start]


def as_user_event(message: Event | Feedback, position: Position | None = None) -> UserEvent:
    """The event as the state sees it, from a checked message of the log."""
    return new_tuple(  # type: ignore[no-any-return]
        UserEvent,
        (
            message.user_id,
            stable_hash(message.event_id),
            message.item_id,
            message.kind,
            to_ms(message.event_time),
            message.value if message.HasField("value") else 1.0,
            message.confidence if message.HasField("confidence") else 1.0,
            tuple(message.categories),
            position,
            message.segment,
        ),
    )


def as_impression_event(shown: ImpressionList, position: Position | None = None) -> UserEvent:
    """An answer that was shown, as the state sees it: one event for the whole list."""
    return UserEvent(
        shown.user_id, stable_hash(shown.event_id), "", IMPRESSION, to_ms(shown.event_time), position=position
    )


def encode(state: UserState) -> bytes:
    """The state as bytes (headrace.v1.UserState); equal states give equal bytes."""
    # All at once: each assignment to a message is a call of its own, and this runs for every user of a batch.
    proto = UserStateProto(
        encoding=ENCODING,
        revision=state.revision,
        watermark_ms=state.watermark_ms,
        first_event_time_ms=state.first_event_time_ms,
        dwell_seconds=state.dwell_seconds,
        duplicate_count=state.duplicate_count,
        outside_horizon_count=state.outside_horizon_count,
        **_history_fields(state.history),
        **_horizon_fields(state.horizon),
    )
    # Messages in bytes may be joined: a repeated field may stand anywhere.
    parts = [proto.SerializeToString(), positions.encode(state.offsets, _OFFSETS_FIELD)]
    for kind, (count, value_sum) in sorted(state.kinds.items()):
        parts += wire.entry(_KIND, wire.name(kind) + b"\x10" + varint(count), value_sum)
    if state.affinity:
        # An event counts at every half-life, so all have the same buckets.
        buckets = sorted(state.affinity[0][1])
        packed = wire.packed_varints(buckets)
        head = b"\x12" + varint(len(packed)) + packed + b"\x1a" + varint(8 * len(buckets))
        for landmark, sums in state.affinity:
            decayed = b"\x08" + varint(landmark) + head + wire.packed_doubles([sums[bucket] for bucket in buckets])
            parts += (_AFFINITY, varint(len(decayed)), decayed)
    return b"".join(parts)


def _history_fields(history: list[Interaction]) -> dict[str, Any]:
    if not history:
        return {}
    times, hashes, items, kinds, values = zip(*history, strict=True)
    names = sorted(set(kinds))
    index_of = {name: index for index, name in enumerate(names)}
    fields: dict[str, Any] = {
        "time_delta_ms": _deltas(times),
        "event_hash": hashes,
        "item_id": items,
        "kind_name": names,
        "kind": [index_of[kind] for kind in kinds],
    }
    valued = [(index, value) for index, value in enumerate(values) if value != 1.0]
    if valued:
        fields["valued_index"], fields["value"] = zip(*valued, strict=True)
    return fields


def _horizon_fields(horizon: list[tuple[int, int]]) -> dict[str, Any]:
    if not horizon:
        return {}
    times, hashes = zip(*horizon, strict=True)
    return {"horizon_time_delta_ms": _deltas(times), "horizon_event_hash": hashes}


def decode(blob: bytes) -> UserState:
    """The state of `encode`; empty bytes are an empty state.

    Raises:
        MalformedEventError: not a state, or of an encoding that this version does not know.
    """
    state = UserState()
    if not blob:
        return state
    try:
        proto = UserStateProto.FromString(blob)
    except Exception as error:
        raise MalformedEventError("state", f"not an encoded user state: {error}") from error
    if proto.encoding != ENCODING:
        raise MalformedEventError("state", f"encoding {proto.encoding}, this version reads {ENCODING}; rebuild it")
    state.revision = proto.revision
    state.watermark_ms = proto.watermark_ms
    state.first_event_time_ms = proto.first_event_time_ms
    state.dwell_seconds = proto.dwell_seconds
    state.duplicate_count = proto.duplicate_count
    state.outside_horizon_count = proto.outside_horizon_count
    state.offsets = positions.of_entries(proto.offsets)
    names = list(proto.kind_name)
    kinds = [names[index] for index in proto.kind]
    values = [1.0] * len(kinds)
    for index, value in zip(proto.valued_index, proto.value, strict=True):
        values[index] = value
    hashes = list(proto.event_hash)
    entries = zip(accumulate(proto.time_delta_ms), hashes, proto.item_id, kinds, values, strict=True)
    state.history = list(map(Interaction._make, entries))
    horizon_hashes = list(proto.horizon_event_hash)
    state.horizon = list(zip(accumulate(proto.horizon_time_delta_ms), horizon_hashes, strict=True))
    state.known = {*hashes, *horizon_hashes}
    state.kinds = {counter.kind: (counter.count, counter.value_sum) for counter in proto.kind_counters}
    state.affinity = [
        (part.landmark, dict(zip(part.bucket, part.sum, strict=True))) for part in proto.category_affinity
    ]
    return state


def _deltas(times: tuple[int, ...]) -> list[int]:
    return [times[0], *map(sub, times[1:], times)]
