"""A real Apache Kafka, where KAFKA_HOME and Java are."""

import os
import signal
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from core.kafka import KafkaProducer, topic_sources
from devstack.kafka_local import JAVA_MIN, kafka_home, local_kafka_problem
from devstack.stack import Stack
from devstack.topics import ensure_topics, topic_problems

PROBLEM = local_kafka_problem(kafka_home())

needs_kafka = pytest.mark.skipif(PROBLEM is not None, reason=PROBLEM or "")


def silent(_name: str, _text: str) -> None:
    pass


@pytest.mark.real_kafka
@needs_kafka
def test_a_local_kafka_keeps_its_topics_and_data_over_kill_and_restart(tmp_path: Path) -> None:
    events = "headrace.events.v1"
    with Stack(tmp_path, kafka="local", processes=[], say=silent) as stack:
        settings = stack.settings.kafka
        assert settings.log_id == ""
        assert topic_problems(settings) == []
        sources = topic_sources(settings, [events])
        producer = KafkaProducer(settings)
        written = producer.send(events, b"user", b"one").result(10)
        os.kill(stack.pid("kafka"), signal.SIGKILL)
        # Queued while the broker is away, taken when it is back at the same address.
        after = producer.send(events, b"user", b"two")
        assert after.result(60).offset == written.offset + 1
        producer.close()
        assert topic_sources(settings, [events]) == sources
    # Another start of the stack: other ports, the same data.
    with Stack(tmp_path, kafka="local", processes=[], say=silent) as stack:
        settings = stack.settings.kafka
        assert topic_sources(settings, [events]) == sources
        assert ensure_topics(settings) == []
        wrong_shapes(stack)


def wrong_shapes(stack: Stack) -> None:
    """What `headrace topics --check` says of another prefix's topics, made by hand."""
    settings = stack.settings.kafka.model_copy(update={"topic_prefix": "other"})
    admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})
    by_hand = [
        NewTopic("other.events.v1", num_partitions=2, replication_factor=1),
        NewTopic("other.feedback.v1", num_partitions=3, replication_factor=1),
        NewTopic("other.items.v1", num_partitions=4, replication_factor=1),
    ]
    for future in admin.create_topics(by_hand).values():
        future.result(20)
    problems = topic_problems(settings)
    assert "other.users.v1: missing; make it with `headrace topics`" in problems
    assert any("other.events.v1 has 2, other.feedback.v1 has 3" in problem for problem in problems)
    assert any(problem.startswith("other.items.v1: cleanup.policy is delete") for problem in problems)


def test_without_kafka_home_or_java_it_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "set KAFKA_HOME" in (local_kafka_problem(None) or "")
    assert "has no libs/kafka" in (local_kafka_problem(tmp_path) or "")
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka_2.13-4.3.1.jar").touch()
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no java found; install Java" in (local_kafka_problem(tmp_path) or "")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    assert f"is 11; Java {JAVA_MIN} or newer" in (local_kafka_problem(tmp_path) or "")
