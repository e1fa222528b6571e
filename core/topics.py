"""Names and shapes of the Kafka topics. Producers, the stream and every replica take them from here.

Invariant: the topics that are keyed by user have one partition count and one partitioner, so that one worker
owns all that concerns a user.
"""

import hashlib
from dataclasses import dataclass

# Java's and aiokafka's partitioner; librdkafka's own default would send a user elsewhere.
PARTITIONER = "murmur2_random"
CONTENT_TYPE = "content-type"
JSON_CONTENT = b"application/json"


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics below one prefix."""

    prefix: str = "headrace"

    @property
    def events(self) -> str:
        return f"{self.prefix}.events.v1"

    @property
    def feedback(self) -> str:
        return f"{self.prefix}.feedback.v1"

    @property
    def impressions(self) -> str:
        return f"{self.prefix}.impressions.v1"

    @property
    def items(self) -> str:
        return f"{self.prefix}.items.v1"

    @property
    def users(self) -> str:
        return f"{self.prefix}.users.v1"

    @property
    def item_stats(self) -> str:
        return f"{self.prefix}.item-stats.v1"

    @property
    def user_keyed(self) -> tuple[str, ...]:
        """Read together by the batch reader: these make the user's state and the item statistics."""
        return (self.events, self.feedback, self.impressions)

    @property
    def compacted(self) -> tuple[str, ...]:
        return (self.items, self.users, self.item_stats)

    @property
    def inbound(self) -> tuple[str, ...]:
        return (*self.user_keyed, self.items, self.users)

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.inbound, self.item_stats, *(dead_letter(name) for name in self.inbound))


def dead_letter(topic: str) -> str:
    return f"{topic}.dead-letter"


def source_id(topic: str, log_identity: str) -> int:
    """Identity of a topic as 64 bits, for the offsets that rows carry.

    Args:
        topic: the topic's name.
        log_identity: the broker's topic id, or the embedded broker's `kafka.log_id`: a topic that was made anew
            has another one, and its offsets do not compare with the old ones.
    """
    digest = hashlib.blake2b(f"{topic}\0{log_identity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def item_stats_key(item_id: str, source_partition: int) -> bytes:
    """Key on the item-stats topic: names the row's one writer, so that compaction keeps each partial sum."""
    return f"{item_id}\0{source_partition}".encode()
