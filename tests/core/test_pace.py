"""Long work rests where calls are beside it, and nowhere else."""

import time

from core.pace import beside_calls, paced


def worked_share(count: int) -> float:
    """Of the time that it takes to go through some things that take 0.5 ms each."""
    began, worked = time.perf_counter(), 0.0
    for _ in paced(range(count)):
        start = time.perf_counter()
        while time.perf_counter() - start < 0.0005:
            pass
        worked += time.perf_counter() - start
    return worked / (time.perf_counter() - began)


def test_work_beside_calls_leaves_them_half_of_the_time() -> None:
    with beside_calls():
        assert worked_share(100) < 0.7
    assert list(paced(range(3))) == [0, 1, 2]


def test_work_alone_does_not_rest(monkeypatch) -> None:
    def never(seconds: float) -> None:
        raise AssertionError("slept")

    monkeypatch.setattr("core.pace.time.sleep", never)
    worked_share(20)
    with beside_calls():
        pass
    worked_share(20)
