"""Dead letters as an operator handles them: listed, shown, sent again.

Behind `headrace dead-letter`. A letter's position is `<topic>/<partition>/<offset>` on its dead-letter topic, as in
`events/0/17`; it keeps it where the letter is moved (letter_removal.py). What was sent again is remembered in that
topic itself, by notes (empty values) under the letter's key: one before the message goes out, one when Kafka has it.
Invariant: a letter with a note is not sent again unless told,
so a run that was cut off sends nothing twice, and says which letters it cannot be sure of.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition
from google.protobuf.message import DecodeError

from core.codec import to_ms
from core.errors import ConfigError, NotFoundError, StageError
from core.kafka import KafkaProducer, Written, client_config, topic_sources
from core.settings import KafkaSettings, Settings
from core.topics import Topics, dead_letter
from features.stores.erasures import Erasure, Erasures
from headrace.v1.events_pb2 import DeadLetter

# On a message that was sent again: the position of its letter. On a note: the same, beside what the note says.
SENT_FROM = "headrace-dead-letter"
NOTE = "headrace-note"
BEGUN, DONE = b"begun", b"done"
# On a letter that was moved: its position.
FIRST = "headrace-first-position"
# What streams/dead_letters.py writes where a letter does not hold the whole message.
_CUT = ("(value cut from", "(key cut from", "(headers left out")
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter. `sent` is "" (never sent again), "begun" (cut off: perhaps) or "done"."""

    position: str
    letter: DeadLetter
    sent: str = ""

    @property
    def time_ms(self) -> int:
        return to_ms(self.letter.dead_letter_time)

    @property
    def is_cut(self) -> bool:
        return any(mark in self.letter.reason for mark in _CUT)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which letters. Positions, or all that match the rest; nothing given = all of them."""

    positions: Sequence[str] = ()
    topic: str = ""
    reason: str = ""
    key: str = ""

    def takes(self, letter: Letter) -> bool:
        return (
            (not self.positions or letter.position in self.positions)
            and self.reason.lower() in letter.letter.reason.lower()
            and (not self.key or letter.letter.key == self.key.encode())
        )


@dataclass(frozen=True, slots=True)
class Redriven:
    """What became of the letters chosen: where those that were sent lie now, and why the others were not."""

    sent: dict[str, Written]
    skipped: dict[str, str]


def read_letters(settings: KafkaSettings, choice: Choice) -> list[Letter]:
    """The letters that Kafka holds, as chosen, oldest first.

    Raises:
        StageError: Kafka does not answer.
        NotFoundError: a position that holds no letter.
        ConfigError: a topic that has no dead letters.
    """
    names = short_names(settings)
    if choice.topic and choice.topic not in names.values():
        raise ConfigError(f"--topic {choice.topic}: say one of {', '.join(names.values())}")
    found: dict[str, Letter] = {}
    sent: dict[str, str] = {}
    for message in read_to_end(settings, [dead_letter(t) for t, n in names.items() if choice.topic in ("", n)]):
        headers = dict(message.headers() or ())
        if NOTE in headers:
            sent[headers.get(SENT_FROM, b"").decode()] = headers[NOTE].decode()
            continue
        position = position_of(message, names)
        found[position] = Letter(position, parse(message))
    letters = [Letter(one.position, one.letter, sent.get(one.position, "")) for one in found.values()]
    missing = [position for position in choice.positions if position not in found]
    if missing:
        raise NotFoundError(f"no dead letter at {missing[0]}; `headrace dead-letter list` shows what there is")
    return sorted(filter(choice.takes, letters), key=lambda one: (one.time_ms, one.position))


def redrive(
    settings: KafkaSettings,
    letters: Iterable[Letter],
    *,
    again: bool = False,
    set_headers: Mapping[str, bytes] | None = None,
    is_erased: Callable[[DeadLetter], bool] = lambda _: False,
) -> Redriven:
    """Sends the original bytes, key and headers of letters to their source topics.

    Args:
        settings: where Kafka is.
        letters: as read_letters gives them.
        again: also those that were sent before.
        set_headers: headers to add, or to put in the place of the original ones.
        is_erased: whether a letter's user was erased after it; such letters are never sent.

    Raises:
        StageError: Kafka did not take a message; those before it are sent and noted.
    """
    result = Redriven({}, {})
    producer = KafkaProducer(settings)
    try:
        for one in letters:
            reason = "its user was erased since" if is_erased(one.letter) else _reason_to_skip(one, again=again)
            if reason:
                result.skipped[one.position] = reason
            else:
                result.sent[one.position] = _send(producer, one, set_headers or {})
    finally:
        producer.close()
    return result


def erased_letters(settings: Settings) -> Callable[[DeadLetter], bool]:
    """For `redrive`: sent again, a message from before its user's erasure would count as a new one."""
    records = Erasures(settings.streams.event_log_path).all() if settings.streams.event_log_path else []
    erases = erasing_letters(settings, records)
    # A key that is no id names nobody.
    return lambda letter: erases(letter, letter.key.decode("utf-8", "replace"))


