"""Teaches a snapshot's co-visitation what users do: follows the events and feedback topics.

Apart from the catalogue's feed, so that a million events to catch up with hold up no item. Invariant: begins at what
the bundle includes, and each message counts once, whatever is read again.
"""

from candidate import metrics
from candidate.co_visitation import LEAD_IN_MESSAGES, CoVisitation
from core.codec import check_event, decode
from core.feed import TopicFeed
from core.kafka import GATHER_LONG_MS, Record, StartOffsets, topic_sources
from core.settings import Settings
from core.topics import Topics
from features.windows import Position, as_user_event
from headrace.v1.events_pb2 import Event, Feedback


class EventFeed(TopicFeed):
    """The events and feedback topics."""

    def __init__(self, pairs: CoVisitation, settings: Settings) -> None:
        self._pairs = pairs
        topics = Topics(settings.kafka.topic_prefix)
        self._feedback, self._followed = topics.feedback, (topics.events, topics.feedback)
        self._kafka = settings.kafka
        # Identity of each topic; known once the broker was asked.
        self._sources: dict[str, int] = {}
        super().__init__(settings.kafka, self._followed, self.resume, metrics.count_malformed, gather_ms=GATHER_LONG_MS)

    def resume(self) -> StartOffsets:
        """Where to begin. A topic that was made anew is another source, of which nothing is included."""
        self._sources = topic_sources(self._kafka, self._followed)
        topic_of = {source: topic for topic, source in self._sources.items()}
        return {
            (topic_of[source], partition): max(0, last + 1 - LEAD_IN_MESSAGES)
            for (source, partition), last in self._pairs.included.items()
            if source in topic_of
        }

    def apply_one(self, record: Record) -> None:
        message: Event | Feedback = Feedback() if record.topic == self._feedback else Event()
        decode(message, record.value, record.headers)
        check_event(message, record.time_ms)
        position = Position(self._sources[record.topic], record.partition, record.offset)
        self._pairs.apply((as_user_event(message, position),))

    def batch_applied(self, count: int) -> None:
        metrics.events_learnt.inc(count)
