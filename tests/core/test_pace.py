"""Long work rests where calls are beside it, and nowhere else."""

import pytest

from core.pace import beside_calls, paced


class Clock:
    """Time that passes by work and by rests alone."""

    def __init__(self) -> None:
        self.now = self.worked = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.worked += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("core.pace.time", clock)
    return clock


def worked_share(clock: Clock, count: int) -> float:
    """Of the time that it takes to go through some things that take 0.5 ms each."""
    for _ in paced(range(count)):
        clock.work(0.0005)
    return clock.worked / clock.now


def test_work_beside_calls_leaves_them_half_of_the_time(clock) -> None:
    with beside_calls():
        assert worked_share(clock, 100) < 0.7
        assert worked_share(clock, 1000) == pytest.approx(0.5, abs=0.02)
    assert list(paced(range(3))) == [0, 1, 2]


def test_work_alone_does_not_rest(clock) -> None:
    assert worked_share(clock, 20) == 1
    with beside_calls():
        pass
    assert worked_share(clock, 20) == 1
