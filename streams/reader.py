"""The batch reader: the user-keyed topics, from Kafka to rows, on a thread of its own.

One consumer follows the group protocol on the events topic; the partitions of the same number of the other user-keyed
topics come with it, so one worker owns all that concerns a user, whatever the assignor. Invariant: reading starts at
the older of the partition's marker in the store and the event log's position, never at the group's offset; after
any error of the store, and after anything unexpected, the rows in memory are dropped and it starts there again.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from core.clock import Clock, SystemClock
from core.errors import ConfigError, StageError
from core.kafka import topic_sources
from core.process import uncollected
from core.settings import Settings
from core.telemetry import get_logger
from core.topics import Topics
from features.positions import Offsets
from streams import metrics
from streams.batch import Batch, Where, sort_out
from streams.broadcast import StatsBroadcast
from streams.consumer import check_partitions, consumer_config
from streams.dead_letters import DeadLetters
from streams.rows import Rows
from streams.sink import EventLogSink

_log = get_logger("streams.reader")

_BACKOFF_SECONDS = (0.05, 2.0)
_COMMIT_SECONDS = 1.0
# How long a poll waits for a first message: markers, broadcasts and a stop wait with it.
_IDLE_SECONDS = 0.02
# Batches of so many are a worker's that is behind: they make a million objects, which are in no cycles.
_CATCHING_UP_EVENTS = 1000
# How long the last broadcast may take when the worker stops; what is not acknowledged by then is told again.
_BROADCAST_SECONDS = 2.0
# Sessions that a new client has to join the group; one that the group has lost has one session to come back.
_SESSIONS_TO_JOIN = 4


class BatchReader:
    """Owns the consumer and its thread. `rows` and `broadcast` are used on that thread only."""

    def __init__(
        self,
        settings: Settings,
        rows: Rows,
        dead_letters: DeadLetters,
        sink: EventLogSink | None,
        broadcast: StatsBroadcast,
        on_dirty: Callable[[set[str]], None],
        on_taken: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
        before_reading: Callable[[Sequence[int]], object] = lambda _: None,
    ) -> None:
        self._settings = settings
        # Before any marker is believed: rows of another definition stop the reading, erased users whose rows are back,
        # or lost, are erased again.
        self._before_reading = before_reading
        self._rows, self._dead_letters, self._sink, self._broadcast = rows, dead_letters, sink, broadcast
        # Told of users whose state has changed, and of partitions that this worker begins to read.
        self._on_dirty, self._on_taken = on_dirty, on_taken
        self._clock = clock or SystemClock()
        self._topics = Topics(settings.kafka.topic_prefix)
        self._cooperative = settings.streams.group_protocol in ("cooperative-sticky", "consumer")
        self._sources: dict[str, int] = {}
        # Partition numbers that the group gave to this worker; those of them that are being read.
        self._owned: set[int] = set()
        self._placed: set[int] = set()
        self._assigned_once = False
        # When to give this client up, unless the group takes it in before; None: it is in the group.
        self._join_by: float | None = None
        self._processed: dict[Where, int] = {}
        # Offsets that must be processed before the rows are as new as the marker says.
        self._targets: dict[Where, int] = {}
        self._unmarked: set[int] = set()
        # What was processed when the replicas had last been told of everything.
        self._told: dict[Where, int] = {}
        self._store_problem: StageError | None = None
        self._poll_max = settings.streams.poll_max_events
        self._marker_due = self._commit_due = self._place_due = 0.0
        self._backoff_seconds = _BACKOFF_SECONDS[0]
        self._problem = "not started"
        # What the client said last of Kafka, for whoever asks why there is nothing to read.
        self._kafka_problem = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batch-reader", daemon=True)

    # --- for the owner, from any thread ---

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finishes the batch under way, writes the markers and leaves the group."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def processed(self) -> dict[Where, int]:
        """Newest processed offset of each topic-partition that is being read, -1 where there is none yet."""
        processed, placed = dict(self._processed), set(self._placed)
        return {(topic, p): processed.get((topic, p), -1) for p in placed for topic in self._topics.user_keyed}

    def owns(self, partition: int) -> bool:
        return partition in self._placed

    @property
    def is_in_group(self) -> bool:
        """Whether there is nothing to wait for: the group has taken the client in, with or without partitions."""
        return self._join_by is None

    def skip_expired(self, oldest: Mapping[Where, int]) -> None:
        """Told the oldest offsets that Kafka still has: what the event log lacks below them will never come."""
        for where, target in list(self._targets.items()):
            if oldest.get(where, 0) > target:
                self._targets.pop(where, None)

    def problem(self) -> str | None:
        """Why this reader is not ready, or nothing."""
        if self._problem:
            return self._problem
        if not self._assigned_once:
            why = f" ({self._kafka_problem})" if self._kafka_problem else ""
            return f"no partitions yet from group {self._settings.streams.group_id}{why}"
        waiting = self._owned - self._placed
        if waiting:
            return f"{len(waiting)} partitions wait for their marker"
        behind = [where for where, target in dict(self._targets).items() if self._processed.get(where, -1) < target]
        return f"{len(behind)} topic-partitions are still behind their marker" if behind else None

    # --- the thread ---

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._session()
            except (StageError, ConfigError, KafkaException) as error:
                self._problem = str(error)
                _log.warning("cannot read, trying again", problem=str(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, the marker is where to go on
                self._problem = f"unexpected {type(error).__name__}: {error}"
                _log.error("unexpected error, starting again from the markers", error=repr(error))
                metrics.BACK_TO_MARKER.labels("unexpected").inc()
            self._stopping.wait(self._backoff())

    def _session(self) -> None:
        """One consumer's life."""
        self._sources = topic_sources(self._settings.kafka, self._topics.user_keyed)
        consumer = Consumer(consumer_config(self._settings))
        try:
            check_partitions(consumer, self._topics)
            consumer.subscribe(
                [self._topics.events], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            self._problem = ""
            self._join_by = None
            # By the protocol "consumer" a member that gets no partitions is not told that it is one.
            if self._settings.streams.group_protocol != "consumer":
                self._expect_to_join(_SESSIONS_TO_JOIN)
            while not self._stopping.is_set():
                self._check_membership()
                self._step(consumer)
            self._drain(consumer)
        finally:
            # Leaving the group calls on_revoke: what it does with the store was done by _drain.
            self._forget(self._owned)
            consumer.close()

    def _expect_to_join(self, sessions: int) -> None:
        self._join_by = self._clock.monotonic() + sessions * self._settings.streams.session_timeout_ms / 1000

    def _check_membership(self) -> None:
        """Raises StageError where the client does not get (back) into the group.

        After a broker hung, librdkafka was seen to queue its requests for the coordinator without ever connecting to
        it again; a new client joins at once.
        """
        if self._join_by is not None and self._clock.monotonic() > self._join_by:
            why = f": {self._kafka_problem}" if self._kafka_problem else ""
            raise StageError("kafka", f"not let into group {self._settings.streams.group_id} in time{why}")

    def _step(self, consumer: Consumer) -> None:
        messages = self._poll(consumer)
        try:
            problem, self._store_problem = self._store_problem, None
            if problem is not None:
                raise problem
            if messages:
                with uncollected() if len(messages) >= _CATCHING_UP_EVENTS else nullcontext():
                    self._handle(messages)
            # After the messages: those of a partition that was lost and came back belong to its former time.
            self._place(consumer)
            self._move_markers(consumer)
            self._note_told(self._broadcast.tick(self._processed))
            # What is less may go through where a batch of thousands of large rows did not.
            self._poll_max = min(2 * self._poll_max, self._settings.streams.poll_max_events)
        except StageError as error:
            self._poll_max = max(1, self._poll_max // 2)
            self._go_back(consumer, error)

    def _poll(self, consumer: Consumer) -> list[Any]:
        """What is there, as soon as there is something; nothing after a short wait."""
        first = consumer.consume(1, _IDLE_SECONDS)
        if not first:
            return []
        # Asked for many, the client would wait for the last of them.
        return [*first, *consumer.consume(self._poll_max, 0)]

    def _handle(self, messages: Sequence[Any]) -> None:
        batch = sort_out(messages, self._placed, self._processed, self._topics, self._sources, self._note_error)
        if not batch.last:
            return
        begin = self._clock.monotonic()
        applied = self._rows.commit(batch.received)
        metrics.WRITE_MS.observe((self._clock.monotonic() - begin) * 1000)
        metrics.BATCH_EVENTS.set(len(messages))
        if applied.dirty:
            self._on_dirty(applied.dirty)
        self._broadcast.put(applied.stats, applied.stats.keys() - applied.with_events)
        letters = batch.letters + [(received.raw, reason) for received, reason in applied.refused]
        if letters and not self._dead_letters.deliver(letters, self._stopping):
            raise StageError("kafka", "stopped before the dead letters were delivered")
        self._log_rows(batch)
        self._processed.update(batch.last)
        self._unmarked.update(partition for _, partition in batch.last)
        for (topic, outcome), count in applied.outcomes.items():
            metrics.EVENTS.labels(topic, outcome.name.lower()).inc(count)
        for raw, _ in letters:
            metrics.EVENTS.labels(raw.topic, "dead_letter").inc()
        metrics.LATE.inc(applied.late)
        metrics.OUTSIDE_HORIZON.inc(applied.outside_horizon)
        if applied.watermark_ms:
            metrics.WATERMARK_AGE.set(self._clock.now_ms() - applied.watermark_ms)

    def _note_error(self, error: KafkaError) -> None:
        """What the client says of Kafka, beside messages."""
        self._kafka_problem = error.str()
        _log.warning("kafka", problem=self._kafka_problem)
        if error.fatal() or error.code() == KafkaError._FATAL:
            # This client reads nothing any more: fenced, as by its own join after the broker was away.
            raise KafkaException(error)

    def _log_rows(self, batch: Batch) -> None:
        if self._sink is None:
            return
        rows = batch.rows()
        for (topic, partition), last in batch.last.items():
            if not self._sink.add(topic, partition, last, rows[topic, partition], self._stopping):
                raise StageError("event-log", "stopped before the event log took the rows")

    # --- where reading starts ---

    def _place(self, consumer: Consumer) -> None:
        """Starts reading the partitions that wait for it, from their markers."""
        waiting = sorted(self._owned - self._placed)
        if not waiting or self._clock.monotonic() < self._place_due:
            return
        self._before_reading(waiting)
        starts: list[TopicPartition] = []
        targets: dict[Where, int] = {}
        for partition in waiting:
            marker = self._rows.claim(partition, self._sources.values())
            told = self._rows.read_told(partition)
            for topic in self._topics.user_keyed:
                source = self._sources[topic]
                marked = written = marker.get((source, partition), -1)
                if self._sink is not None:
                    written = self._sink.open(topic, source, partition)
                # Whoever wrote the rows may have died before the replicas were told: a replay tells them again.
                done = min(marked, written, marked if told is None else told.get((source, partition), -1))
                starts.append(TopicPartition(topic, partition, done + 1 if done >= 0 else OFFSET_BEGINNING))
                targets[topic, partition] = marked
                self._processed[topic, partition] = self._told[topic, partition] = done
        self._placed.update(waiting)
        self._targets.update(targets)
        self._backoff_seconds = _BACKOFF_SECONDS[0]
        if self._cooperative:
            consumer.incremental_assign(starts)
        else:
            # An eager group gives everything at once and takes everything back at once.
            consumer.assign(starts)
        self._on_taken()
        _log.info("reading", partitions=waiting, starts={f"{s.topic}/{s.partition}": s.offset for s in starts})

    def _go_back(self, consumer: Consumer, error: StageError) -> None:
        """Drops what is in memory; reading goes on from the markers as soon as they can be read."""
        metrics.BACK_TO_MARKER.labels(type(error).__name__).inc()
        pause = self._backoff()
        _log.warning("back to the markers", problem=str(error), pause_seconds=pause)
        self._rows.drop()
        if self._placed and self._cooperative:
            consumer.incremental_unassign(self._companions(self._placed))
        elif self._placed:
            consumer.assign([])
        self._placed.clear()
        self._targets.clear()
        self._unmarked.clear()
        self._place_due = self._clock.monotonic() + pause

    def _backoff(self) -> float:
        pause = self._backoff_seconds
        self._backoff_seconds = min(2 * pause, _BACKOFF_SECONDS[1])
        return pause

    # --- how far it has come ---

    def _move_markers(self, consumer: Consumer, *, now: bool = False) -> None:
        moment = self._clock.monotonic()
        if self._unmarked and (now or moment >= self._marker_due):
            self._marker_due = moment + self._settings.streams.marker_interval_ms / 1000
            self._mark(self._unmarked)
            self._unmarked.clear()
        if self._placed and (now or moment >= self._commit_due):
            self._commit_due = moment + _COMMIT_SECONDS
            self._commit_offsets(consumer)

    def _mark(self, partitions: Iterable[int]) -> None:
        numbers = sorted(partitions)
        self._rows.write_markers(
            {partition: self._reached(self._processed, partition) for partition in numbers},
            {partition: self._reached(self._told, partition) for partition in numbers},
        )

    def _reached(self, newest: Mapping[Where, int], partition: int) -> Offsets:
        offsets = {topic: newest.get((topic, partition), -1) for topic in self._topics.user_keyed}
        return {(self._sources[topic], partition): offset for topic, offset in offsets.items() if offset >= 0}

    def _note_told(self, told: Mapping[Where, int] | None) -> None:
        # Of what was lost meanwhile, another worker tells.
        self._told.update({where: offset for where, offset in (told or {}).items() if where in self._told})

    def _commit_offsets(self, consumer: Consumer) -> None:
        """Tells the group how far this worker has come. Only tools that show lag read it."""
        offsets = [
            TopicPartition(topic, partition, self._processed[topic, partition] + 1)
            for partition in self._placed
            for topic in self._topics.user_keyed
            if self._processed.get((topic, partition), -1) >= 0
        ]
        try:
            if offsets:
                consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            _log.debug("offsets not committed", problem=str(error))

    def _drain(self, consumer: Consumer) -> None:
        self._note_told(self._broadcast.finish(self._processed, _BROADCAST_SECONDS))
        try:
            self._move_markers(consumer, now=True)
        except StageError as error:
            _log.warning("markers not written at the end; the next worker reads a little more", problem=str(error))

    # --- what the group says; called inside consume() ---

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        _log.info("assigned", partitions=sorted(tp.partition for tp in assigned))
        self._assigned_once = True
        self._join_by = None
        self._owned.update(tp.partition for tp in assigned)
        # Nothing is read before its marker is known: see _place.
        if self._cooperative:
            consumer.incremental_assign([])
        else:
            consumer.assign([])

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition]) -> None:
        partitions = {tp.partition for tp in revoked}
        _log.info("revoked", partitions=sorted(partitions))
        try:
            self._mark(partitions & self._unmarked)
        except StageError as error:
            _log.warning("marker not written; the next worker reads a little more", problem=str(error))
            # Whatever it was, it concerns the rows of the partitions that stay, too.
            self._store_problem = error
        self._give_up(consumer, partitions)

    def _on_lost(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        partitions = {tp.partition for tp in lost}
        _log.warning("lost to another worker", partitions=sorted(partitions))
        self._expect_to_join(1)
        self._give_up(consumer, partitions)

    def _give_up(self, consumer: Consumer, partitions: set[int]) -> None:
        reading = partitions & self._placed
        self._forget(partitions)
        if self._cooperative:
            consumer.incremental_unassign(self._companions(reading))
        else:
            consumer.unassign()

    def _forget(self, partitions: set[int]) -> None:
        gone = set(partitions)
        if self._sink is not None:
            self._sink.close(self._wheres(gone & self._placed))
        self._rows.drop(gone)
        self._broadcast.forget(gone)
        self._owned -= gone
        self._placed -= gone
        self._unmarked -= gone
        for where in self._wheres(gone):
            self._processed.pop(where, None)
            self._told.pop(where, None)
            self._targets.pop(where, None)

    def _wheres(self, partitions: set[int]) -> list[Where]:
        return [(topic, partition) for partition in sorted(partitions) for topic in self._topics.user_keyed]

    def _companions(self, partitions: set[int]) -> list[TopicPartition]:
        return [TopicPartition(topic, partition) for topic, partition in self._wheres(partitions)]
