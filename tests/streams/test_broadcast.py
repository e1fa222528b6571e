"""The broadcast sends the newest row of each item until Kafka has it, and slows down when thousands change at once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.clock import ManualClock
from core.kafka import KafkaProducer, TopicFollower
from core.settings import Settings, load_settings
from core.topics import Topics
from devstack.child import tied
from devstack.kafka_broker import FETCH_WAIT_MAX_MS
from devstack.topics import ensure_topics
from streams.broadcast import StatsBroadcast
from tests.conftest import wait_until

ROOT = Path(__file__).resolve().parents[2]
HERE = ("events", 0)


class Kafka:
    """Takes everything, and says so when it is asked to."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, bytes]] = []
        self._reports: list = []

    def post(self, topic: str, key: bytes, value: bytes, on_delivery) -> bool:
        self.sent.append((key, value))
        self._reports.append(on_delivery)
        return True

    def flush(self, timeout_seconds: float) -> int:
        self.report()
        return 0

    def report(self, *, arrived: bool = True, count: int | None = None) -> None:
        """What became of the oldest messages that were not reported yet."""
        reports, self._reports = self._reports[:count], self._reports[len(self._reports[:count]) :]
        for report in reports:
            report(arrived)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def kafka() -> Kafka:
    return Kafka()


@pytest.fixture
def broadcast(kafka, clock) -> StatsBroadcast:
    return StatsBroadcast(kafka, "stats", 50, 500, clock)


def test_only_the_newest_row_of_an_item_is_sent(broadcast, kafka, clock) -> None:
    broadcast.put({("a", 0): b"1", ("b", 0): b"1"})
    broadcast.put({("a", 0): b"2"})
    broadcast.tick({})
    assert kafka.sent == [(b"a\x000", b"2"), (b"b\x000", b"1")]
    broadcast.put({("a", 0): b"3"})
    broadcast.tick({})
    assert len(kafka.sent) == 2
    clock.advance(60)
    broadcast.tick({})
    assert kafka.sent[2:] == [(b"a\x000", b"3")]


def test_it_tells_what_kafka_has_acknowledged_and_no_more(broadcast, kafka, clock) -> None:
    broadcast.put({("a", 0): b"1"})
    assert broadcast.tick({HERE: 7}) is None
    broadcast.put({("a", 0): b"2", ("b", 0): b"1"})
    clock.advance(60)
    assert broadcast.tick({HERE: 9}) is None
    kafka.report(count=1)
    broadcast.put({("a", 0): b"3"})
    assert broadcast.tick({HERE: 11}) == {HERE: 7}
    assert broadcast.tick({HERE: 11}) is None
    kafka.report()
    assert broadcast.tick({HERE: 11}) == {HERE: 9}
    assert broadcast.finish({HERE: 11}, 1) == {HERE: 11}


def test_what_kafka_did_not_take_is_sent_again_as_it_is_by_then(broadcast, kafka, clock) -> None:
    broadcast.put({("a", 0): b"1", ("b", 0): b"1", ("c", 0): b"1"})
    broadcast.tick({HERE: 1})
    broadcast.put({("a", 0): b"2"})
    clock.advance(60)
    broadcast.tick({HERE: 2})
    kafka.report(arrived=False, count=3)
    broadcast.put({("b", 0): b"3"})
    clock.advance(60)
    assert broadcast.tick({HERE: 3}) is None
    assert sorted(kafka.sent[4:]) == [(b"a\x000", b"2"), (b"b\x000", b"3"), (b"c\x000", b"1")]
    kafka.report()
    assert broadcast.tick({HERE: 3}) == {HERE: 3}


def test_a_failure_that_a_newer_row_has_overtaken_is_none(broadcast, kafka, clock) -> None:
    broadcast.put({("a", 0): b"1"})
    broadcast.tick({HERE: 1})
    broadcast.put({("a", 0): b"2"})
    clock.advance(60)
    broadcast.tick({HERE: 2})
    kafka._reports.reverse()
    kafka.report(count=1)
    kafka.report(arrived=False)
    clock.advance(60)
    assert broadcast.tick({HERE: 2}) == {HERE: 2}
    assert len(kafka.sent) == 2


def test_it_forgets_what_is_another_workers(broadcast, kafka, clock) -> None:
    broadcast.put({("c", 0): b"1"})
    broadcast.tick({})
    broadcast.put({("a", 0): b"2", ("a", 1): b"2"})
    broadcast.forget({0})
    kafka.report(arrived=False)
    clock.advance(60)
    broadcast.tick({})
    assert kafka.sent == [(b"c\x000", b"1"), (b"a\x001", b"2")]


