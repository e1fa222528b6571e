"""The user-keyed topics' partitions and where they end, for tombstones: up to there is what a user's erasure reaches.

Asked by the agents (profiles.py), each on its thread. Invariant: the answer covers every message of the user that Kafka
had acknowledged when it was asked.
"""

import time
from collections.abc import Mapping

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from core.errors import StageError
from core.kafka import client_config
from core.settings import KafkaSettings
from core.topics import Topics

# Said of a partition that has just been made or moved: its leader is another one than the client remembers.
_MOVED = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.UNKNOWN_TOPIC_OR_PART)
_REQUEST_SECONDS, _RETRY_SECONDS = 15.0, 0.1


class TopicEnds:
    """Callable: partition of the users topic -> newest positions."""

    def __init__(self, settings: KafkaSettings, sources: Mapping[str, int]) -> None:
        self._settings = settings
        self._topics = Topics(settings.topic_prefix)
        self._sources = sources
        self._admin: AdminClient | None = None

    def __call__(self, partition: int) -> dict[tuple[int, int], int]:
        """(source, partition) -> newest offset, of each user-keyed topic that holds anything there.

        Raises:
            StageError: Kafka does not answer.
        """
        self._admin = self._admin or AdminClient(client_config(self._settings))
        try:
            wheres = [
                TopicPartition(topic, number)
                for topic in self._topics.user_keyed
                for number in self._partitions(self._admin, topic, partition)
            ]
            ends = self._ends(self._admin, wheres)
        except (KafkaException, TimeoutError) as error:
            raise StageError("kafka", f"{self._settings.bootstrap_servers} does not tell where topics end") from error
        return {(self._sources[topic], number): end - 1 for (topic, number), end in ends.items() if end}

    def stats_partitions(self) -> range:
        """What item statistics may be of: the partitions of the events topic, and -1 for what was imported.

        Raises:
            StageError: Kafka does not answer.
        """
        self._admin = self._admin or AdminClient(client_config(self._settings))
        try:
            return range(-1, self._count(self._admin, self._topics.events))
        except KafkaException as error:
            raise StageError("kafka", f"{self._settings.bootstrap_servers} does not tell its partitions") from error

    def _ends(self, admin: AdminClient, wheres: list[TopicPartition]) -> dict[tuple[str, int], int]:
        give_up_at = time.monotonic() + _REQUEST_SECONDS
        while True:
            asked = {where: OffsetSpec.latest() for where in wheres}  # type: ignore[no-untyped-call]
            answers = admin.list_offsets(asked, request_timeout=_REQUEST_SECONDS)
            try:
                return {(tp.topic, tp.partition): end.result(_REQUEST_SECONDS).offset for tp, end in answers.items()}
            except KafkaException as error:
                if error.args[0].code() not in _MOVED or time.monotonic() > give_up_at:
                    raise
            time.sleep(_RETRY_SECONDS)
            admin.list_topics(timeout=_REQUEST_SECONDS)

    def _partitions(self, admin: AdminClient, topic: str, partition: int) -> list[int]:
        """Where the users of a partition of the users topic are: the same one, if the counts agree; else anywhere."""
        count = self._count(admin, topic)
        return [partition] if count == self._count(admin, self._topics.users) else list(range(count))

    @staticmethod
    def _count(admin: AdminClient, topic: str) -> int:
        return len(admin.list_topics(topic, timeout=_REQUEST_SECONDS).topics[topic].partitions)
