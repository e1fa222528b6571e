"""Kafka clients, set up one way: a producer that acknowledges, a reader that follows compacted topics.

Used by serving (ingestion, impressions), streams, candidate, ranker and the tools. Invariant: every producer uses
the same partitioner, every failure is a StageError that names Kafka and its address, and what counts as delivered
has an offset.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from core.errors import StageError
from core.settings import KafkaSettings
from core.telemetry import get_logger
from core.topics import PARTITIONER, source_id

_log = get_logger("kafka")
# librdkafka says the same about a broker that is away up to twenty times a second.
_REPEAT_SECONDS = 30.0
_REPEATS_KEPT = 1000


class SaidOnce(logging.Filter):
    """Lets each line pass once in a while; what differs in its times and counts alone is the same line."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"\(after .*?\)", "", record.getMessage())
        now = time.monotonic()
        if now - self._said.get(text, -_REPEAT_SECONDS) < _REPEAT_SECONDS:
            return False
        if len(self._said) >= _REPEATS_KEPT:
            self._said.clear()
        self._said[text] = now
        return True


_librdkafka = get_logger("librdkafka").stdlib
_librdkafka.addFilter(SaidOnce())


@dataclass(frozen=True, slots=True)
class Written:
    """Where a message came to lie."""

    topic: str
    partition: int
    offset: int


def client_config(settings: KafkaSettings) -> dict[str, Any]:
    """What every client shares."""
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        # librdkafka's own lines go through our logger, where they have a level and a process name.
        "logger": _librdkafka,
        "log_level": 4,
        "reconnect.backoff.max.ms": 1000,
        **settings.client,
    }


# How long records of a quiet topic may come together: a fetch for each of a thousand events a second costs the broker
# half a core. The first where answers go by what comes (items, erasures), the second where nothing needs it at once
# (what is learnt from thousands of events, or written once a second).
GATHER_MS, GATHER_LONG_MS = 100, 250
# Who gathers takes what is there when it is so much: while catching up, it does not wait.
_GATHER_BYTES = 100_000


def gathering(settings: KafkaSettings, gather_ms: float) -> dict[str, int]:
    """What a consumer is told so that the broker lets records come together for so long (0: each at once)."""
    if not gather_ms:
        return {"fetch.wait.max.ms": settings.fetch_wait_max_ms}
    return {"fetch.wait.max.ms": int(gather_ms), "fetch.min.bytes": _GATHER_BYTES}


class KafkaProducer:
    """Sends and tells, for each message, where it came to lie or why it did not."""

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        linger_ms: float = 1,
        queue_max: int = 100_000,
        delivery_timeout_ms: int = 10_000,
    ) -> None:
        self._address = settings.bootstrap_servers
        self._producer = Producer(
            {
                **client_config(settings),
                "partitioner": PARTITIONER,
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": linger_ms,
                "delivery.timeout.ms": delivery_timeout_ms,
                "queue.buffering.max.messages": queue_max,
            }
        )
        self._running = True
        self._poller = threading.Thread(target=self._poll, name="kafka-producer", daemon=True)
        self._poller.start()

    def send(
        self, topic: str, key: bytes, value: bytes | None, headers: Mapping[str, bytes] | None = None
    ) -> "Future[Written]":
        """Queues one message. The future fails with StageError when Kafka does not take it in time."""
        done: Future[Written] = Future()
        # Running: whoever waits may give up, but cannot cancel it under the hands of the delivery report.
        done.set_running_or_notify_cancel()

        def delivered(error: Any, message: Message) -> None:
            problem = delivery_problem(error, message)
            if problem is not None:
                done.set_exception(StageError("kafka", f"{self._address} did not take a message: {problem}"))
            else:
                done.set_result(Written(topic, message.partition() or 0, message.offset() or 0))

        try:
            self._producer.produce(topic, value, key, on_delivery=delivered, headers=list((headers or {}).items()))
        except (BufferError, KafkaException) as error:
            done.set_exception(StageError("kafka", f"{self._address} is away and the queue is full: {error}"))
        return done

    def post(
        self,
        topic: str,
        key: bytes,
        value: bytes | None,
        headers: Mapping[str, bytes] | None = None,
        on_delivery: Callable[[bool], None] | None = None,
    ) -> bool:
        """Queues one message that nobody waits for; False when the queue is full.

        `on_delivery` is told, on the producer's thread, whether Kafka has taken it.
        """

        def report(error: Any, message: Message) -> None:
            if on_delivery is not None:
                on_delivery(delivery_problem(error, message) is None)

        options: dict[str, Any] = {} if on_delivery is None else {"on_delivery": report}
        try:
            self._producer.produce(topic, value, key, headers=list((headers or {}).items()), **options)
        except (BufferError, KafkaException):
            return False
        return True

    def flush(self, timeout_seconds: float = 10) -> int:
        """Waits for what is queued; returns how many messages are still undelivered."""
        return int(self._producer.flush(timeout_seconds))

    def close(self, timeout_seconds: float = 5) -> None:
        left = self.flush(timeout_seconds)
        if left:
            _log.warning("messages not delivered at close", count=left, kafka=self._address)
        self._running = False
        self._poller.join(1)

    def _poll(self) -> None:
        while self._running:
            self._producer.poll(0.1)


