"""Events in over gRPC: acknowledged when in Kafka, one result each; and impressions out; on a real broker protocol."""

import asyncio
import contextlib
import time

import grpc
import pytest
from confluent_kafka import Consumer, TopicPartition

from core.kafka import KafkaProducer, topic_sources
from core.topics import Topics
from headrace.v1.events_pb2 import Event, Feedback, ImpressionList, Item
from headrace.v1.ingest_service_pb2 import SendEventsRequest, SendFeedbackRequest
from headrace.v1.types_pb2 import ItemFilter

from .conftest import NOWHERE, angler, click, item_id, until
from .test_tiers import ask, ids, tier


def topics_of(house) -> Topics:
    return Topics(house.settings_of({}).kafka.topic_prefix)


def read(house, topic, partition=None, offset=0, count=1):
    """Messages of a topic, as they lie there."""
    consumer = Consumer({"bootstrap.servers": house.settings_of({}).kafka.bootstrap_servers, "group.id": "test"})
    try:
        partitions = [partition] if partition is not None else range(4)
        consumer.assign([TopicPartition(topic, p, offset) for p in partitions])
        found, end = [], time.monotonic() + 10
        while len(found) < count and time.monotonic() < end:
            found += [message for message in consumer.consume(count, 0.1) if message.error() is None]
        return found
    finally:
        consumer.close()


async def test_events_are_in_kafka_when_acknowledged(house) -> None:
    _, ingest = await house.open()
    response = await ingest.SendEvents(SendEventsRequest(events=[click(5, f"e{n}", "ada") for n in range(3)]))
    topic = topics_of(house).events
    tokens = [result.token for result in response.results]
    assert [result.event_id for result in response.results] == ["e0", "e1", "e2"]
    assert len({token.partition for token in tokens}) == 1
    assert [token.offset - tokens[0].offset for token in tokens] == [0, 1, 2]
    assert {token.source for token in tokens} == {topic_sources(house.settings_of({}).kafka, [topic])[topic]}
    (message,) = await asyncio.to_thread(read, house, topic, tokens[1].partition, tokens[1].offset)
    event = Event.FromString(message.value())
    assert (message.key(), event.event_id) == (b"ada", "e1")
    # item-005 is soap; the producer did not say so.
    assert event.categories == ["soap"]


async def test_events_take_the_segment_of_their_users_profile(house) -> None:
    house.put_user(profile=angler())
    _, ingest = await house.open()
    sent = [click(1, "a", "ada"), click(1, "b", "ada", segment="own"), click(1, "c", "stranger")]
    response = await ingest.SendEvents(SendEventsRequest(events=sent))
    found = {}
    for result in response.results:
        token = result.token
        (message,) = await asyncio.to_thread(read, house, token.topic, token.partition, token.offset)
        found[result.event_id] = Event.FromString(message.value()).segment
    assert found == {"a": "anglers", "b": "own", "c": ""}


@pytest.mark.parametrize("how", ["stop_redis", "freeze_redis"])
async def test_without_redis_events_are_taken_without_a_segment(house, how) -> None:
    house.put_user(profile=angler())
    _, ingest = await house.open()
    getattr(house, how)()
    response = await ingest.SendEvents(SendEventsRequest(events=[click(1, "a", "ada")]), timeout=2)
    token = response.results[0].token
    (message,) = await asyncio.to_thread(read, house, token.topic, token.partition, token.offset)
    assert Event.FromString(message.value()).segment == ""


async def test_feedback_goes_to_its_own_topic(house) -> None:
    _, ingest = await house.open()
    given = Feedback(event_id="f", user_id="ada", item_id="item-001", kind="like", recommendation_id="r")
    given.event_time.CopyFrom(click(1).event_time)
    response = await ingest.SendFeedback(SendFeedbackRequest(feedback=[given]))
    token = response.results[0].token
    assert token.topic == topics_of(house).feedback
    (message,) = await asyncio.to_thread(read, house, token.topic, token.partition, token.offset)
    assert Feedback.FromString(message.value()).recommendation_id == "r"


