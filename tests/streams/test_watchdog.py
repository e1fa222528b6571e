"""A partition that has messages and does not move is noticed."""

from prometheus_client import REGISTRY

from core.clock import ManualClock
from core.settings import load_settings
from streams.watchdog import Bounds, Watchdog

A, B = ("t", 0), ("t", 1)


def watchdog(clock: ManualClock) -> Watchdog:
    return Watchdog(load_settings(overrides={"streams": {"stall_timeout_ms": 1000}}), dict, clock=clock)


def test_lag_that_does_not_shrink_is_a_stall() -> None:
    clock = ManualClock()
    dog = watchdog(clock)
    dog.look({A: Bounds(0, 10), B: Bounds(0, 10)}, {A: 4, B: 9})
    clock.advance(999)
    dog.look({A: Bounds(0, 10), B: Bounds(0, 10)}, {A: 4, B: 9})
    assert dog.problem() is None
    clock.advance(1)
    dog.look({A: Bounds(0, 12), B: Bounds(0, 10)}, {A: 4, B: 9})
    assert "t/0" in dog.problem()
    assert "t/1" not in dog.problem()


def test_a_slow_partition_is_not_a_stalled_one() -> None:
    clock = ManualClock()
    dog = watchdog(clock)
    for offset in range(10):
        dog.look({A: Bounds(0, 1000)}, {A: offset})
        clock.advance(900)
        assert dog.problem() is None


def test_a_partition_without_messages_never_stalls() -> None:
    clock = ManualClock()
    dog = watchdog(clock)
    for _ in range(5):
        dog.look({A: Bounds(0, 0), B: Bounds(0, 7)}, {A: -1, B: 6})
        clock.advance(5000)
    assert dog.problem() is None
    # The clock of the stall starts when there is something to do.
    dog.look({A: Bounds(0, 0), B: Bounds(0, 8)}, {A: -1, B: 6})
    assert dog.problem() is None


def test_what_moves_again_or_belongs_to_another_worker_is_forgotten() -> None:
    clock = ManualClock()
    dog = watchdog(clock)
    dog.look({A: Bounds(0, 10), B: Bounds(0, 10)}, {A: 4, B: 4})
    clock.advance(2000)
    dog.look({A: Bounds(0, 10), B: Bounds(0, 10)}, {A: 4, B: 4})
    assert dog.problem() is not None
    dog.look({A: Bounds(0, 10)}, {A: 5})
    assert dog.problem() is None


def test_a_worker_that_has_lost_its_partitions_is_no_longer_stalled_and_tells_no_lag() -> None:
    clock = ManualClock()
    dog = watchdog(clock)
    for _ in range(2):
        dog.look({A: Bounds(0, 10)}, {A: 4})
        clock.advance(2000)
    assert dog.problem() is not None
    assert REGISTRY.get_sample_value("headrace_streams_lag", {"topic": "t", "partition": "0"}) == 5
    dog.look({}, {})
    assert dog.problem() is None
    assert REGISTRY.get_sample_value("headrace_streams_lag", {"topic": "t", "partition": "0"}) == 0


def test_messages_that_kafka_no_longer_has_are_no_lag() -> None:
    clock, told = ManualClock(), []
    settings = load_settings(overrides={"streams": {"stall_timeout_ms": 1000}})
    dog = Watchdog(settings, dict, told.append, clock)
    for _ in range(3):
        dog.look({A: Bounds(50, 50)}, {A: 4})
        clock.advance(2000)
    assert dog.problem() is None
    assert told[-1] == {A: 50}
