"""Events in, changed answers out; bad ones set aside."""

import time
from uuid import uuid4

import pytest
from confluent_kafka import Consumer
from google.protobuf import json_format

from core.codec import from_ms
from core.kafka import KafkaProducer, client_config
from core.topics import Topics, dead_letter
from devstack.click_probe import click_series
from features import windows
from features.definitions import USER_EMBEDDING, USER_STATE
from headrace.v1.events_pb2 import DeadLetter, Event, Item

pytestmark = pytest.mark.e2e


def now(shift_ms: int = 0):
    return from_ms(time.time_ns() // 1_000_000 + shift_ms)


@pytest.fixture
def producer(running):
    producer = KafkaProducer(running.stack.settings.kafka)
    yield producer
    producer.close()


def test_clicks_change_answers(running) -> None:
    report = click_series(running.backend, running.sender, running.users[10:30], lambda _: [])
    assert report.never_reflected == 0
    assert len(report.changed_ms) >= 0.8 * len(report.clicks)


def test_a_click_moves_the_state_and_then_the_vector(running) -> None:
    store, user_id = running.store(), running.users[30]
    before = store.read(USER_STATE, [(user_id,)])[0].cells["revision"]
    running.sender.click(user_id, next(iter(running.data.log.items())).item_id).result(10)

    def encoded() -> bool:
        return store.read(USER_EMBEDDING, [(user_id,)])[0].cells.get("embedding_revision", -1) > before

    running.await_until(encoded)
    assert store.read(USER_STATE, [(user_id,)])[0].cells["revision"] == before + 1
    store.close()


def test_the_same_event_twice_counts_once_also_as_json(running, producer) -> None:
    store, user_id = running.store(), f"new-{uuid4().hex}"
    topic = Topics(running.stack.settings.kafka.topic_prefix).events
    event = Event(event_id=uuid4().hex, user_id=user_id, item_id="x", kind="click", event_time=now(-1))
    # A millisecond later: events of one time are in the order of their ids.
    last = Event(event_id=uuid4().hex, user_id=user_id, item_id="y", kind="view", event_time=now())
    producer.send(topic, user_id.encode(), event.SerializeToString())
    as_json = json_format.MessageToJson(event).encode()
    producer.send(topic, user_id.encode(), as_json, {"content-type": b"application/json"})
    producer.send(topic, user_id.encode(), last.SerializeToString()).result(10)

    def state():
        blob = store.read(USER_STATE, [(user_id,)])[0].cells.get("state", b"")
        found = windows.decode(blob)
        return found if found.history and found.history[-1].item_id == "y" else None

    found = running.await_until(state)
    assert (found.revision, found.duplicate_count) == (2, 1)
    store.close()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\xff\xff not protobuf", "protobuf"),
        (Event(event_id="e", user_id="bad", kind="click", event_time=from_ms(1_700_000_000_000)).SerializeToString(),
         "item_id"),
    ],
    ids=["random-bytes", "no-item"],
)  # fmt: skip
def test_a_malformed_event_is_dead_lettered_with_its_reason_and_the_worker_goes_on(
    running, producer, value, reason
) -> None:
    settings = running.stack.settings.kafka
    topic = Topics(settings.topic_prefix).events
    written = producer.send(topic, b"bad", value).result(10)
    good_user = f"after-{uuid4().hex}"
    good = Event(event_id=uuid4().hex, user_id=good_user, item_id="x", kind="click", event_time=now())
    producer.send(topic, good_user.encode(), good.SerializeToString()).result(10)
    store = running.store()
    running.await_until(lambda: store.read(USER_STATE, [(good_user,)])[0].time_ms)
    store.close()
    consumer = Consumer(
        {**client_config(settings), "group.id": uuid4().hex, "auto.offset.reset": "earliest", "fetch.wait.max.ms": 5}
    )
    consumer.subscribe([dead_letter(topic)])

    def found() -> DeadLetter | None:
        for message in consumer.consume(100, 0.1):
            if message.error() is None:
                letter = DeadLetter.FromString(message.value())
                if (letter.partition, letter.offset) == (written.partition, written.offset):
                    return letter
        return None

    letter = running.await_until(found)
    consumer.close()
    assert letter.value == value
    assert reason in letter.reason
    assert letter.topic == topic


def test_a_new_item_is_recommended_and_a_removed_one_is_not(running, producer) -> None:
    """Through the content tower: nobody has ever touched it."""
    topic = Topics(running.stack.settings.kafka.topic_prefix).items
    liked = next(iter(running.data.log.items()))
    item = Item(item_id=f"new-{uuid4().hex}", title="Brand new", categories=liked.categories, publish_time=now())
    producer.send(topic, item.item_id.encode(), item.SerializeToString()).result(10)

    def shown() -> bool:
        answers = [running.backend.recommend(user_id, 500) for user_id in running.users[:3]]
        return any(found.item_id == item.item_id for answer in answers if answer for found in answer.items)

    running.await_until(shown)
    producer.send(topic, item.item_id.encode(), None).result(10)
    running.await_until(lambda: not shown())
