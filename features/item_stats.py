"""Statistics of items as partial sums, one row per (item, source partition), added up by whoever reads.

The stream writes the rows and broadcasts them; replicas add them up in `features.catalog`. Invariant: a row has one
writer (the worker that owns the partition) and carries the offsets that it includes, so a replay changes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from core.codec import varint
from core.settings import FeaturesSettings
from features import decay, positions, wire
from features.positions import Offsets
from features.transforms import engagement_weight, stable_hash
from features.windows import OTHER_KINDS, Position, UserEvent
from headrace.v1.events_pb2 import ItemStats as ItemStatsProto
from headrace.v1.feature_log_pb2 import StatsRevision, StatsRevisions

# Of one row; segments are few, and who invents one for each event must not make rows grow without end.
SEGMENTS_MAX = 64
_OFFSETS_FIELD = ItemStatsProto.OFFSETS_FIELD_NUMBER
_KIND, _POPULARITY, _SEGMENT = map(
    wire.tag,
    (ItemStatsProto.KINDS_FIELD_NUMBER, ItemStatsProto.POPULARITY_FIELD_NUMBER, ItemStatsProto.SEGMENTS_FIELD_NUMBER),
)
_REVISION = wire.tag(StatsRevisions.REVISIONS_FIELD_NUMBER)


@dataclass(slots=True)
class ItemPartial:
    """Partial sums of one item over one source partition."""

    revision: int = 0
    watermark_ms: int = 0
    offsets: Offsets = field(default_factory=dict)
    # kind -> (count, sum of values)
    kinds: dict[str, tuple[int, float]] = field(default_factory=dict)
    # One per half-life: forward-decayed engagement (features/decay.py).
    popularity: list[tuple[int, float]] = field(default_factory=list)
    # segment -> the same by the longest half-life; of SEGMENTS_MAX segments at most.
    segments: dict[str, tuple[int, float]] = field(default_factory=dict)


def is_replay(partial: ItemPartial, position: Position | None) -> bool:
    """Whether the row includes this position already."""
    return position is not None and position.offset <= partial.offsets.get(position[:2], -1)


def apply(partial: ItemPartial, event: UserEvent, settings: FeaturesSettings) -> None:
    """Adds one event that the user's state APPLIED (or one shown item, kind `impression`). Check `is_replay` first."""
    position = event.position
    if position is not None:
        partial.offsets[position[:2]] = position.offset
    partial.revision += 1
    if event.time_ms > partial.watermark_ms:
        partial.watermark_ms = event.time_ms
    kind = event.kind if event.kind in settings.kind_weights else OTHER_KINDS
    count, value_sum = partial.kinds.get(kind, (0, 0.0))
    partial.kinds[kind] = (count + 1, value_sum + event.value)
    weight = engagement_weight(event.kind, event.value, event.confidence, settings)
    if not partial.popularity:
        partial.popularity = [(0, 0.0)] * len(settings.half_lives_seconds)
    if weight <= 0.0:
        # An impression, mostly: nothing to add, and there are many of them.
        return
    popularity = partial.popularity
    for index, (landmark, growth) in enumerate(decay.landmark_weights(event.time_ms, settings.half_lives_seconds)):
        before, total = popularity[index]
        gain = weight * growth
        popularity[index] = (landmark, total + gain) if landmark == before else decay.add(before, total, landmark, gain)
    if event.segment:
        _count_segment(partial.segments, event.segment, landmark, weight * growth)


def _count_segment(segments: dict[str, tuple[int, float]], name: str, landmark: int, gain: float) -> None:
    """Counts an event of a segment; of too many segments those of the lowest hashes stay.

    A segment that stays was never among those to go, whatever came before it, so its sum is whole and the order of
    events makes no difference.
    """
    segments[name] = decay.add(*segments.get(name, (0, 0.0)), landmark, gain)
    if len(segments) > SEGMENTS_MAX:
        del segments[max(segments, key=stable_hash)]


