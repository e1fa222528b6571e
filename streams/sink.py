"""The event log sink: what was read goes to Parquet, each source position once, on a thread of its own.

The reader hands every batch over; rows wait in memory until a partition has enough of them or has waited long enough.
Invariant: rows that were handed over and not written are lost with the process, so a restart reads again from the
older of the marker and `open()`'s position; a full buffer makes `add` wait, so memory stays bounded.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from google.protobuf.message import Message

from core.clock import Clock, SystemClock
from core.errors import StageError
from core.settings import StreamsSettings
from core.telemetry import get_logger
from core.topics import Topics
from features.stores import event_rows
from features.stores.event_rows import LogTable, Source
from features.windows import new_tuple
from streams import metrics
from streams.processor import RawMessage
from streams.segments import Segments, SegmentTakenError, Stretch

_log = get_logger("streams.sink")

# The checked message, None for a tombstone.
Row = tuple[Message | None, RawMessage]
Where = tuple[str, int]
# Buffers may hold this many times the size of a file before `add` waits.
_BUFFERS = 4
# ... or this much of the messages' bytes, however few they are.
_BUFFERED_BYTES = 64 << 20
_RETRY_SECONDS = 0.5
_PAUSE_SECONDS = 0.03


@dataclass(slots=True)
class _Buffer:
    """Rows of one topic-partition that are not in the log yet."""

    stretch: Stretch
    # Newest offset in the log, and newest offset handed over.
    written: int
    taken: int
    rows: list[Row] = field(default_factory=list)
    # Of their messages.
    size_bytes: int = 0
    since: float = 0.0

    def put(self, rows: Sequence[Row]) -> None:
        """Takes those of the rows (in order of offsets) that it has not had."""
        if rows and rows[0][1].offset <= self.taken:
            rows = [row for row in rows if row[1].offset > self.taken]
        self.rows += rows
        self.size_bytes += sum(map(_size, rows))

    def drop(self, last: int) -> None:
        """Forgets the rows up to an offset."""
        kept = [] if not self.rows or self.rows[-1][1].offset <= last else self.rows
        self.rows = [row for row in kept if row[1].offset > last]
        self.size_bytes = sum(map(_size, self.rows))


class EventLogSink:
    """Buffers of all partitions and the thread that writes them."""

    def __init__(self, settings: StreamsSettings, topics: Topics, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._segments = Segments(settings.event_log_path, self._clock)
        self._tables = tables_of(topics)
        self._buffers: dict[Where, _Buffer] = {}
        # Guards the buffers; never held while writing.
        self._changed = threading.Condition()
        # Held while writing, so that a partition is written by one thread at a time.
        self._writing = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Writes what is left and ends."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._try_flush(list(self._buffers))

    def open(self, topic: str, source: int, partition: int) -> int:
        """The newest offset of a topic-partition that is in the log or in memory, -1 for none.

        Raises:
            StageError: the log cannot be read.
        """
        with self._changed:
            buffer = self._buffers.get((topic, partition))
        if buffer is None or buffer.stretch.source != source:
            stretch = Stretch(self._tables[topic], source, partition)
            position = self._segments.position(stretch)
            buffer = _Buffer(stretch, position, position)
            with self._changed:
                self._buffers[topic, partition] = buffer
        return buffer.taken

    def add(self, topic: str, partition: int, last: int, rows: Sequence[Row], stopping: threading.Event) -> bool:
        """Takes the rows of an opened topic-partition up to offset `last` (malformed messages have none).

        Waits while the buffers are full; False, with nothing taken, where `stopping` is set meanwhile.
        """
        with self._changed:
            while self._full():
                if stopping.is_set():
                    return False
                self._changed.notify_all()
                self._changed.wait(_RETRY_SECONDS)
            buffer = self._buffers[topic, partition]
            if last <= buffer.taken:
                return True
            if buffer.taken == buffer.written and not buffer.rows:
                buffer.since = self._clock.monotonic()
            buffer.put(rows)
            buffer.taken = last
            if len(buffer.rows) >= self._settings.event_log_max_events:
                self._changed.notify_all()
        return True

    def close(self, partitions: Mapping[Where, object] | Sequence[Where]) -> None:
        """Writes what is left of some topic-partitions and forgets them (they belong to another worker now)."""
        self._try_flush(list(partitions))
        with self._changed:
            for where in partitions:
                self._buffers.pop(where, None)

    def flush(self) -> None:
        """Writes everything that is buffered now. Raises StageError where the log does not take it."""
        for where in list(self._buffers):
            self._flush(where)

    def written(self, topic: str, partition: int) -> int:
        """Newest offset that is in the log, as this process knows it."""
        buffer = self._buffers.get((topic, partition))
        return -1 if buffer is None else buffer.written

    def _full(self) -> bool:
        buffered = sum(len(buffer.rows) for buffer in self._buffers.values())
        metrics.LOG_BUFFERED.set(buffered)
        size_bytes = sum(buffer.size_bytes for buffer in self._buffers.values())
        return buffered >= _BUFFERS * self._settings.event_log_max_events or size_bytes >= _BUFFERED_BYTES

    def _run(self) -> None:
        self._sweep()
        while not self._stopping.is_set():
            with self._changed:
                due = self._due()
                if not due:
                    self._changed.wait(min(0.2, self._settings.event_log_interval_ms / 1000))
            done = True
            for where in due:
                done &= self._try_flush([where])
                if not self._full():
                    # The batch reader shares the interpreter with the making of files.
                    self._stopping.wait(_PAUSE_SECONDS)
            if not done:
                self._stopping.wait(_RETRY_SECONDS)

    def _sweep(self) -> None:
        try:
            if left := self._segments.sweep():
                _log.info("removed what earlier workers had left unfinished in the event log", folders=left)
        except StageError as error:
            _log.warning("what earlier workers left unfinished in the event log stays", problem=str(error))

    def _due(self) -> list[Where]:
        now, full = self._clock.monotonic(), self._full()
        settings = self._settings
        return [
            where
            for where, buffer in self._buffers.items()
            if buffer.taken > buffer.written
            and (
                full
                or len(buffer.rows) >= settings.event_log_max_events
                or now - buffer.since >= settings.event_log_interval_ms / 1000
            )
        ]

    def _try_flush(self, due: Sequence[Where]) -> bool:
        done = True
        for where in due:
            try:
                self._flush(where)
            except StageError as error:
                _log.warning("event log does not take rows, trying again", problem=str(error))
                done = False
            except Exception as error:  # noqa: BLE001 - the rows of one partition must not end this thread
                _log.error("unexpected error in the event log, trying again", where=where, error=repr(error))
                done = False
        return done

    def _flush(self, where: Where) -> None:
        with self._writing:
            with self._changed:
                buffer = self._buffers.get(where)
                if buffer is None or buffer.taken == buffer.written:
                    return
                first, last, rows = buffer.written + 1, buffer.taken, list(buffer.rows)
                since = self._clock.monotonic()
            try:
                self._segments.commit(buffer.stretch, first, last, _table(buffer.stretch.table, rows))
                metrics.LOG_ROWS.labels(buffer.stretch.table.name).inc(len(rows))
                written = last
            except SegmentTakenError as error:
                written = self._segments.position(buffer.stretch)
                _log.info("another worker wrote this part of the event log", problem=str(error), position=written)
            with self._changed:
                buffer.drop(written)
                buffer.written = max(buffer.written, written)
                buffer.taken = max(buffer.taken, written)
                buffer.since = since
                self._changed.notify_all()


def tables_of(topics: Topics) -> dict[str, LogTable]:
    """Table of the event log that each topic's messages go to."""
    return {
        topics.events: event_rows.EVENTS,
        topics.feedback: event_rows.FEEDBACK,
        topics.impressions: event_rows.IMPRESSIONS,
        topics.items: event_rows.ITEMS,
        topics.users: event_rows.USERS,
    }


def _table(table: LogTable, rows: Sequence[Row]) -> pa.Table:
    messages = [message for message, _ in rows if message is not None]
    if len(messages) == len(rows):
        return event_rows.to_table(table, messages, _sources(raw for _, raw in rows))
    kept = _sources(raw for message, raw in rows if message is not None)
    gone = [raw for message, raw in rows if message is None]
    deletions = event_rows.deletions(table, [(raw.key or b"").decode() for raw in gone], _sources(gone))
    return pa.concat_tables([event_rows.to_table(table, messages, kept), deletions])


def _size(row: Row) -> int:
    return len(row[1].value or b"")


def _sources(raws: Iterable[RawMessage]) -> list[Source]:
    return [
        new_tuple(Source, (topic, partition, offset, time_ms or None))
        for topic, partition, offset, _, _, _, time_ms in raws
    ]