async def test_a_bad_event_fails_alone(house) -> None:
    _, ingest = await house.open()
    bad = Event(event_id="bad", user_id="ada", item_id="a", kind="click")
    response = await ingest.SendEvents(SendEventsRequest(events=[click(1, "good", "ada"), bad]))
    assert response.results[0].HasField("token")
    error = response.results[1].error
    assert (error.code, error.field) == ("INVALID_ARGUMENT", "events[1].event_time")


@pytest.mark.parametrize("count", [0, 1001])
async def test_the_number_of_events_is_limited(house, count) -> None:
    _, ingest = await house.open()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ingest.SendEvents(SendEventsRequest(events=[click(1, "a", "ada")] * count))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_kafka_away_is_unavailable_with_a_delay_and_recommending_goes_on(house) -> None:
    house.overrides["kafka"] = NOWHERE
    house.put_user()
    recommender, ingest = await house.open()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ingest.SendEvents(SendEventsRequest(events=[click(1, "a", "ada")]))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(caught.value.trailing_metadata())["retry-after-ms"] == "1000"
    answer = await recommender.Recommend(ask())
    assert tier(answer) == "RANKED"


async def test_kafka_away_is_said_before_the_callers_deadline(house) -> None:
    house.overrides["kafka"] = NOWHERE
    _, ingest = await house.open()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ingest.SendEvents(SendEventsRequest(events=[click(1, "a", "ada")]), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "send the same events again" in (caught.value.details() or "")


async def test_callers_that_give_up_do_not_break_ingestion_for_others(house) -> None:
    _, ingest = await house.open()
    for n in range(20):
        with contextlib.suppress(grpc.aio.AioRpcError):
            await ingest.SendEvents(SendEventsRequest(events=[click(1, f"a{n}", "ada")] * 100), timeout=0.004)
    response = await ingest.SendEvents(SendEventsRequest(events=[click(1, "last", "ada")]), timeout=5)
    assert response.results[0].HasField("token")


async def test_impressions_of_an_answer_reach_kafka(house) -> None:
    house.put_user()
    recommender, _ = await house.open()
    request = ask(num_items=3, experiment_arm="blue")
    await recommender.Recommend(request)
    request.dry_run = False
    answer = await recommender.Recommend(request)
    (message,) = await asyncio.to_thread(read, house, topics_of(house).impressions)
    shown = ImpressionList.FromString(message.value())
    assert shown.recommendation_id == answer.recommendation_id, "a dry run is not logged"
    assert (message.key(), shown.user_id, shown.served_tier) == (b"ada", "ada", "ranked")
    assert (shown.bundle_version, shown.experiment_arm) == ("v1", "blue")
    assert [impression.item_id for impression in shown.impressions] == ids(answer)
    assert [impression.propensity for impression in shown.impressions] == [1.0] * 3


async def test_the_catalogue_follows_the_items_topic(house) -> None:
    """A removed item leaves the answers, a new one can be shown, within seconds and without a restart."""
    recommender, _ = await house.open()
    producer = KafkaProducer(house.settings_of({}).kafka)
    topic = topics_of(house).items
    producer.send(topic, item_id(0).encode(), None).result(10)
    producer.send(topic, b"broken", b"\xff\xff").result(10)
    fresh = Item(item_id="fresh", title="Fresh", categories=["only-here"])
    producer.send(topic, b"fresh", fresh.SerializeToString()).result(10)
    producer.close()

    async def is_removed() -> bool:
        return ids(await recommender.Recommend(ask("nobody")))[0] == "item-001"

    async def is_added() -> bool:
        request = ask("nobody", filter=ItemFilter(categories_any=["only-here"]))
        return ids(await recommender.Recommend(request)) == ["fresh"]

    await until(is_removed)
    await until(is_added)
