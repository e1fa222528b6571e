"""One poll of the consumer, sorted out: what can be applied, what is for the dead letters, and how far it reaches.

Between streams/reader.py, which polls, and streams/rows.py, which applies. Knows neither the client's state nor the
store. Invariant: each message of a partition that is being read is either received or a letter, and `last` covers it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.kafka import headers_of
from core.telemetry import get_logger
from core.topics import Topics
from features.windows import new_tuple
from streams import metrics
from streams.processor import RawMessage, Received, try_decode
from streams.sink import Row

_log = get_logger("streams.batch")

Where = tuple[str, int]


@dataclass(slots=True)
class Batch:
    """One poll, sorted out."""

    received: list[Received] = field(default_factory=list)
    letters: list[tuple[RawMessage, str]] = field(default_factory=list)
    # Newest offset of each topic-partition.
    last: dict[Where, int] = field(default_factory=dict)

    def rows(self) -> dict[Where, list[Row]]:
        """What was received, for the event log; an empty list where all that came were letters."""
        rows: dict[Where, list[Row]] = {where: [] for where in self.last}
        for received in self.received:
            rows[received.raw.topic, received.raw.partition].append((received.message, received.raw))
        return rows


def sort_out(
    messages: Sequence[Any],
    placed: Collection[int],
    processed: Mapping[Where, int],
    topics: Topics,
    sources: Mapping[str, int],
    on_error: Callable[[Any], None],
) -> Batch:
    """Decodes messages.

    Args:
        messages: the client's.
        placed: partitions that are being read; what comes of others is left out.
        processed: newest offset that was processed before.
        topics: their names.
        sources: identity of each topic.
        on_error: told what the client says of Kafka instead of a message; may raise.
    """
    batch = Batch()
    for message in messages:
        error = message.error()
        if error is not None:
            on_error(error)
            continue
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        if partition not in placed:
            continue
        time_ms = max(0, message.timestamp()[1])
        raw = new_tuple(
            RawMessage, (topic, partition, offset, message.key(), message.value(), headers_of(message), time_ms)
        )
        result = try_decode(raw, topics, sources)
        if isinstance(result, str):
            batch.letters.append((raw, result))
        else:
            batch.received.append(result)
        where = (topic, partition)
        before = batch.last.get(where)
        if before is None:
            before = processed.get(where, offset - 1)
        if offset > before + 1:
            _tell_missed(where, before + 1, offset)
        batch.last[where] = offset
    return batch


def _tell_missed(where: Where, first: int, end: int) -> None:
    """Neither compaction nor transactions leave gaps in these topics: retention was shorter than the lag."""
    metrics.MISSED.labels(where[0]).inc(end - first)
    _log.error(
        "kafka dropped messages before they were read; `headrace rebuild` takes them from an event log that has them",
        topic=where[0],
        partition=where[1],
        first=first,
        count=end - first,
    )
