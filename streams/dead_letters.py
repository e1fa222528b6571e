"""Dead letters: what can never be processed goes to `<topic>.dead-letter`, with its bytes, its place and the reason.

Called by the reader and the agents. Invariant: `deliver` returns True only when Kafka has every letter, so that
nothing is acknowledged or passed by a marker before.
"""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from core.clock import Clock, SystemClock
from core.codec import from_ms
from core.errors import StageError
from core.kafka import KafkaProducer, Written
from core.telemetry import get_logger
from core.topics import dead_letter
from headrace.v1.events_pb2 import DeadLetter
from streams import metrics
from streams.processor import RawMessage

_log = get_logger("streams.dead_letters")

# What brokers take by default is 1 MiB; what is longer stays readable at its source position.
_MAX_BYTES = 900_000
_MAX_KEY_BYTES = 100_000
_DELIVERY_SECONDS = 15
_RETRY_SECONDS = 0.2


class DeadLetters:
    """Sends dead letters and waits for Kafka to have them."""

    def __init__(self, producer: KafkaProducer, clock: Clock | None = None) -> None:
        self._producer = producer
        self._clock = clock or SystemClock()

    def deliver(self, letters: Sequence[tuple[RawMessage, str]], stopping: threading.Event) -> bool:
        """Sends letters until all are in Kafka. False when `stopping` was set before that."""
        waiting = list(letters)
        while waiting and not stopping.is_set():
            sent = [(letter, self._send(*letter)) for letter in waiting]
            waiting = [letter for letter, future in sent if not _arrived(future)]
            if waiting:
                stopping.wait(_RETRY_SECONDS)
        for raw, reason in letters if not waiting else ():
            metrics.DEAD_LETTERS.labels(raw.topic).inc()
            _log.warning(
                "dead letter", topic=raw.topic, partition=raw.partition, offset=raw.offset, reason=reason[:300]
            )
        return not waiting

    def _send(self, raw: RawMessage, reason: str) -> "Future[Written]":
        letter = as_letter(raw, reason, self._clock.now_ms())
        return self._producer.send(dead_letter(raw.topic), letter.key, letter.SerializeToString())


def as_letter(raw: RawMessage, reason: str, now_ms: int) -> DeadLetter:
    """The letter of a message. What no topic would take is cut, and the reason says so."""
    key, value = raw.key or b"", raw.value or b""
    headers = dict(_headers(raw.headers))
    room = _MAX_BYTES - sum(len(name) * 4 + len(content) for name, content in headers.items())
    if room < _MAX_KEY_BYTES:
        reason, headers, room = f"{reason} (headers left out: too long)", {}, _MAX_BYTES
    if len(key) > _MAX_KEY_BYTES:
        reason, key = f"{reason} (key cut from {len(key)} bytes)", key[:_MAX_KEY_BYTES]
    if len(value) > room - len(key):
        reason, value = f"{reason} (value cut from {len(value)} bytes)", value[: room - len(key)]
    return DeadLetter(
        key=key,
        value=value,
        headers=headers,
        topic=raw.topic,
        partition=raw.partition,
        offset=raw.offset,
        # A reason may quote the message; what is no Unicode in it must not stop the letter.
        reason=reason.encode("utf-8", "replace").decode("utf-8", "replace"),
        dead_letter_time=from_ms(now_ms),
    )


def _headers(headers: object) -> Iterable[tuple[str, bytes]]:
    pairs = headers.items() if isinstance(headers, dict) else headers or ()
    for name, content in pairs:  # type: ignore[attr-defined]
        yield str(name), content if isinstance(content, bytes) else str(content or "").encode("utf-8", "replace")


def _arrived(future: "Future[Written]") -> bool:
    try:
        future.result(_DELIVERY_SECONDS)
    except (StageError, TimeoutError) as error:
        _log.warning("dead letter not delivered yet, trying again", problem=str(error))
        return False
    return True
