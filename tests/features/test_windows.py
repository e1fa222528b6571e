"""The state of a user is a pure function of the user's events."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import MalformedEventError
from core.settings import load_settings
from features import windows
from features.windows import Outcome, Position, UserEvent, UserState

FEATURES = load_settings().features.model_copy(update={"history_length": 5, "duplicate_horizon": 12})
START_MS = 1_700_000_000_000

events = st.builds(
    lambda number, minutes, kind, value, categories: UserEvent(
        "u", number, f"item{number % 7}", kind, START_MS + minutes * 60_000, value, 1.0, categories
    ),
    st.integers(1, 2**63),
    st.integers(0, 20_000),
    st.sampled_from(["view", "click", "rating", "purchase", "impression", "one-of-our-own"]),
    st.sampled_from([1.0, 0.5, 4.5, 3.1415926535]),
    st.sampled_from([(), ("jazz",), ("jazz", "rock")]),
)
unique_events = st.lists(events, max_size=60, unique_by=lambda event: event.event_hash)


def state_of(stream: list[UserEvent]) -> UserState:
    state = UserState()
    windows.apply(state, stream, FEATURES)
    return state


def assert_same(left: UserState, right: UserState) -> None:
    assert left.revision == right.revision
    assert left.watermark_ms == right.watermark_ms
    assert left.history == right.history
    assert left.horizon == right.horizon
    assert left.known == right.known
    assert left.kinds.keys() == right.kinds.keys()
    for kind, (count, value_sum) in left.kinds.items():
        assert right.kinds[kind] == (count, pytest.approx(value_sum, rel=1e-9))
    for (left_landmark, left_sums), (right_landmark, right_sums) in zip(left.affinity, right.affinity, strict=True):
        assert left_landmark == right_landmark
        assert left_sums == pytest.approx(right_sums, rel=1e-9, abs=1e-12)


@given(unique_events, st.randoms(use_true_random=False))
def test_any_order_gives_the_same_state_also_when_the_history_overflows(stream, random) -> None:
    shuffled = list(stream)
    random.shuffle(shuffled)
    assert_same(state_of(stream), state_of(shuffled))


@given(st.lists(events, max_size=12, unique_by=lambda event: event.event_hash), st.randoms(use_true_random=False))
def test_duplicates_inside_the_horizon_change_nothing_but_their_count(stream, random) -> None:
    doubled = stream + stream
    random.shuffle(doubled)
    horizon = FEATURES.duplicate_horizon - FEATURES.history_length
    inside = [event for event in stream if event.kind == "impression"][:horizon]
    if len(inside) < sum(event.kind == "impression" for event in stream):
        return
    state = state_of(doubled)
    assert_same(state_of(stream), state)
    assert state.duplicate_count == len(stream)


@given(unique_events, st.lists(st.integers(1, 7), max_size=30))
def test_any_batching_and_restart_gives_the_same_bytes(stream, sizes) -> None:
    """A restart is an encode and a decode between two batches."""
    state, rest = UserState(), list(stream)
    for size in [*sizes, len(stream)]:
        batch, rest = rest[:size], rest[size:]
        windows.apply(state, batch, FEATURES)
        state = windows.decode(windows.encode(state))
    assert windows.encode(state) == windows.encode(state_of(stream))


@given(unique_events)
def test_a_state_survives_its_encoding(stream) -> None:
    state = state_of(stream)
    assert windows.decode(windows.encode(state)) == state


def test_a_state_with_many_category_buckets_survives_its_encoding() -> None:
    """Bucket numbers of more than seven bits take two bytes each."""
    many = FEATURES.model_copy(update={"category_buckets": 100_000})
    state = UserState()
    categories = tuple(f"category-{number}" for number in range(50))
    windows.apply(state, [UserEvent("u", 1, "item", "click", START_MS, 1.0, 1.0, categories)], many)
    assert max(state.affinity[0][1]) > 0x3FFF
    assert windows.decode(windows.encode(state)) == state


@given(unique_events, st.integers(0, 60))
def test_replayed_offsets_are_skipped(stream, back) -> None:
    placed = [event._replace(position=Position(7, 0, offset)) for offset, event in enumerate(stream)]
    state = state_of(placed)
    before = windows.encode(state)
    outcomes = windows.apply(state, placed[-back:] if back else [], FEATURES)
    assert all(outcome is Outcome.REPLAY for outcome in outcomes)
    assert windows.encode(state) == before


def test_offsets_of_another_log_are_not_replays() -> None:
    event = UserEvent("u", 1, "a", "click", START_MS, position=Position(1, 0, 100))
    state = state_of([event])
    again = event._replace(event_hash=2, position=Position(2, 0, 5))
    assert windows.apply(state, [again], FEATURES) == [Outcome.APPLIED]


def test_a_late_event_counts_and_is_counted_when_its_uniqueness_is_unknown() -> None:
    newest = [UserEvent("u", n, "a", "click", START_MS + n) for n in range(1, 40)]
    state = state_of(newest)
    late = UserEvent("u", 1000, "b", "click", START_MS - 5)
    assert windows.apply(state, [late], FEATURES) == [Outcome.APPLIED]
    assert state.outside_horizon_count == 1
    assert state.kinds["click"][0] == 40
    assert all(entry.item_id == "a" for entry in state.history)


def test_unknown_kinds_share_one_counter_but_keep_their_name_in_the_history() -> None:
    state = state_of([UserEvent("u", n, "a", f"own{n}", START_MS + n) for n in range(3)])
    assert state.kinds == {windows.OTHER_KINDS: (3, 3.0)}
    assert [entry.kind for entry in state.history] == ["own0", "own1", "own2"]


def test_a_session_ends_at_a_pause() -> None:
    minutes = [0, 5, 50, 60, 70]
    state = state_of([UserEvent("u", n, f"i{n}", "click", START_MS + n * 60_000) for n in minutes])
    now_ms = START_MS + 75 * 60_000
    assert [e.item_id for e in windows.session(state, now_ms, 1800)] == ["i50", "i60", "i70"]
    assert windows.session(state, now_ms + 3_600_000, 1800) == []


@pytest.mark.parametrize("blob", [b"\xff\xff\xff", b"not a state at all"], ids=["random", "text"])
def test_foreign_bytes_are_refused(blob) -> None:
    with pytest.raises(MalformedEventError):
        windows.decode(blob)


def test_an_active_user_costs_little_room() -> None:
    full = load_settings().features
    state = UserState()
    stream = [
        UserEvent("user-1", windows.stable_hash(f"e{n}"), f"item-{n % 400:05}", "click", START_MS + n * 60_000)
        for n in range(60)
    ]
    windows.apply(state, stream, full)
    assert len(windows.encode(state)) < 1500


@settings(max_examples=20)
@given(unique_events)
def test_the_watermark_is_the_newest_event_time(stream) -> None:
    times = [event.time_ms for event in stream if event.kind != "impression"]
    assert state_of(stream).watermark_ms == max(times, default=0)
