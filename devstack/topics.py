"""Makes and checks the topics of a broker: `headrace topics [--check]`, and each start of the stack.

Invariant: the user-keyed topics end up with one partition count and the compacted ones compacted, or the problem
is named; a topic that exists is never changed.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from core.errors import StageError
from core.kafka import client_config
from core.settings import KafkaSettings
from core.topics import Topics


def ensure_topics(settings: KafkaSettings, timeout_seconds: float = 20) -> list[str]:
    """Makes the topics that are missing and returns their names.

    The embedded broker (`kafka.log_id` set) makes a topic when it is asked about it.

    Raises:
        StageError: Kafka does not answer, or refuses a topic.
    """
    topics = Topics(settings.topic_prefix)
    admin = AdminClient(client_config(settings))
    try:
        known = admin.list_topics(timeout=timeout_seconds).topics
        missing = [name for name in topics.all if name not in known]
        if settings.log_id:
            for name in missing:
                admin.list_topics(name, timeout=timeout_seconds)
        elif missing:
            # One count for all: that of the topics that are there already, where some are.
            there = [len(known[name].partitions) for name in topics.user_keyed if name in known]
            _create(admin, missing, topics, settings, there[0] if there else settings.partitions, timeout_seconds)
    except KafkaException as error:
        raise _stage_error(settings, error) from error
    return missing


def topic_problems(settings: KafkaSettings, timeout_seconds: float = 20) -> list[str]:
    """One line per topic that is missing or has another shape than it should; empty when all is well.

    Raises:
        StageError: Kafka does not answer.
    """
    topics = Topics(settings.topic_prefix)
    admin = AdminClient(client_config(settings))
    problems: list[str] = []
    try:
        known = admin.list_topics(timeout=timeout_seconds).topics
        problems += [f"{name}: missing; make it with `headrace topics`" for name in topics.all if name not in known]
        user_keyed = {name: len(known[name].partitions) for name in topics.user_keyed if name in known}
        if len(set(user_keyed.values())) > 1:
            counts = ", ".join(f"{name} has {count}" for name, count in user_keyed.items())
            problems.append(f"the user-keyed topics need one partition count ({counts}); make them anew")
        # The embedded broker neither compacts nor tells.
        compacted = [name for name in topics.compacted if name in known]
        if compacted and not settings.log_id:
            problems += _not_compacted(admin, compacted, timeout_seconds)
    except KafkaException as error:
        raise _stage_error(settings, error) from error
    return problems


def _create(
    admin: AdminClient,
    names: Sequence[str],
    topics: Topics,
    settings: KafkaSettings,
    partitions: int,
    timeout_seconds: float,
) -> None:
    wanted = [
        NewTopic(
            name,
            num_partitions=partitions,
            replication_factor=settings.replication,
            config={"cleanup.policy": "compact"} if name in topics.compacted else {},
        )
        for name in names
    ]
    for future in admin.create_topics(wanted, request_timeout=timeout_seconds).values():
        try:
            future.result(timeout_seconds)
        except KafkaException as error:
            # Another process was faster: as good.
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
    _wait_until_known(admin, names, timeout_seconds)


def _wait_until_known(admin: AdminClient, names: Sequence[str], timeout_seconds: float) -> None:
    """A topic is created some milliseconds before every client can see it and its leaders know that they lead.

    Whoever sends to it earlier may lose messages: see core.kafka.delivery_problem.
    """
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        known = admin.list_topics(timeout=timeout_seconds).topics
        if all(name in known for name in names) and _are_led(admin, [known[name] for name in names], timeout_seconds):
            return
        time.sleep(0.02)
    raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the new topics got no leader in time"))


def _are_led(admin: AdminClient, topics: Iterable[Any], timeout_seconds: float) -> bool:
    """Whether a leader answers for each partition, which metadata alone does not tell."""
    asked: dict[TopicPartition, OffsetSpec] = {}
    for topic in topics:
        if topic.error is not None or any(partition.leader < 0 for partition in topic.partitions.values()):
            return False
        for number in topic.partitions:
            asked[TopicPartition(topic.topic, number)] = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    answers = admin.list_offsets(asked, request_timeout=timeout_seconds).values()
    return all(future.exception(timeout_seconds) is None for future in answers)


def _not_compacted(admin: AdminClient, names: Sequence[str], timeout_seconds: float) -> list[str]:
    resources = {name: ConfigResource(ResourceType.TOPIC, name) for name in names}
    described = admin.describe_configs(list(resources.values()), request_timeout=timeout_seconds)
    problems = []
    for name, resource in resources.items():
        policy = described[resource].result(timeout_seconds)["cleanup.policy"].value or ""
        if "compact" not in policy:
            problems.append(f"{name}: cleanup.policy is {policy}; alter it to compact, else replicas lose items")
    return problems


def _stage_error(settings: KafkaSettings, error: KafkaException) -> StageError:
    reason = error.args[0]
    text = reason.str() if isinstance(reason, KafkaError) else str(reason)
    return StageError("kafka", f"{settings.bootstrap_servers}: {text}; is it running, and may this client make topics?")
