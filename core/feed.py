"""Follows topics into a replica's memory: what features/catalog_feed.py and candidate/event_feed.py have in common.

Invariant: messages are applied on one thread, in the order of their partitions; those that cannot be read are counted
and left out, and Kafka being away delays news and never ends the service.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext

from core.clock import Clock, SystemClock
from core.errors import MalformedEventError
from core.kafka import Record, StartOffsets, TopicFollower
from core.pace import beside_calls, paced
from core.settings import KafkaSettings
from core.telemetry import get_logger

_log = get_logger("feed")
_WAIT_SECONDS = 0.05


class TopicFeed(ABC):
    """Applies some topics, on a thread of its own.

    Args:
        settings: where Kafka is.
        topics: their names.
        start_offsets: where to begin, or a function that says it once Kafka answers.
        on_malformed: told the topic of each message that was left out.
        clock: tells how long Kafka has been silent.
        gather_ms: as of TopicFollower.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        topics: tuple[str, ...],
        start_offsets: StartOffsets | Callable[[], StartOffsets],
        on_malformed: Callable[[str], None],
        clock: Clock | None = None,
        gather_ms: int = 0,
    ) -> None:
        self._on_malformed = on_malformed
        self._follower = TopicFollower(settings, topics, self.apply, start_offsets, gather_ms=gather_ms)
        self._clock = clock or SystemClock()
        self._heard_at = self._clock.monotonic()

    def start(self) -> None:
        self._heard_at = self._clock.monotonic()
        self._follower.start()

    def stop(self) -> None:
        self._follower.stop()

    @property
    def has_caught_up(self) -> bool:
        """Whether everything that was in the topics at the start is applied."""
        return self._follower.caught_up.is_set()

    def wait(self, timeout_seconds: float) -> bool:
        """`has_caught_up`, within the time given."""
        return self._follower.caught_up.wait(timeout_seconds)

    def catch_up(self, away_seconds: float, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Waits until `has_caught_up`; False where Kafka is away (nothing comes for so long), or on stopping."""
        while not self.wait(_WAIT_SECONDS):
            if is_stopping() or self._clock.monotonic() - self._heard_at > away_seconds:
                return False
        return True

    def apply(self, records: list[Record]) -> None:
        """Applies messages in order; once there are calls to answer, with rests for them."""
        self._heard_at = self._clock.monotonic()
        with beside_calls() if self.has_caught_up else nullcontext():
            for record in paced(records):
                try:
                    self.apply_one(record)
                except MalformedEventError as error:
                    self._on_malformed(record.topic)
                    _log.warning("left out", topic=record.topic, offset=record.offset, problem=str(error))
            self.batch_applied(len(records))

    @abstractmethod
    def apply_one(self, record: Record) -> None:
        """Applies one message. Raises MalformedEventError where it cannot be read."""

    @abstractmethod
    def batch_applied(self, count: int) -> None:
        """Called after each batch of `count` messages."""