def add_up(partials: Iterable[ItemPartial]) -> ItemPartial:
    """The statistics of an item: the sum of its partials (offsets left out)."""
    partials = list(partials)
    kinds: dict[str, tuple[int, float]] = {}
    for partial in partials:
        for kind, (count, value_sum) in partial.kinds.items():
            before = kinds.get(kind, (0, 0.0))
            kinds[kind] = before[0] + count, before[1] + value_sum
    revision = sum(partial.revision for partial in partials)
    watermark_ms = max((partial.watermark_ms for partial in partials), default=0)
    return ItemPartial(revision, watermark_ms, {}, kinds, add_up_popularity(partials), add_up_segments(partials))


def add_up_popularity(partials: Iterable[ItemPartial]) -> list[tuple[int, float]]:
    """Sums per half-life of all partials; empty where none has any."""
    popularity: list[tuple[int, float]] = []
    for partial in partials:
        if not popularity:
            popularity = list(partial.popularity)
            continue
        for index, (landmark, total) in enumerate(partial.popularity):
            before, so_far = popularity[index]
            popularity[index] = (
                (landmark, so_far + total) if landmark == before else decay.add(before, so_far, landmark, total)
            )
    return popularity


def add_up_segments(partials: Iterable[ItemPartial]) -> dict[str, tuple[int, float]]:
    """Sums per segment of all partials."""
    segments: dict[str, tuple[int, float]] = {}
    for partial in partials:
        for name, summed in partial.segments.items():
            segments[name] = decay.add(*segments[name], *summed) if name in segments else summed
    return segments


def encode(item_id: str, source_partition: int, partial: ItemPartial, settings: FeaturesSettings) -> bytes:
    """The row as bytes (headrace.v1.ItemStats); equal sums give equal bytes."""
    proto = ItemStatsProto(
        item_id=item_id,
        source_partition=source_partition,
        revision=partial.revision,
        watermark_ms=partial.watermark_ms,
    )
    # Messages in bytes may be joined.
    parts = [proto.SerializeToString(), positions.encode(partial.offsets, _OFFSETS_FIELD)]
    for kind, (count, value_sum) in sorted(partial.kinds.items()):
        parts += wire.entry(_KIND, wire.name(kind) + b"\x10" + varint(count), value_sum)
    for half_life_seconds, (landmark, total) in zip(settings.half_lives_seconds, partial.popularity, strict=False):
        parts += wire.entry(_POPULARITY, _half_life(half_life_seconds, landmark), total)
    for name, (landmark, total) in sorted(partial.segments.items()):
        parts += wire.entry(_SEGMENT, wire.name(name) + b"\x10" + varint(landmark), total)
    return b"".join(parts)


@lru_cache(maxsize=1024)
def _half_life(half_life_seconds: int, landmark: int) -> bytes:
    return b"\x08" + varint(half_life_seconds * 1000) + b"\x10" + varint(landmark)


def as_message(item_id: str, source_partition: int, partial: ItemPartial, settings: FeaturesSettings) -> ItemStatsProto:
    """What `encode` encodes."""
    return ItemStatsProto.FromString(encode(item_id, source_partition, partial, settings))


def decode(proto: ItemStatsProto, *, with_offsets: bool = True) -> ItemPartial:
    """The sums; whoever only adds them up needs no offsets."""
    return ItemPartial(
        proto.revision,
        proto.watermark_ms,
        positions.of_entries(proto.offsets) if with_offsets else {},
        {stats.kind: (stats.count, stats.value_sum) for stats in proto.kinds},
        [(entry.landmark, entry.sum) for entry in proto.popularity],
        {entry.segment: (entry.landmark, entry.sum) for entry in proto.segments},
    )


def revision_of(proto: ItemStatsProto) -> bytes:
    """What a row is known by: headrace.v1.StatsRevisions of one, encoded; those of several rows may be joined."""
    # Its fields have the same numbers; a replica does this for each row that it hears of.
    named = StatsRevision.FromString(proto.SerializeToString())
    named.DiscardUnknownFields()
    encoded = named.SerializeToString()
    return _REVISION + varint(len(encoded)) + encoded
