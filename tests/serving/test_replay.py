"""Past answers made again, and what keeps one from being the same; over real sockets."""

import asyncio
import json
from functools import partial

import grpc
import pytest
from confluent_kafka import Producer

from core.topics import Topics
from headrace.v1 import recommender_service_pb2 as pb
from headrace.v1.answer_record_pb2 import AnswerRecord
from headrace.v1.recommender_service_pb2 import RecommendRequest
from headrace.v1.types_pb2 import Context
from serving.answer_log import AnswerLog

from .conftest import click, until, write_bundle
from .test_files import write
from .test_tiers import ids, reasons


async def replay(recommender, answer, user_id="ada") -> pb.ReplayRecommendationResponse:
    request = pb.ReplayRecommendationRequest(recommendation_id=answer.recommendation_id, user_id=user_id)
    return await recommender.ReplayRecommendation(request)


REQUESTS = {
    "plain": {},
    "session": {"session_events": [click(101, "a", "ada")]},
    "exploring": {"context": Context(surface="lab")},
    "filtered": {"min_score": 0.12, "num_items": 7},
    "later": {"context": Context(tags={"segment": "anglers"}), "with_cursor": True},
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_an_answer_is_made_again_although_the_world_has_moved_on(house, name) -> None:
    house.put_user(batch=(60, 61))
    recommender, _ = await house.open(surfaces={"lab": {"exploration_rate": 1.0}}, fatigue_weight=0.5)
    for _ in range(3):
        answer = await recommender.Recommend(RecommendRequest(user_id="ada", **REQUESTS[name]))
    # Other state, another ranker, more fatigue: none of it is asked.
    house.put_user(clicked=(1, 2, 3, 4, 5))
    house.ranker.mode = "fail"
    await recommender.Recommend(RecommendRequest(user_id="ada"))
    again = await replay(recommender, answer)
    assert list(again.differences) == []
    assert again.matches
    assert ids(again.logged) == ids(again.rebuilt) == ids(answer)


async def test_answers_without_the_ranker_and_from_the_ladder_are_made_again(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    house.ranker.mode = "fail"
    poorer = await recommender.Recommend(RecommendRequest(user_id="ada"))
    stranger = await recommender.Recommend(RecommendRequest(user_id="stranger"))
    assert (await replay(recommender, poorer)).matches
    assert (await replay(recommender, stranger, "stranger")).matches


async def test_later_pages_are_made_again(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    first = await recommender.Recommend(RecommendRequest(user_id="ada", with_cursor=True))
    second = await recommender.Recommend(RecommendRequest(user_id="ada", cursor=first.next_cursor))
    again = await replay(recommender, second)
    assert again.matches
    assert again.rebuilt.items[0].position == 20


async def test_an_answer_of_the_bundle_before_is_made_again_with_that_bundle(house, registry) -> None:
    house.put_user()
    recommender, _ = await house.open()
    answer = await recommender.Recommend(RecommendRequest(user_id="ada"))
    write_bundle(registry, house.settings_of({}).features, "v2")

    async def is_swapped() -> bool:
        return (await recommender.GetModelInfo(pb.GetModelInfoRequest())).versions.bundle_version == "v2"

    await until(is_swapped)
    assert (await replay(recommender, answer)).matches


async def test_what_has_changed_since_is_named(house, tmp_path) -> None:
    house.put_user()
    path = tmp_path / "rules.json"
    recommender, _ = await house.open(rules_path=str(path))
    answer = await recommender.Recommend(RecommendRequest(user_id="ada"))
    write(path, json.dumps({"pin": [{"item_id": ids(answer)[5], "position": 0}]}))

    async def is_different() -> bool:
        return not (await replay(recommender, answer)).matches

    await until(is_different)
    differences = list((await replay(recommender, answer)).differences)
    assert differences[0].startswith("position 0: ")
    assert "the rules have changed since" in differences


async def test_what_is_not_kept_is_not_found(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    seen = await recommender.Recommend(RecommendRequest(user_id="ada"))
    preview = await recommender.Recommend(RecommendRequest(user_id="ada", dry_run=True))
    for answer, user_id in ((preview, "ada"), (seen, "bob")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replay(recommender, answer, user_id)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_an_erased_user_leaves_no_record(house, tmp_path) -> None:
    house.put_user()
    recommender, _ = await house.open()
    answer = await recommender.Recommend(RecommendRequest(user_id="ada"))
    assert (await replay(recommender, answer)).matches
    kafka = house.settings_of({}).kafka
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})

    async def is_gone() -> bool:
        producer.produce(Topics(kafka.topic_prefix).users, None, b"ada")
        producer.flush(5)
        try:
            await replay(recommender, answer)
        except grpc.aio.AioRpcError as error:
            return error.code() == grpc.StatusCode.NOT_FOUND
        return False

    await until(is_gone)
    files = list((tmp_path / "serving" / "answers").iterdir())
    assert files
    assert not any(b"ada" in file.read_bytes() for file in files)
    # Nor does a later answer leave one.
    later = await recommender.Recommend(RecommendRequest(user_id="ada"))
    assert "UNKNOWN_USER" not in reasons(later)
    await asyncio.sleep(0)
    assert await is_gone()


def record(number: int, size: int = 1000) -> AnswerRecord:
    made = AnswerRecord(trending=bytes(size))
    made.request.user_id = f"user-{number}"
    made.response.recommendation_id = f"answer-{number}"
    return made


def test_the_oldest_records_make_room(tmp_path) -> None:
    log = AnswerLog(tmp_path, 1)
    for number in range(2000):
        log.keep(partial(record, number))
        if number % 100 == 0:
            assert log.find(f"answer-{number}") is not None
    assert log.find("answer-0") is None
    assert log.find("answer-1999").request.user_id == "user-1999"
    assert sum(file.stat().st_size for file in (tmp_path / "answers").iterdir()) <= 1024 * 1024
    log.close()
    # A new process begins with none.
    assert AnswerLog(tmp_path, 1).find("answer-1999") is None


def test_without_room_nothing_is_kept(tmp_path) -> None:
    for log in (AnswerLog(tmp_path, 0), AnswerLog(None, 10)):
        assert not log.is_kept
        log.close()
    assert not list(tmp_path.iterdir())