def delivery_problem(error: Any, message: Message) -> str | None:
    """Why a message must be taken for not delivered, from its delivery report.

    A message without an offset was not acknowledged itself: librdkafka infers it from a later one of its partition.
    Up to Kafka 4.3 that is no proof. A broker that has just become the partition's leader refuses the first request,
    takes the second, and then refuses the first for good as out of order (KAFKA-15591). Sent again, the message may
    be there twice, which its event_id tells.
    """
    if error is not None:
        return str(error.str())
    return None if message.offset() is not None else "acknowledged without an offset, so it may be lost"


@dataclass(frozen=True, slots=True)
class Record:
    """One message of a followed topic. `value` None is a tombstone."""

    topic: str
    key: bytes
    value: bytes | None
    headers: Any
    partition: int
    offset: int
    # When the broker (or the producer) stamped it; 0 = unknown.
    time_ms: int = 0


# Where to begin, by topic and partition; those that are not named begin at the start.
StartOffsets = Mapping[tuple[str, int], int]


class TopicFollower:
    """Reads every partition of some topics, from the start, given offsets or the end, for as long as it lives.

    No consumer group: each replica sees everything. `on_records` is called on the follower's thread with batches
    in order; `caught_up` is set when everything that was there at the start has been delivered. Kafka being away
    delays it and never ends it; a record that `on_records` raises at is logged and left out.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        topics: Iterable[str],
        on_records: Callable[[list[Record]], None],
        start_offsets: StartOffsets | Callable[[], StartOffsets] | None = None,
        *,
        from_end: bool = False,
        gather_ms: int = 0,
    ) -> None:
        """`start_offsets` may be a function, asked once Kafka answers (StageError: it is asked again).

        With `gather_ms`, records may come so much later, together: GATHER_MS or GATHER_LONG_MS.
        """
        self._from_end = from_end
        self._gather_ms = gather_ms
        self._settings = settings
        self._topics = tuple(topics)
        self._on_records = on_records
        self._asked_offsets = start_offsets if callable(start_offsets) else None
        self._start_offsets = {} if start_offsets is None or callable(start_offsets) else dict(start_offsets)
        self._targets: dict[tuple[str, int], int] = {}
        self._problem = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="topic-follower", daemon=True)
        self.caught_up = threading.Event()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stopping.is_set():
            consumer = Consumer(
                {
                    **client_config(self._settings),
                    "group.id": "headrace-follower",  # required by the client, never joined nor committed
                    "enable.auto.commit": False,
                    "auto.offset.reset": "earliest",
                    **gathering(self._settings, self._gather_ms),
                }
            )
            try:
                self._follow(consumer)
            except (KafkaException, StageError) as error:
                self._tell(str(error.args[0]))
                self._stopping.wait(0.5)
            finally:
                consumer.close()

    def _tell(self, problem: str) -> None:
        """One line a problem, however long it lasts."""
        if problem != self._problem:
            _log.warning(
                "topic follower lost kafka, trying again", kafka=self._settings.bootstrap_servers, error=problem
            )
        self._problem = problem

    def _follow(self, consumer: Consumer) -> None:
        if self._asked_offsets is not None:
            self._start_offsets = dict(self._asked_offsets())
            self._asked_offsets = None
        assignment = self._assignment(consumer)
        consumer.assign(assignment)
        if self._problem:
            _log.info("topic follower is back", topics=self._topics)
            self._problem = ""
        while not self._stopping.is_set():
            messages = consumer.consume(1000, 0.02)
            records = []
            for message in messages:
                if message.error() is not None:
                    _log.warning("topic follower", error=str(message.error()))
                    continue
                record = Record(
                    message.topic() or "",
                    message.key() or b"",
                    message.value(),
                    headers_of(message),
                    message.partition() or 0,
                    message.offset() or 0,
                    message.timestamp()[1],
                )
                records.append(record)
                self._start_offsets[(record.topic, record.partition)] = record.offset + 1
            self._deliver(records)
            if not self.caught_up.is_set() and self._reached():
                self.caught_up.set()

    def _deliver(self, records: list[Record]) -> None:
        if not records:
            return
        try:
            self._on_records(records)
        except Exception as error:  # noqa: BLE001 - one record must not end the news of all others
            if len(records) == 1:
                one = records[0]
                _log.error("left out", topic=one.topic, partition=one.partition, offset=one.offset, error=repr(error))
                return
            # Rows are replaced whole, so that what was applied before the one at fault may be applied again.
            for record in records:
                self._deliver([record])

    def _assignment(self, consumer: Consumer) -> list[TopicPartition]:
        assignment: list[TopicPartition] = []
        for topic in self._topics:
            metadata = consumer.list_topics(topic, timeout=5).topics[topic]
            if metadata.error is not None or not metadata.partitions:
                raise KafkaException(metadata.error)
            for partition in metadata.partitions:
                where = TopicPartition(topic, partition)
                low, high = consumer.get_watermark_offsets(where, timeout=5)
                if self._from_end:
                    self._start_offsets.setdefault((topic, partition), high)
                start = self._start_offsets.get((topic, partition), OFFSET_BEGINNING)
                # Offsets of an older log that this broker does not have: read everything.
                where.offset = start if start == OFFSET_BEGINNING or low <= start <= high else OFFSET_BEGINNING
                assignment.append(where)
                self._targets.setdefault((topic, partition), high if high > low else 0)
        return assignment

    def _reached(self) -> bool:
        return all(self._start_offsets.get(where, 0) >= high for where, high in self._targets.items())


def headers_of(message: Message) -> Any:
    """A message's headers; none where a name is not UTF-8, which Kafka lets pass and the client cannot read.

    To be asked once of a message: after such a name the client's own list of them is broken.
    """
    try:
        return message.headers()
    except (UnicodeDecodeError, SystemError):
        return None


def topic_sources(settings: KafkaSettings, topics: Iterable[str], timeout_seconds: float = 10) -> dict[str, int]:
    """Identity of each topic, for the offsets that rows carry. Asks the broker unless `kafka.log_id` is set."""
    names = list(topics)
    if settings.log_id:
        return {name: source_id(name, settings.log_id) for name in names}
    admin = AdminClient(client_config(settings))
    sources: dict[str, int] = {}
    try:
        described = admin.describe_topics(TopicCollection(names), request_timeout=timeout_seconds)
        for name, future in described.items():
            sources[name] = source_id(name, str(future.result(timeout_seconds).topic_id))
    except KafkaException as error:
        raise StageError(
            "kafka",
            f"{settings.bootstrap_servers} did not describe the topics ({error.args[0].str()}); "
            "make them with `headrace topics`",
        ) from error
    return sources


def wait_for_kafka(settings: KafkaSettings, timeout_seconds: float) -> None:
    """Returns when the broker answers; raises StageError when it does not in time."""
    admin = AdminClient(client_config(settings))
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            admin.list_topics(timeout=min(2.0, timeout_seconds))
            return
        except KafkaException as error:
            if time.monotonic() >= end:
                raise StageError(
                    "kafka", f"no broker answers at {settings.bootstrap_servers}: {error.args[0].str()}"
                ) from error
