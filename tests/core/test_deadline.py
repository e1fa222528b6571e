"""A budget that several steps share."""

from core.clock import ManualClock
from core.deadline import Deadline


def test_what_is_left_shrinks_and_never_goes_below_nothing() -> None:
    clock = ManualClock(1000)
    deadline = Deadline.after_ms(250, clock)
    clock.advance(100)
    assert round(deadline.remaining_ms()) == 150
    assert not deadline.expired()
    clock.advance(200)
    assert deadline.remaining_ms() == 0
    assert deadline.expired()


def test_a_stage_never_gets_more_than_what_is_left() -> None:
    clock = ManualClock()
    deadline = Deadline.after_ms(100, clock)
    assert round(deadline.capped_ms(30).remaining_ms()) == 30
    clock.advance(90)
    assert round(deadline.capped_ms(30).remaining_ms()) == 10
    assert round(deadline.minus_ms(4).remaining_ms()) == 6
