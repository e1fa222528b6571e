"""From each dependency's failure to the rung and the reason that the answer names; over real sockets."""

import asyncio
import time

import pytest
from confluent_kafka import Producer

from core.topics import Topics
from headrace.v1 import types_pb2 as types
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.types_pb2 import DegradedReason, ServingTier

from .conftest import NOWHERE, click, until


def tier(answer) -> str:
    return ServingTier.Name(answer.served_tier).removeprefix("SERVING_TIER_")


def reasons(answer) -> set[str]:
    return {DegradedReason.Name(reason).removeprefix("DEGRADED_REASON_") for reason in answer.degraded_reasons}


def ids(answer) -> list[str]:
    return [item.item_id for item in answer.items]


def ask(user_id="ada", **more) -> RecommendRequest:
    return RecommendRequest(user_id=user_id, dry_run=True, **more)


def assert_good(answer, count=20) -> None:
    assert len(answer.items) == count
    assert len(set(ids(answer))) == count
    assert [item.position for item in answer.items] == list(range(count))
    assert not {"item-197", "item-198", "item-199"} & set(ids(answer))


async def test_everything_up_serves_ranked(house) -> None:
    house.put_user(batch=(60, 61))
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert tier(answer) == "RANKED"
    assert reasons(answer) == set()
    assert answer.state_revision == 2
    assert answer.features_as_of_time.seconds > 0
    assert answer.versions.bundle_version == "v1"
    assert [timing.stage for timing in answer.stage_timings] == [
        "hydrate",
        "retrieve",
        "filter",
        "rank",
        "rerank",
        "select",
    ]
    assert all(item.title and item.reasons and item.propensity == 1 for item in answer.items)
    assert {source for item in answer.items for source in item.sources} >= {"ann", "item_to_item"}
    # What the user clicked is not shown again.
    assert not {"item-004", "item-008"} & set(ids(answer))


