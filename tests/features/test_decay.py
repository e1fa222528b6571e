"""Forward decay gives the same sums in any order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import decay

HALF_LIFE_MS = 3_600_000
NOW_MS = 1_700_000_000_000
weighted = st.lists(st.tuples(st.integers(0, 400 * HALF_LIFE_MS), st.floats(0.1, 10)), min_size=1, max_size=40)


def total_of(entries: list[tuple[int, float]]) -> tuple[int, float]:
    landmark, total = 0, 0.0
    for age_ms, weight in entries:
        event_landmark, growth = decay.landmark_weight(NOW_MS - age_ms, HALF_LIFE_MS)
        landmark, total = decay.add(landmark, total, event_landmark, weight * growth)
    return landmark, total


@given(weighted)
def test_value_equals_the_sum_of_decayed_weights(entries) -> None:
    expected = sum(weight * 0.5 ** (age_ms / HALF_LIFE_MS) for age_ms, weight in entries)
    assert decay.value_at(*total_of(entries), HALF_LIFE_MS, NOW_MS) == pytest.approx(expected, rel=1e-9)


@given(weighted, st.randoms(use_true_random=False))
def test_order_changes_rounding_only(entries, random) -> None:
    shuffled = list(entries)
    random.shuffle(shuffled)
    left, right = total_of(entries), total_of(shuffled)
    assert left[0] == right[0]
    assert left[1] == pytest.approx(right[1], rel=1e-12)


def test_half_is_left_after_a_half_life() -> None:
    landmark, growth = decay.landmark_weight(NOW_MS, HALF_LIFE_MS)
    assert decay.value_at(landmark, growth, HALF_LIFE_MS, NOW_MS + HALF_LIFE_MS) == pytest.approx(0.5)


def test_a_time_decades_before_the_event_gives_a_number() -> None:
    landmark, growth = decay.landmark_weight(1_700_000_000_000, 3_600_000)
    assert 0 < decay.value_at(landmark, 1e6 * growth, 3_600_000, 0) < 1e38
