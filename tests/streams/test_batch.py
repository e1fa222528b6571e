"""One poll, sorted out."""

import pytest

from core.codec import from_ms
from core.topics import Topics
from headrace.v1.events_pb2 import Event
from streams import metrics
from streams.batch import Batch, sort_out

TOPICS = Topics()
SOURCES = {topic: number for number, topic in enumerate(TOPICS.user_keyed)}
NOW_MS = 1_700_000_000_000


class Message:
    """As the client gives it; with an error, nothing else."""

    def __init__(self, offset: int = 0, *, partition: int = 0, value: bytes | None = None, error: object = None):
        event = Event(event_id=f"e{offset}", user_id="u", item_id="i", kind="click", event_time=from_ms(NOW_MS))
        value = event.SerializeToString() if value is None else value
        self.topic, self.partition, self.offset = (lambda: TOPICS.events), (lambda: partition), (lambda: offset)
        self.key, self.value, self.headers = (lambda: b"u"), (lambda: value), list
        self.timestamp, self.error = (lambda: (1, NOW_MS)), (lambda: error)


def sorted_out(*messages: Message, processed: int = 9, on_error=None) -> Batch:
    where = (TOPICS.events, 0)
    return sort_out(messages, {0}, {where: processed}, TOPICS, SOURCES, on_error or pytest.fail)


def missed() -> float:
    return metrics.MISSED.labels(TOPICS.events)._value.get()


def test_each_message_is_received_or_a_letter_or_of_a_partition_that_is_not_read() -> None:
    batch = sorted_out(Message(10), Message(11, value=b"\xff\xff"), Message(12), Message(5, partition=1))
    assert [received.raw.offset for received in batch.received] == [10, 12]
    assert [raw.offset for raw, _ in batch.letters] == [11]
    assert batch.last == {(TOPICS.events, 0): 12}
    assert {where: len(rows) for where, rows in batch.rows().items()} == {(TOPICS.events, 0): 2}


def test_a_batch_of_letters_still_moves_the_event_log() -> None:
    assert sorted_out(Message(10, value=b"\xff\xff")).rows() == {(TOPICS.events, 0): []}


def test_what_kafka_dropped_is_counted_within_a_batch_and_before_it() -> None:
    before = missed()
    sorted_out(Message(10), Message(11))
    assert missed() == before
    sorted_out(Message(13), Message(14), Message(20))
    assert missed() == before + 3 + 5


def test_errors_come_to_the_reader_in_place_of_messages() -> None:
    told: list[object] = []
    batch = sorted_out(Message(error="away"), Message(10), on_error=told.append)
    assert told == ["away"]
    assert [received.raw.offset for received in batch.received] == [10]