async def test_ranker_timeout_serves_reranked_batch(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    house.ranker.mode = "hang"
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert tier(answer) == "RERANKED_BATCH"
    assert reasons(answer) == {"RANKER_TIMEOUT"}

    # The loser is cancelled, not left running.
    async def is_cancelled() -> bool:
        return house.ranker.cancelled > 0

    await until(is_cancelled)


async def test_ranker_down_serves_reranked_batch(house) -> None:
    house.put_user()
    recommender, _ = await house.open(ranker_target=NOWHERE)
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert tier(answer) == "RERANKED_BATCH"
    assert "RANKER_UNAVAILABLE" in reasons(answer)


async def test_ranker_back_serves_ranked_again(house) -> None:
    house.put_user()
    recommender, _ = await house.open(breaker_open_ms=100)
    house.ranker.mode = "fail"
    for _ in range(7):
        answer = await recommender.Recommend(ask())
    assert reasons(answer) == {"RANKER_UNAVAILABLE", "BREAKER_OPEN"}
    asked = len(house.ranker.requests)
    await recommender.Recommend(ask())
    assert len(house.ranker.requests) == asked, "an open breaker asks nobody"
    house.ranker.mode = "answer"

    async def is_ranked() -> bool:
        answer = await recommender.Recommend(ask())
        return tier(answer) == "RANKED" and not reasons(answer)

    await until(is_ranked, 5)


async def test_a_request_that_a_neighbour_refuses_does_not_shut_it_off_for_the_others(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    house.candidate.mode = "refuse"
    for _ in range(10):
        answer = await recommender.Recommend(ask())
        assert "RETRIEVAL_UNAVAILABLE" in reasons(answer)
        assert "BREAKER_OPEN" not in reasons(answer)
    house.candidate.mode = "answer"
    assert not reasons(await recommender.Recommend(ask()))


async def test_candidate_down_serves_ranked_from_batch_scores_and_trending(house) -> None:
    house.put_user(batch=range(60, 70))
    recommender, _ = await house.open(candidate_target=NOWHERE)
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert tier(answer) == "RANKED"
    assert "RETRIEVAL_UNAVAILABLE" in reasons(answer)
    assert {source for item in answer.items for source in item.sources} == {"batch", "trending"}


async def test_candidate_timeout_is_named(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    house.candidate.mode = "hang"
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert "RETRIEVAL_TIMEOUT" in reasons(answer)


async def test_candidate_and_ranker_down_serves_reranked_batch_scores(house) -> None:
    house.put_user(batch=range(60, 90))
    recommender, _ = await house.open(candidate_target=NOWHERE, ranker_target=NOWHERE)
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert tier(answer) == "RERANKED_BATCH"
    assert {"RETRIEVAL_UNAVAILABLE", "RANKER_UNAVAILABLE"} <= reasons(answer)


async def test_candidate_and_ranker_down_without_batch_scores_serves_popular(house) -> None:
    house.put_user()
    recommender, _ = await house.open(candidate_target=NOWHERE, ranker_target=NOWHERE)
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert tier(answer) == "POPULAR"
    assert not {"item-004", "item-008"} & set(ids(answer)), "the history is known, so seen items stay out"


async def test_redis_down_serves_last_good_then_popular(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    before = await recommender.Recommend(ask())
    house.stop_redis()
    answer = await recommender.Recommend(ask(num_items=20))
    assert tier(answer) == "LAST_GOOD"
    assert {"STORE_UNAVAILABLE", "SEEN_UNKNOWN"} <= reasons(answer)
    assert ids(answer) == ids(before)
    answer = await recommender.Recommend(ask("stranger"))
    assert tier(answer) == "POPULAR"
    assert "UNKNOWN_USER" not in reasons(answer), "nobody could say whether the user is known"
    assert_good(answer)


async def test_an_erased_user_has_no_last_good_answer(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    await recommender.Recommend(ask())
    house.stop_redis()
    assert tier(await recommender.Recommend(ask())) == "LAST_GOOD"
    kafka = house.settings_of({}).kafka
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})

    async def is_forgotten() -> bool:
        producer.produce(Topics(kafka.topic_prefix).users, None, b"ada")
        producer.flush(5)
        return tier(await recommender.Recommend(ask())) != "LAST_GOOD"

    await until(is_forgotten)


async def test_redis_down_with_session_events_is_still_personal(house) -> None:
    recommender, _ = await house.open()
    house.stop_redis()
    answer = await recommender.Recommend(ask(session_events=[click(4)]))
    assert tier(answer) == "RANKED"
    assert "STORE_UNAVAILABLE" in reasons(answer)
    assert "item-004" not in ids(answer)


@pytest.mark.parametrize("deadline_seconds", [None, 0.25, 0.1])
async def test_hanging_redis_within_deadline(house, deadline_seconds) -> None:
    house.put_user()
    recommender, _ = await house.open()
    await recommender.Recommend(ask())
    house.freeze_redis()
    start = time.monotonic()
    answer = await recommender.Recommend(ask(), timeout=deadline_seconds)
    assert time.monotonic() - start < (deadline_seconds or 0.25)
    assert tier(answer) == "LAST_GOOD"
    assert "STORE_TIMEOUT" in reasons(answer)
    assert_good(answer)


async def test_everything_down_serves_popular(house) -> None:
    house.overrides.update(redis="redis://" + NOWHERE, kafka=NOWHERE)
    recommender, _ = await house.open(candidate_target=NOWHERE, ranker_target=NOWHERE)
    answer = await recommender.Recommend(ask())
    assert_good(answer)
    assert tier(answer) == "POPULAR"
    assert ids(answer)[:3] == ["item-000", "item-001", "item-002"]
    assert "STORE_UNAVAILABLE" in reasons(answer)
    # Nothing of it was a caller's fault, so readiness does not depend on anybody else.
    assert house.process.readiness.problems() == []


async def test_everything_hanging_within_deadline(house) -> None:
    house.put_user(batch=range(60, 90))
    recommender, _ = await house.open()
    house.candidate.mode = house.ranker.mode = "hang"
    for deadline_seconds in (0.25, 0.1):
        start = time.monotonic()
        answer = await recommender.Recommend(ask(), timeout=deadline_seconds)
        assert time.monotonic() - start < deadline_seconds
        assert tier(answer) == "RERANKED_BATCH"
        assert_good(answer)


async def test_unknown_user_serves_popular(house) -> None:
    recommender, _ = await house.open()
    answer = await recommender.Recommend(ask("nobody"))
    assert_good(answer)
    assert tier(answer) == "POPULAR"
    assert reasons(answer) == {"UNKNOWN_USER"}
    assert not house.candidate.requests[3:], "there is nothing to ask with"


async def test_unknown_user_of_a_segment_serves_popular_segment(house) -> None:
    recommender, _ = await house.open()
    request = ask("nobody", num_items=5)
    request.context.tags["segment"] = "anglers"
    answer = await recommender.Recommend(request)
    assert tier(answer) == "POPULAR_SEGMENT"
    assert ids(answer) == ["item-050", "item-051", "item-000", "item-001", "item-002"]


async def test_deadline_100ms_is_kept(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    await recommender.Recommend(ask())
    for mode in ("answer", "hang"):
        house.ranker.mode = mode
        for _ in range(3):
            start = time.monotonic()
            answer = await recommender.Recommend(ask(), timeout=0.1)
            assert time.monotonic() - start < 0.1
            assert_good(answer)
    assert {"RANKER_TIMEOUT", "DEADLINE_SHORT"} <= reasons(answer)


async def test_hardly_any_time_serves_from_memory(house) -> None:
    house.put_user()
    recommender, _ = await house.open(deadline_ms=3)
    answer = await recommender.Recommend(ask())
    assert tier(answer) == "POPULAR"
    assert "DEADLINE_SHORT" in reasons(answer)
    assert_good(answer)


async def test_overload_is_answered_from_the_lower_rungs(house) -> None:
    house.put_user()
    recommender, _ = await house.open(max_concurrent_requests=2)
    house.ranker.mode = "hang"
    answers = await asyncio.gather(*(recommender.Recommend(ask()) for _ in range(8)))
    shed = [answer for answer in answers if "OVERLOADED" in reasons(answer)]
    assert len(shed) == 6
    assert all(tier(answer) in ("POPULAR", "LAST_GOOD") for answer in shed)
    for answer in answers:
        assert_good(answer)


async def test_a_neighbour_of_another_bundle_is_named(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    house.ranker.bundle_version = "v0"
    answer = await recommender.Recommend(ask())
    assert tier(answer) == "RANKED"
    assert reasons(answer) == {"VERSION_MISMATCH"}


async def test_a_ladder_without_ranker_asks_no_ranker(house) -> None:
    house.put_user()
    recommender, _ = await house.open(ladder=["reranked_batch", "popular"])
    answer = await recommender.Recommend(ask())
    assert answer.served_tier == types.SERVING_TIER_RERANKED_BATCH
    assert not house.ranker.requests