def erasing_letters(settings: Settings, records: Iterable[Erasure]) -> Callable[[DeadLetter, str], bool]:
    """Whether a letter is from before a user's tombstone."""
    of_user: dict[str, list[Erasure]] = {}
    for record in records:
        of_user.setdefault(record.user_id, []).append(record)
    topics = Topics(settings.kafka.topic_prefix)
    sources = topic_sources(settings.kafka, topics.inbound) if of_user else {}

    def erases(letter: DeadLetter, user_id: str) -> bool:
        place = (sources.get(letter.topic), letter.partition, letter.offset, to_ms(letter.dead_letter_time))
        found = of_user.get(user_id, ())
        if letter.topic == topics.users:
            return any(one.erases_profile(*place) for one in found)
        return letter.topic != topics.items and any(one.erases(*place) for one in found)

    return erases


def _reason_to_skip(one: Letter, *, again: bool) -> str:
    if one.is_cut:
        where = f"{one.letter.topic}/{one.letter.partition}/{one.letter.offset}"
        return f"holds a part of the message only; the whole one is at {where} while Kafka keeps it"
    if one.sent == DONE.decode() and not again:
        return "sent before; --again sends it once more"
    if one.sent == BEGUN.decode() and not again:
        return "perhaps sent before (that run was cut off); --again sends it"
    return ""


def _send(producer: KafkaProducer, one: Letter, set_headers: Mapping[str, bytes]) -> Written:
    letter, position = one.letter, one.position.encode()
    headers = {**letter.headers, **set_headers, SENT_FROM: position}

    def note(what: bytes) -> None:
        _wait(producer.send(dead_letter(letter.topic), letter.key, b"", {SENT_FROM: position, NOTE: what}))

    note(BEGUN)
    written = _wait(producer.send(letter.topic, letter.key, letter.value, headers))
    note(DONE)
    return written


def _wait(future: "Future[Written]") -> Written:
    return future.result(2 * _TIMEOUT_SECONDS)


def read_to_end(settings: KafkaSettings, topics: Sequence[str]) -> Iterator[Any]:
    """Every message that the topics hold now. Raises StageError."""
    config = {
        **client_config(settings),
        "group.id": "headrace-tools",  # required by the client, never joined nor committed
        "enable.auto.commit": False,
        "fetch.wait.max.ms": settings.fetch_wait_max_ms,
    }
    consumer = Consumer(config)
    try:
        left = _ends(consumer, topics)
        consumer.assign([TopicPartition(*where, OFFSET_BEGINNING) for where in left])
        while left:
            messages = consumer.consume(1000, 0.2)
            for message in messages:
                if message.error() is not None:
                    raise KafkaException(message.error())
                where = (message.topic() or "", message.partition() or 0)
                yield message
                if (message.offset() or 0) >= left.get(where, 0) - 1:
                    left.pop(where, None)
            if not messages:
                # Compaction and transactions leave gaps at the end: the position tells.
                for tp in consumer.position([TopicPartition(*where) for where in left]):
                    if tp.offset >= left[tp.topic, tp.partition]:
                        del left[tp.topic, tp.partition]
    except KafkaException as error:
        raise StageError("kafka", f"{settings.bootstrap_servers}: {error.args[0].str()}") from error
    finally:
        consumer.close()


def _ends(consumer: Consumer, topics: Iterable[str]) -> dict[tuple[str, int], int]:
    """Next offset of each partition that holds anything."""
    ends: dict[tuple[str, int], int] = {}
    for topic in topics:
        metadata = consumer.list_topics(topic, timeout=_TIMEOUT_SECONDS).topics[topic]
        if metadata.error is not None:
            raise KafkaException(metadata.error)
        for partition in metadata.partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=_TIMEOUT_SECONDS)
            if high > low:
                ends[topic, partition] = high
    return ends


def position_of(message: Any, names: Mapping[str, str]) -> str:
    """Position of a message of a dead-letter topic; `names` are those of `short_names`."""
    first = dict(message.headers() or ()).get(FIRST)
    if first:
        return str(first.decode())
    name = names[message.topic().removesuffix(dead_letter(""))]
    return f"{name}/{message.partition()}/{message.offset()}"


def short_names(settings: KafkaSettings) -> dict[str, str]:
    """What operators call each topic that has dead letters."""
    topics = Topics(settings.topic_prefix)
    return {name: name.removeprefix(f"{settings.topic_prefix}.").split(".")[0] for name in topics.inbound}


def parse(message: Any) -> DeadLetter:
    """The letter in a message; of one that holds none, its bytes."""
    try:
        return DeadLetter.FromString(message.value() or b"")
    except DecodeError:
        return DeadLetter(key=message.key() or b"", value=message.value() or b"", reason="not a dead letter")
