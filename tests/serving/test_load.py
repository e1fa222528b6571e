"""Quality and admission under pressure: what falls first, what comes back, what never falls."""

from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock
from serving.load import LEAST_QUALITY, LoadControl


def run(load, clock, share, rounds, at_once=1) -> int:
    """Rounds of `at_once` requests that each take `share` of their time; returns how many were let in."""
    admitted = 0
    for _ in range(rounds):
        entered = sum(load.enter() for _ in range(at_once))
        clock.advance(20)
        for _ in range(entered):
            load.leave(share * 250, 250)
        admitted += entered
    return admitted


def test_without_pressure_nothing_is_held_back() -> None:
    clock = ManualClock()
    load = LoadControl(64, clock)
    assert run(load, clock, 0.1, 100, at_once=64) == 6400
    assert load.quality == 1.0


def test_quality_falls_before_anybody_is_turned_away_and_comes_back() -> None:
    clock = ManualClock()
    load = LoadControl(64, clock)
    assert run(load, clock, 0.5, 100, at_once=32) == 3200
    assert load.quality == LEAST_QUALITY
    assert load.limit == 64
    run(load, clock, 0.1, 200, at_once=32)
    assert load.quality == 1.0


def test_late_answers_lower_the_limit_and_ease_raises_it() -> None:
    clock = ManualClock()
    load = LoadControl(64, clock)
    run(load, clock, 0.9, 200, at_once=64)
    assert load.limit == 8
    assert [load.enter() for _ in range(10)].count(True) == 8
    for _ in range(8):
        load.leave(10, 250)
    run(load, clock, 0.1, 400, at_once=64)
    assert load.limit == 64


def test_a_slow_dependency_under_a_trickle_turns_nobody_away() -> None:
    clock = ManualClock()
    load = LoadControl(256, clock)
    assert run(load, clock, 0.8, 500, at_once=4) == 2000


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300)), max_size=60))
def test_quality_and_limit_stay_within_their_bounds(rounds) -> None:
    clock = ManualClock()
    load = LoadControl(100, clock)
    for share, at_once in rounds:
        run(load, clock, share, 3, at_once)
        assert LEAST_QUALITY <= load.quality <= 1
        assert 8 <= load.limit <= 100
