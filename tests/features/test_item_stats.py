"""Partial sums add up to what one writer over all events would have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.settings import load_settings
from features import item_stats
from features.item_stats import ItemPartial
from features.windows import Position, UserEvent
from headrace.v1.events_pb2 import DecayedSum, ItemStats, KindStats, SegmentSum, SourceOffset

FEATURES = load_settings().features
START_MS = 1_700_000_000_000

events = st.lists(
    st.builds(
        lambda number, hours, kind, segment: UserEvent(
            "u", number, "a", kind, START_MS + hours * 3_600_000, segment=segment
        ),
        st.integers(1, 10**9),
        st.integers(0, 5000),
        st.sampled_from(["click", "impression", "purchase", "strange"]),
        st.sampled_from(["", "anglers", "campers"]),
    ),
    max_size=40,
)


@given(events, st.integers(1, 4))
def test_partials_add_up(stream, partitions) -> None:
    whole = ItemPartial()
    parts = [ItemPartial() for _ in range(partitions)]
    for event in stream:
        item_stats.apply(whole, event, FEATURES)
        item_stats.apply(parts[event.event_hash % partitions], event, FEATURES)
    total = item_stats.add_up(parts)
    assert (total.revision, total.watermark_ms, total.kinds) == (whole.revision, whole.watermark_ms, whole.kinds)
    for (left_landmark, left), (right_landmark, right) in zip(total.popularity, whole.popularity, strict=True):
        assert left_landmark == right_landmark
        assert left == pytest.approx(right, rel=1e-9)
    assert_same_segments(total, whole)


def assert_same_segments(left: ItemPartial, right: ItemPartial) -> None:
    assert left.segments.keys() == right.segments.keys()
    for name, (landmark, total) in left.segments.items():
        assert right.segments[name] == (landmark, pytest.approx(total, rel=1e-9))


def test_a_segment_counts_what_its_users_did_by_the_longest_half_life() -> None:
    partial, alone = ItemPartial(), ItemPartial()
    for number, segment in enumerate(["anglers", "campers", "anglers", ""]):
        event = UserEvent("u", number, "a", "purchase", START_MS + number * 3_600_000, segment=segment)
        item_stats.apply(partial, event, FEATURES)
        if segment == "anglers":
            item_stats.apply(alone, event, FEATURES)
    assert partial.segments.keys() == {"anglers", "campers"}
    assert partial.segments["anglers"] == alone.popularity[-1]


@given(st.randoms(use_true_random=False))
def test_too_many_segments_leave_the_same_ones_with_whole_sums_in_any_order(random) -> None:
    stream = [
        UserEvent("u", number, "a", "click", START_MS + number * 60_000, segment=f"segment-{number % 100}")
        for number in range(300)
    ]
    shuffled = list(stream)
    random.shuffle(shuffled)
    left, right, alone = ItemPartial(), ItemPartial(), ItemPartial()
    for one, other in zip(stream, shuffled, strict=True):
        item_stats.apply(left, one, FEATURES)
        item_stats.apply(right, other, FEATURES)
    assert len(left.segments) == item_stats.SEGMENTS_MAX
    assert_same_segments(left, right)
    kept = next(iter(left.segments))
    for event in stream:
        if event.segment == kept:
            item_stats.apply(alone, event, FEATURES)
    assert_same_segments(ItemPartial(segments={kept: left.segments[kept]}), alone)


@given(events)
def test_a_partial_survives_its_encoding(stream) -> None:
    partial = ItemPartial()
    for offset, event in enumerate(stream):
        item_stats.apply(partial, event._replace(position=Position(3, 1, offset)), FEATURES)
    assert item_stats.decode(item_stats.as_message("a", 1, partial, FEATURES)) == partial


def test_a_position_that_is_included_is_a_replay() -> None:
    partial = ItemPartial()
    item_stats.apply(partial, UserEvent("u", 1, "a", "click", START_MS, position=Position(3, 1, 10)), FEATURES)
    assert item_stats.is_replay(partial, Position(3, 1, 10))
    assert item_stats.is_replay(partial, Position(3, 1, 4))
    assert not item_stats.is_replay(partial, Position(3, 1, 11))
    assert not item_stats.is_replay(partial, Position(4, 1, 4))
    assert not item_stats.is_replay(partial, None)


@given(events)
def test_the_bytes_are_those_of_the_message(stream) -> None:
    partial = ItemPartial(offsets={(7, 3): 300})
    for event in stream:
        item_stats.apply(partial, event, FEATURES)
    expected = ItemStats(
        item_id="a",
        source_partition=3,
        offsets=[SourceOffset(source=7, partition=3, offset=300)],
        revision=partial.revision,
        watermark_ms=partial.watermark_ms,
        kinds=[KindStats(kind=k, count=n, value_sum=v) for k, (n, v) in sorted(partial.kinds.items())],
        popularity=[
            DecayedSum(half_life_ms=seconds * 1000, landmark=landmark, sum=total)
            for seconds, (landmark, total) in zip(FEATURES.half_lives_seconds, partial.popularity, strict=False)
        ],
        segments=[SegmentSum(segment=s, landmark=at, sum=total) for s, (at, total) in sorted(partial.segments.items())],
    )
    assert item_stats.as_message("a", 3, partial, FEATURES) == expected
    assert item_stats.decode(expected) == partial
