"""The breaker on a clock that moves when told."""

import pytest

from core.clock import ManualClock
from core.errors import StageError, StageTimeoutError
from serving.breaker import CLOSED, HALF_OPEN, OPEN, BreakerOpenError, CircuitBreaker
from serving.clients import guarded


@pytest.fixture
def clock():
    return ManualClock(1000)


@pytest.fixture
def told():
    return []


@pytest.fixture
def breaker(clock, told):
    return CircuitBreaker("ranker", 3, 1000, clock, lambda *change: told.append(change))


def fail(breaker, times=1, error=None, is_fair=True) -> None:
    for _ in range(times):
        with pytest.raises(StageError), guarded(breaker, is_fair=is_fair):
            raise error or StageError("ranker", "no answer")


def succeed(breaker) -> None:
    with guarded(breaker, is_fair=True):
        pass


def test_it_opens_after_failures_in_a_row_and_says_why(breaker, told) -> None:
    fail(breaker, 2)
    succeed(breaker)
    fail(breaker, 2)
    assert breaker.state == CLOSED
    fail(breaker)
    assert breaker.state == OPEN
    assert told == [("ranker", OPEN, "ranker: no answer")]
    with pytest.raises(BreakerOpenError, match="no answer"):
        breaker.enter()


def test_one_probe_at_a_time_closes_it_again(breaker, clock, told) -> None:
    fail(breaker, 3)
    clock.advance(1000)
    assert breaker.state == HALF_OPEN
    with guarded(breaker, is_fair=True), pytest.raises(BreakerOpenError):
        breaker.enter()
    assert breaker.state == CLOSED
    assert told[-1] == ("ranker", CLOSED, "it answers again")


def test_a_failed_probe_opens_it_for_another_time_without_telling_again(breaker, clock, told) -> None:
    fail(breaker, 3)
    clock.advance(1000)
    fail(breaker)
    assert breaker.state == OPEN
    assert len(told) == 1
    clock.advance(999)
    assert breaker.state == OPEN
    clock.advance(1)
    assert breaker.state == HALF_OPEN


def test_an_abandoned_probe_lets_the_next_one_through(breaker, clock) -> None:
    fail(breaker, 3)
    clock.advance(1000)
    with pytest.raises(KeyboardInterrupt), guarded(breaker, is_fair=True):
        raise KeyboardInterrupt
    assert breaker.state == HALF_OPEN
    succeed(breaker)
    assert breaker.state == CLOSED


def test_a_caller_in_a_hurry_does_not_open_it_for_the_others(breaker) -> None:
    fail(breaker, 10, StageTimeoutError("ranker", "late"), is_fair=False)
    assert breaker.state == CLOSED
    fail(breaker, 3, StageTimeoutError("ranker", "late"))
    assert breaker.state == OPEN
