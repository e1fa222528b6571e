"""Profiles of a Redis that has lost them: items and users are read again from where the store says that it has them.

Beside the Faust agents, whose group's offsets know nothing of the store. Each partition of the two topics has a
position in the store, moved as the agents acknowledge. Invariant: a position is set only where it still says what it
said before, so one that is missing or older shows that rows are, too; rows carry positions of their own, so that what
is written again replaces nothing newer.
"""

import threading
from collections.abc import Mapping

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from core.errors import StageError
from core.kafka import Record, TopicFollower, client_config
from core.settings import Settings
from core.telemetry import get_logger
from features.positions import Offsets
from features.stores.online import OnlineStore, Put
from streams.processor import RawMessage
from streams.profiles import ProfileProcessor

_log = get_logger("streams.refill")

_PAUSE_SECONDS = 0.5
_POLL_SECONDS = 0.05
_KAFKA_SECONDS = 5.0

Where = tuple[str, int]


class ProfileRefill:
    """The thread that keeps the positions, and reads again what is not behind them.

    Args:
        settings: of the process.
        store: for this thread alone, as are those of the processors.
        processors: what writes the rows, by topic.
        sources: identity of each topic.
    """

    def __init__(
        self,
        settings: Settings,
        store: OnlineStore,
        processors: Mapping[str, ProfileProcessor],
        sources: Mapping[str, int],
    ) -> None:
        self._settings = settings
        self._store = store
        self._processors = processors
        self._sources = sources
        # As the agents acknowledged them; as the store should have them.
        self._acknowledged: dict[Where, int] = {}
        self._known: dict[Where, int] = {}
        self._is_due = True
        self._problem: StageError | None = None
        self._reached: dict[Where, int] = {}
        self._rows = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="profile-refill", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def acknowledged(self, topic: str, partition: int, offset: int) -> None:
        """An agent has brought everything up to here to rest. From any thread."""
        self._acknowledged[topic, partition] = offset

    def position(self, topic: str, partition: int) -> int:
        """Up to where everything has come to rest; -1 for nowhere."""
        where = (topic, partition)
        return max(self._known.get(where, -1), self._acknowledged.get(where, -1))

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._is_due:
                    self._fill()
                else:
                    self._keep()
            except StageError as error:
                self._is_due = True
                _log.debug("profiles wait", problem=str(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, the next round looks again
                _log.error("unexpected error, going on", error=repr(error))
            self._stopping.wait(_PAUSE_SECONDS)

    def _keep(self) -> None:
        """Moves the positions; finds out whether the store still has them."""
        wheres = list(self._known)
        reached = [self.position(*where) for where in wheres]
        puts = [
            Put(_name(where), self._offsets(where, now), self._offsets(where, self._known[where]))
            for where, now in zip(wheres, reached, strict=True)
        ]
        for where, now, done in zip(wheres, reached, self._store.write_all(puts), strict=True):
            stored = now if done else self._stored(where)
            if stored is None or stored < self._known[where]:
                self._is_due = True
                return
            # Further on than this worker knows: another worker's agent has the partition.
            self._known[where] = stored

    def _fill(self) -> None:
        """Reads both topics from the positions in the store to their ends."""
        self._problem, self._rows = None, 0
        stored = {where: self._stored(where) for where in self._partitions()}
        self._reached = {where: -1 if offset is None else offset for where, offset in stored.items()}
        starts = {where: offset + 1 for where, offset in self._reached.items() if offset >= 0}
        follower = TopicFollower(self._settings.kafka, self._processors, self._take, starts)
        follower.start()
        try:
            while not follower.caught_up.wait(_POLL_SECONDS) and self._problem is None:
                if self._stopping.is_set():
                    return
        finally:
            follower.stop()
        if self._problem is not None:
            raise self._problem
        for where, offset in self._reached.items():
            self._store.write_positions(_name(where), self._offsets(where, offset))
        self._known, self._is_due = dict(self._reached), False
        if self._rows:
            _log.info("profiles are as new as their topics", rows=self._rows)

    def _take(self, records: list[Record]) -> None:
        by_topic: dict[str, list[RawMessage]] = {}
        for one in records:
            raw = RawMessage(one.topic, one.partition, one.offset, one.key, one.value, one.headers, 0)
            by_topic.setdefault(one.topic, []).append(raw)
            self._reached[one.topic, one.partition] = one.offset
        try:
            for topic, batch in by_topic.items():
                # What is malformed went to the dead letters when the agent had it.
                self._processors[topic].write(self._processors[topic].sort_out(batch))
                self._rows += len(batch)
        except StageError as error:
            self._problem = error

    def _partitions(self) -> list[Where]:
        admin = AdminClient(client_config(self._settings.kafka))
        try:
            return [
                (topic, partition)
                for topic in self._processors
                for partition in admin.list_topics(topic, timeout=_KAFKA_SECONDS).topics[topic].partitions
            ]
        except KafkaException as error:
            raise StageError("kafka", f"{self._settings.kafka.bootstrap_servers}: {error.args[0].str()}") from error

    def _stored(self, where: Where) -> int | None:
        """The position in the store; None where it has none of this very topic."""
        return (self._store.read_positions(_name(where)) or {}).get((self._sources[where[0]], where[1]))

    def _offsets(self, where: Where, offset: int) -> Offsets:
        return {(self._sources[where[0]], where[1]): offset}


def _name(where: Where) -> str:
    return f"profiles:{where[0]}/{where[1]}"
