"""Quality and admission under pressure: what falls first, what comes back, what never falls."""

import asyncio
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock, SystemClock
from core.deadline import Deadline
from core.settings import load_settings
from headrace.v1 import types_pb2 as types
from headrace.v1.recommender_service_pb2 import RecommendRequest, RecommendResponse
from serving.load import LEAST_QUALITY, LoadControl
from serving.recommender import Recommender


class Stuck:
    """A pipeline whose stages hear of no deadline."""

    async def recommend(self, query):
        await asyncio.sleep(60)

    def recommend_from_ladder(self, query):
        return RecommendResponse(degraded_reasons=query.trace.reasons)


async def test_stages_that_end_too_late_are_not_waited_for() -> None:
    recommender = recommender_of(Stuck(), 64)
    deadline = Deadline.after_ms(1000)
    answered = await recommender.recommend(RecommendRequest(user_id="ada"), deadline)
    assert answered.response.degraded_reasons == [types.DEGRADED_REASON_OVERLOADED]
    assert not deadline.expired()


class Turns(Stuck):
    """A pipeline of ten turns of the loop, as its stages have; notes what ends when."""

    def __init__(self) -> None:
        self.ended = []

    async def recommend(self, query):
        for _ in range(10):
            await asyncio.sleep(0)
        self.ended.append("ranked")
        return RecommendResponse()

    def recommend_from_ladder(self, query):
        self.ended.append("shed")
        return super().recommend_from_ladder(query)


def recommender_of(pipeline, limit: int) -> Recommender:
    settings = load_settings(overrides={"serving": {"max_concurrent_requests": limit}}).serving
    return Recommender(pipeline, SimpleNamespace(current=SimpleNamespace(catalog=None)), settings, SystemClock())


async def test_a_crowd_that_is_shed_leaves_the_loop_to_what_is_ranked() -> None:
    pipeline = Turns()
    recommender = recommender_of(pipeline, 1)
    asked = [RecommendRequest(user_id=f"u{n}") for n in range(100)]
    answered = await asyncio.gather(*(recommender.recommend(one, Deadline.after_ms(5000)) for one in asked))
    assert sum(not one.response.degraded_reasons for one in answered) == 1
    # Less than two are shed a turn.
    assert pipeline.ended.index("ranked") < 20


async def test_who_is_shed_and_has_little_time_does_not_wait_for_a_turn() -> None:
    recommender = recommender_of(Stuck(), 1)
    stuck = asyncio.create_task(recommender.recommend(RecommendRequest(user_id="ada"), Deadline.after_ms(5000)))
    await asyncio.sleep(0)
    async with recommender.shed_turn:
        deadline = Deadline.after_ms(200)
        answered = await recommender.recommend(RecommendRequest(user_id="bob"), deadline)
    assert answered.response.degraded_reasons == [types.DEGRADED_REASON_OVERLOADED]
    assert not deadline.expired()
    stuck.cancel()


def run(load, clock, rounds, at_once=1, share=0.1, late_ms=0.0) -> int:
    """Rounds of `at_once` requests that each take `share` of their time; returns how many were let in."""
    admitted = 0
    for _ in range(rounds):
        entered = sum(load.enter() for _ in range(at_once))
        clock.advance(20)
        for _ in range(entered):
            load.leave(share * 250, 250)
        load.tick(late_ms)
        admitted += entered
    return admitted


def test_a_crowd_is_let_in_step_by_step_then_nothing_is_held_back() -> None:
    clock = ManualClock()
    load = LoadControl(64, clock, cores=2)
    assert [load.enter() for _ in range(64)].count(True) == 8
    for _ in range(8):
        load.leave(10, 250)
    run(load, clock, 100, at_once=64)
    assert run(load, clock, 100, at_once=64) == 6400
    assert load.quality == 1.0


def test_after_a_pause_a_crowd_is_let_in_step_by_step_again() -> None:
    clock = ManualClock()
    load = LoadControl(64, clock, cores=2)
    run(load, clock, 100, at_once=64)
    run(load, clock, 100, at_once=0)
    assert load.limit == 8


def test_a_limit_of_the_settings_is_never_passed() -> None:
    clock = ManualClock()
    load = LoadControl(2, clock, cores=16)
    run(load, clock, 100, at_once=64)
    assert load.limit == 2


def test_late_answers_cost_quality_and_turn_nobody_away() -> None:
    clock = ManualClock()
    load = LoadControl(64, clock)
    run(load, clock, 100, at_once=32)
    assert run(load, clock, 100, at_once=32, share=0.8) == 3200
    assert load.quality == LEAST_QUALITY
    run(load, clock, 200, at_once=32)
    assert load.quality == 1.0


def test_quality_comes_back_when_nobody_asks_any_more() -> None:
    clock = ManualClock()
    load = LoadControl(64, clock)
    run(load, clock, 50, at_once=32, share=0.8)
    run(load, clock, 200, at_once=0)
    assert load.quality == 1.0


def test_a_late_loop_lowers_the_limit_and_a_punctual_one_raises_it() -> None:
    clock = ManualClock()
    load = LoadControl(64, clock)
    run(load, clock, 200, at_once=64)
    assert load.limit == 64
    run(load, clock, 200, at_once=64, late_ms=80)
    assert load.limit == 4
    assert [load.enter() for _ in range(10)].count(True) == 4
    for _ in range(4):
        load.leave(10, 250)
    run(load, clock, 50, at_once=64)
    assert 4 < load.limit < 8, "where things were late it goes slowly"
    run(load, clock, 400, at_once=8)
    run(load, clock, 100, at_once=64)
    assert load.limit == 64, "when that crowd has gone, another is met as the first was"


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 300), st.floats(0, 1000)), max_size=60))
def test_quality_and_limit_stay_within_their_bounds(rounds) -> None:
    clock = ManualClock()
    load = LoadControl(100, clock, cores=2)
    for share, at_once, late_ms in rounds:
        run(load, clock, 8, at_once, share, late_ms)
        assert LEAST_QUALITY <= load.quality <= 1
        assert 4 <= load.limit <= 100
