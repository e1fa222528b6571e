"""What follows topics survives what it reads; against an embedded broker."""

import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from core.kafka import KafkaProducer, Record, TopicFollower, client_config, delivery_problem, headers_of
from core.settings import load_settings


@pytest.mark.parametrize("gather_ms", [0, 200])
def test_a_record_that_cannot_be_applied_is_left_out_and_the_others_go_on(
    embedded_kafka: dict[str, Any], gather_ms: int
) -> None:
    topic = f"follow-{uuid.uuid4().hex}"
    settings = load_settings(overrides={"kafka": embedded_kafka}).kafka
    producer, applied = KafkaProducer(settings), list[bytes]()

    def apply(records: list[Record]) -> None:
        for record in records:
            if record.key == b"poison":
                raise OverflowError("too large")
            applied.append(record.key)

    for key in (b"before", b"poison", b"after"):
        producer.send(topic, key, b"value").result(10)
    follower = TopicFollower(settings, [topic], apply, gather_ms=gather_ms)
    follower.start()
    try:
        assert follower.caught_up.wait(30)
        assert {b"before", b"after"} == set(applied)
        producer.send(topic, b"later", b"value").result(10)
        _until(lambda: b"later" in applied)
    finally:
        follower.stop()
        producer.close()


@pytest.mark.parametrize(("offset", "is_delivered"), [(0, True), (7, True), (None, False)])
def test_a_message_without_an_offset_is_not_delivered(offset: int | None, is_delivered: bool) -> None:
    """That of a message which a broker refused as out of order, and which is nowhere in its log."""

    class Reported:
        def offset(self) -> int | None:
            return offset

    assert (delivery_problem(None, Reported()) is None) is is_delivered  # type: ignore[arg-type]


def test_what_librdkafka_repeats_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = client_config(load_settings().kafka)["logger"]
    for after_ms in range(100):
        logger.error("FAIL [%s]: %s", "producer-1", f"Connection refused (after {after_ms}ms in state CONNECT)")
    logger.error("FAIL [%s]: %s", "producer-2", "Connection refused (after 0ms in state CONNECT)")
    assert len(caplog.records) == 2


def _until(check: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("error", [SystemError, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")])
def test_headers_whose_names_the_client_cannot_read_are_left_out(error) -> None:
    class Unreadable:
        def headers(self) -> None:
            raise error

    assert headers_of(Unreadable()) is None
