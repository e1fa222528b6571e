"""How long Kafka keeps what it has, by the topics' own settings.

Used by the receipt of an erasure. Invariant: the time said is the latest one; Kafka may drop a message earlier.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType  # type: ignore[attr-defined]

from core.errors import StageError
from core.kafka import client_config
from core.settings import KafkaSettings


@dataclass(frozen=True, slots=True)
class Retention:
    """One topic. `until` is empty where no time can be said; `meaning` then says what decides."""

    until: str
    meaning: str


def retention_of(settings: KafkaSettings, topics: Sequence[str], timeout_seconds: float = 10) -> dict[str, Retention]:
    """Until when a message that is there now is there at the latest. Raises StageError."""
    if settings.log_id:
        # The embedded broker neither tells nor keeps.
        return dict.fromkeys(topics, Retention("", "in memory, until the embedded broker stops"))
    admin = AdminClient(client_config(settings))
    resources = {topic: ConfigResource(ResourceType.TOPIC, topic) for topic in topics}
    try:
        answers = admin.describe_configs(list(resources.values()), request_timeout=timeout_seconds)
        return {topic: _retention(answers[found].result(timeout_seconds)) for topic, found in resources.items()}
    except (KafkaException, TimeoutError) as error:
        raise StageError("kafka", f"{settings.bootstrap_servers} does not tell how long it keeps topics") from error


def _retention(config: Mapping[str, Any]) -> Retention:
    def number(name: str) -> int:
        return int(config[name].value)

    policy = config["cleanup.policy"].value
    if "delete" in policy:
        if number("retention.ms") < 0:
            return Retention("", "for ever: retention.ms is -1; set a limit, or delete the records by hand")
        # Only closed segments go, and the newest message of one decides for all of it.
        latest = datetime.now(UTC) + timedelta(milliseconds=number("retention.ms") + number("segment.ms"))
        text = latest.isoformat(timespec="seconds").replace("+00:00", "Z")
        return Retention(text, f"retention.ms {number('retention.ms')} and segment.ms {number('segment.ms')}")
    return Retention(
        "",
        "compacted: earlier values go when the cleaner next compacts their segments, the tombstone after "
        f"delete.retention.ms {number('delete.retention.ms')} more",
    )
