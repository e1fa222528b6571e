"""What cannot be processed is set aside, with its bytes, its place and the reason."""

import threading
from concurrent.futures import Future

import pytest
from confluent_kafka import Consumer, TopicPartition

from core.codec import from_ms
from core.errors import StageError
from core.topics import Topics, dead_letter
from features.definitions import USER_STATE
from features.stores.online import OnlineStore, Write
from headrace.v1.events_pb2 import DeadLetter, Event
from streams.dead_letters import DeadLetters, as_letter
from streams.processor import RawMessage

NOW_MS = 1_700_000_000_000


def event(user_id: str, event_id: str = "e") -> bytes:
    return Event(
        event_id=event_id, user_id=user_id, item_id="i", kind="click", event_time=from_ms(NOW_MS)
    ).SerializeToString()


def read_letters(settings, topic: str) -> list[DeadLetter]:
    kafka = settings.kafka
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": "letters", "fetch.wait.max.ms": 5})
    letters = []
    try:
        ends = {}
        for partition in range(4):
            ends[partition] = consumer.get_watermark_offsets(TopicPartition(dead_letter(topic), partition))[1]
        consumer.assign([TopicPartition(dead_letter(topic), partition, 0) for partition in ends])
        while len(letters) < sum(ends.values()):
            letters += [DeadLetter.FromString(message.value()) for message in consumer.consume(100, 0.1)]
    finally:
        consumer.close()
    return letters


def test_letters_carry_bytes_place_and_reason_and_the_reader_goes_on(
    shared_redis, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(shared_redis)
    topic = Topics(settings.kafka.topic_prefix).events
    part = start_reader(settings)
    bad = kafka_producer.send(topic, b"u", b"\xff\xff", {"trace": b"\x00\x01"})
    foreign = kafka_producer.send(topic, b"other", event("u"))
    good = kafka_producer.send(topic, b"u", event("u"))
    written = [future.result(10) for future in (bad, foreign, good)]
    part.wait_for(written)
    letters = {(letter.partition, letter.offset): letter for letter in read_letters(settings, topic)}
    assert set(letters) == {(one.partition, one.offset) for one in written[:2]}
    letter = letters[written[0].partition, written[0].offset]
    assert (letter.topic, letter.key, letter.value) == (topic, b"u", b"\xff\xff")
    assert dict(letter.headers) == {"trace": b"\x00\x01"}
    assert "not protobuf of Event" in letter.reason
    assert letter.dead_letter_time.seconds > 0
    assert letters[written[1].partition, written[1].offset].reason.startswith("key:")
    assert OnlineStore(settings.redis, settings.features.project).read(USER_STATE, [("u",)])[0].cells["revision"] == 1


def test_a_row_that_cannot_be_read_sets_its_users_events_aside_and_no_others(
    shared_redis, stream_settings, start_reader, kafka_producer
) -> None:
    settings = stream_settings(shared_redis)
    topic = Topics(settings.kafka.topic_prefix).events
    store = OnlineStore(settings.redis, settings.features.project)
    store.write([Write(USER_STATE, ("broken",), {"state": b"\xff\xff", "revision": 3})])
    part = start_reader(settings)
    sent = [kafka_producer.send(topic, user.encode(), event(user)) for user in ("broken", "fine")]
    part.wait_for([future.result(10) for future in sent])
    letters = read_letters(settings, topic)
    assert [(letter.key, "cannot be read" in letter.reason) for letter in letters] == [(b"broken", True)]
    assert store.read(USER_STATE, [("fine",)])[0].cells["revision"] == 1
    assert store.read(USER_STATE, [("broken",)])[0].cells["revision"] == 3


def test_letters_that_no_topic_would_take_are_cut_and_say_so() -> None:
    raw = RawMessage("t", 0, 1, b"k" * 200_000, b"v" * 3_000_000, [("h", b"x" * 1_000_000)], NOW_MS)
    letter = as_letter(raw, "too much", NOW_MS)
    assert letter.ByteSize() < 1_000_000
    for said in ("key cut from 200000", "value cut from 3000000", "headers left out"):
        assert said in letter.reason
    assert letter.value == b"v" * len(letter.value)


class AwayProducer:
    """A Kafka that takes nothing `failures` times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.sent = failures, []

    def send(self, topic, key, value, headers=None):
        done: Future = Future()
        if self.failures > 0:
            self.failures -= 1
            done.set_exception(StageError("kafka", "away"))
        else:
            self.sent.append(topic)
            done.set_result(None)
        return done


@pytest.mark.parametrize("failures", [0, 3])
def test_a_letter_is_sent_until_kafka_has_it(failures) -> None:
    producer = AwayProducer(failures)
    raw = RawMessage("t", 0, 1, b"k", b"v", None, NOW_MS)
    assert DeadLetters(producer).deliver([(raw, "why"), (raw, "why")], threading.Event())
    assert producer.sent == ["t.dead-letter", "t.dead-letter"]


def test_a_worker_that_stops_does_not_claim_delivery() -> None:
    stopping = threading.Event()
    stopping.set()
    raw = RawMessage("t", 0, 1, b"k", b"v", None, NOW_MS)
    assert not DeadLetters(AwayProducer(99)).deliver([(raw, "why")], stopping)