def test_many_rows_at_once_are_followed_by_a_longer_pause(broadcast, kafka, clock) -> None:
    broadcast.put({(f"item {number}", 0): b"" for number in range(1000)})
    broadcast.tick({})
    broadcast.put({("a", 0): b"1"})
    clock.advance(800)
    broadcast.tick({})
    assert len(kafka.sent) == 1000
    clock.advance(400)
    broadcast.tick({})
    assert len(kafka.sent) == 1001
    broadcast.put({("a", 0): b"2"})
    broadcast.tick({}, now=True)
    assert len(kafka.sent) == 1002


def test_items_that_were_only_shown_wait_longer_and_are_not_promised_before(broadcast, kafka, clock) -> None:
    broadcast.put({("a", 0): b"1", ("b", 0): b"1"}, {("b", 0)})
    broadcast.tick({HERE: 1})
    assert len(kafka.sent) == 2
    kafka.report()
    assert broadcast.tick({HERE: 1}) == {HERE: 1}

    broadcast.put({("a", 0): b"2", ("b", 0): b"2", ("c", 0): b"2"}, {("b", 0), ("c", 0)})
    clock.advance(60)
    broadcast.tick({HERE: 2})
    kafka.report()
    assert broadcast.tick({HERE: 2}) is None
    assert kafka.sent[2:] == [(b"a\x000", b"2")]
    # A click overtakes.
    broadcast.put({("c", 0): b"3"})
    clock.advance(60)
    broadcast.tick({HERE: 3})
    assert kafka.sent[3:] == [(b"c\x000", b"3")]
    # And what comes after it goes with it.
    broadcast.put({("c", 0): b"4"})
    broadcast.put({("c", 0): b"5"}, {("c", 0)})
    clock.advance(400)
    broadcast.tick({HERE: 5})
    assert sorted(kafka.sent[4:]) == [(b"b\x000", b"2"), (b"c\x000", b"5")]
    kafka.report()
    assert broadcast.tick({HERE: 5}) == {HERE: 5}


def test_what_was_shown_goes_along_at_once_when_the_worker_stops(broadcast, kafka, clock) -> None:
    broadcast.put({("a", 0): b"1"})
    broadcast.tick({})
    broadcast.put({("a", 0): b"2", ("b", 1): b"1"}, {("a", 0), ("b", 1)})
    broadcast.forget({1})
    assert broadcast.finish({HERE: 2}, 1) == {HERE: 2}
    assert kafka.sent[1:] == [(b"a\x000", b"2")]


@pytest.fixture
def broker() -> Iterator[tuple[Settings, int]]:
    """A broker of its own, with its process id."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    command = tied([sys.executable, "-m", "devstack.kafka_broker"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        announced = json.loads(process.stdout.readline())
        pid = announced.pop("pid")
        kafka = {**announced, "fetch_wait_max_ms": FETCH_WAIT_MAX_MS}
        settings = load_settings(overrides={"kafka": kafka})
        ensure_topics(settings.kafka)
        yield settings, pid
        os.kill(pid, signal.SIGCONT)
        process.terminate()


def test_rows_reach_the_replicas_when_kafka_was_away_for_longer_than_a_message_lives(broker) -> None:
    settings, pid = broker
    topic = Topics(settings.kafka.topic_prefix).item_stats
    producer = KafkaProducer(settings.kafka, delivery_timeout_ms=300)
    broadcast = StatsBroadcast(producer, topic, 20)
    seen: dict[bytes, bytes] = {}
    follower = TopicFollower(settings.kafka, [topic], lambda records: seen.update((r.key, r.value) for r in records))
    follower.start()
    broadcast.put({("a", 0): b"1"})
    wait_until(lambda: broadcast.tick({HERE: 1}) == {HERE: 1})
    os.kill(pid, signal.SIGSTOP)
    rounds = broadcast._round
    broadcast.put({("a", 0): b"2", ("b", 0): b"1"})
    told = []
    # It gives up twice and begins anew each time.
    wait_until(lambda: told.append(broadcast.tick({HERE: 2})) or broadcast._round >= rounds + 3)
    assert set(told) == {None}
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: broadcast.tick({HERE: 2}) == {HERE: 2})
    wait_until(lambda: seen == {b"a\x000": b"2", b"b\x000": b"1"})
    follower.stop()
    producer.close()
