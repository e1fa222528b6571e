"""The embedded broker, as a real process with real clients."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, TopicPartition

from core.kafka import KafkaProducer, topic_sources
from core.settings import KafkaSettings, load_settings
from devstack.addresses import with_values
from devstack.child import tied
from devstack.kafka_broker import FETCH_WAIT_MAX_MS, PARTITIONS, broker_spec, read_announcement
from devstack.supervisor import Supervisor
from devstack.topics import ensure_topics, topic_problems


def silent(_name: str, _text: str) -> None:
    pass


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[Supervisor, Path]]:
    spec, announce = broker_spec(tmp_path / "kafka")
    supervisor = Supervisor([spec], tmp_path, say=silent)
    supervisor.start_all(30)
    yield supervisor, announce
    supervisor.stop_all()


def settings_of(announce: Path) -> KafkaSettings:
    announced = read_announcement(announce)
    assert announced is not None
    kafka = {
        "bootstrap_servers": announced.bootstrap_servers,
        "log_id": announced.log_id,
        "fetch_wait_max_ms": FETCH_WAIT_MAX_MS,
    }
    return with_values(load_settings(), {"kafka": kafka}, {}).kafka


def read_all(settings: KafkaSettings, topic: str, count: int) -> list[tuple[int, bytes]]:
    consumer = Consumer(
        {"bootstrap.servers": settings.bootstrap_servers, "group.id": "test", "fetch.wait.max.ms": FETCH_WAIT_MAX_MS}
    )
    try:
        consumer.assign([TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)])
        messages = []
        while len(messages) < count:
            messages += consumer.consume(count - len(messages), 5)
        return [(message.partition(), message.value()) for message in messages]
    finally:
        consumer.close()


def test_what_is_produced_is_consumed_from_four_partitions(broker: tuple[Supervisor, Path]) -> None:
    settings = settings_of(broker[1])
    made = ensure_topics(settings)
    assert "headrace.events.v1" in made
    assert "headrace.items.v1.dead-letter" in made
    assert topic_problems(settings) == []
    producer = KafkaProducer(settings)
    try:
        sent = [producer.send("headrace.events.v1", b"user-%d" % n, b"event-%d" % n) for n in range(100)]
        written = [future.result(10) for future in sent]
    finally:
        producer.close()
    read = read_all(settings, "headrace.events.v1", 100)
    assert sorted(value for _, value in read) == sorted(b"event-%d" % n for n in range(100))
    assert {where.partition for where in written} == set(range(PARTITIONS))


def test_each_start_is_another_log(broker: tuple[Supervisor, Path]) -> None:
    supervisor, announce = broker
    before = settings_of(announce)
    supervisor.kill("kafka")
    supervisor.wait_ready("kafka", 30)
    after = settings_of(announce)
    assert after.log_id != before.log_id
    topics = ["headrace.events.v1"]
    assert topic_sources(after, topics) != topic_sources(before, topics)


def test_on_its_own_it_announces_itself_on_stdout_and_ends_on_sigterm() -> None:
    command = tied([sys.executable, "-m", "devstack.kafka_broker"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        announced = json.loads(process.stdout.readline())
        assert announced["pid"] == process.pid
        assert announced["bootstrap_servers"].startswith("127.0.0.1:")
        process.terminate()
        assert process.wait(10) == 0
    assert not psutil.pid_exists(announced["pid"])
