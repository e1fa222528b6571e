"""The batch reader's consumer: how it is set up, and what it asks of the topics before it reads.

Beside streams/reader.py, which drives it. Invariant: the group never commits nor chooses where reading starts; the
user-keyed topics have one partition count, or nothing is read.
"""

from typing import Any

from confluent_kafka import Consumer

from core.errors import StageError
from core.kafka import client_config, gathering
from core.settings import Settings
from core.topics import Topics

_METADATA_SECONDS = 5.0
# What brokers take at least, as they come.
_BROKER_SESSION_MIN_MS = 6000
# Messages waiting in the client, all partitions together.
_QUEUE_KB = 32_768


def check_partitions(consumer: Consumer, topics: Topics) -> None:
    """Asks for each topic by name (which also makes its leaders known).

    Raises:
        StageError: a topic is missing, or the counts differ.
    """
    counts: dict[str, int] = {}
    for topic in topics.user_keyed:
        metadata = consumer.list_topics(topic, timeout=_METADATA_SECONDS).topics[topic]
        if metadata.error is not None:
            raise StageError("kafka", f"{topic}: {metadata.error.str()}; make it with `headrace topics`")
        counts[topic] = len(metadata.partitions)
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{topic} has {count}" for topic, count in counts.items())
        raise StageError("kafka", f"the user-keyed topics need one partition count ({told}); make them anew")


def consumer_config(settings: Settings) -> dict[str, Any]:
    """What librdkafka is told."""
    streams = settings.streams
    config: dict[str, Any] = {
        **client_config(settings.kafka),
        "group.id": streams.group_id,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        **gathering(settings.kafka, streams.gather_ms),
        "queued.max.messages.kbytes": _QUEUE_KB,
    }
    if streams.instance_id:
        config["group.instance.id"] = streams.instance_id
    if streams.group_protocol == "consumer":
        # The session is the broker's then (group.consumer.session.timeout.ms).
        config["group.protocol"] = "consumer"
    else:
        config["partition.assignment.strategy"] = streams.group_protocol
        config["session.timeout.ms"] = session_ms(streams.session_timeout_ms)
        # The others hear of a death with their next heartbeat.
        config["heartbeat.interval.ms"] = max(1, streams.session_timeout_ms // 12)
    return config


def session_ms(take_over_ms: int) -> int:
    """The group's session, so that a dead worker's partitions move again within `take_over_ms`."""
    return max(take_over_ms * 4 // 5, min(take_over_ms, _BROKER_SESSION_MIN_MS))
