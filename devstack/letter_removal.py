"""Removes dead letters from Kafka: some of a topic go, the others stay under their positions.

Behind `headrace erase` and `headrace dead-letter remove`. A partition can only be cut off at its old end: what is to
stay below the cut is written to its new end first, with the position that it had at first. Invariant: a letter that
stays is never missing, since the cut comes after Kafka has its copy; a run that was cut off leaves copies, which are
read as one, and another run ends its work.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from google.protobuf.message import DecodeError, Message

from core.errors import ConfigError, StageError
from core.kafka import KafkaProducer, client_config
from core.settings import KafkaSettings
from core.topics import dead_letter
from devstack.letters import FIRST, NOTE, SENT_FROM, Letter, parse, position_of, read_to_end, short_names

_TIMEOUT_SECONDS = 20.0


@dataclass(slots=True)
class _Partition:
    """Messages of one partition, oldest first: position, message, whether it stays."""

    messages: list[tuple[str, Any, bool]] = field(default_factory=list)

    @property
    def cut(self) -> int:
        """The offset below which everything goes; 0 = nothing goes."""
        return max((message.offset() + 1 for _, message, stays in self.messages if not stays), default=0)


def remove_letters(settings: KafkaSettings, unwanted: Callable[[Letter], bool]) -> list[str]:
    """Removes the letters for which `unwanted` holds, with their notes; returns their positions.

    No reader gets them any more. The broker's files hold them until it drops the segment that they lie in.

    Raises:
        StageError: Kafka does not answer, or does not delete; copies may be there, letters are all there.
        ConfigError: the embedded broker, which cannot delete.
    """
    names = short_names(settings)
    topics = [dead_letter(topic) for topic in names]
    partitions: dict[tuple[str, int], _Partition] = {}
    removed: dict[str, None] = {}
    # Notes come after their letters, in one partition; but a letter that was copied comes after its notes.
    notes: list[tuple[tuple[str, int], Any]] = []
    for message in read_to_end(settings, topics):
        where = (message.topic(), message.partition())
        if NOTE in dict(message.headers() or ()):
            notes.append((where, message))
            continue
        letter = Letter(position_of(message, names), parse(message))
        stays = not unwanted(letter)
        if not stays:
            removed[letter.position] = None
        partitions.setdefault(where, _Partition()).messages.append((letter.position, message, stays))
    for where, message in notes:
        of = (dict(message.headers() or ()).get(SENT_FROM) or b"").decode()
        partitions.setdefault(where, _Partition()).messages.append(("", message, of not in removed))
    cuts = {where: partition.cut for where, partition in partitions.items() if partition.cut}
    if not cuts:
        return []
    if settings.log_id:
        raise ConfigError(
            "the embedded broker cannot delete messages; it forgets them when it stops, use a real Kafka to remove them"
        )
    _copy(settings, partitions, cuts)
    _cut(settings, cuts)
    return list(removed)


def _copy(
    settings: KafkaSettings, partitions: dict[tuple[str, int], _Partition], cuts: dict[tuple[str, int], int]
) -> None:
    """Writes what stays, and lies below a cut, to the new end."""
    above = {
        position
        for where, partition in partitions.items()
        for position, message, _ in partition.messages
        if position and message.offset() >= cuts.get(where, 0)
    }
    producer = KafkaProducer(settings)
    try:
        sent = []
        for where, cut in cuts.items():
            for position, message, stays in partitions[where].messages:
                if stays and message.offset() < cut and position not in above:
                    headers = {**dict(message.headers() or ()), **({FIRST: position.encode()} if position else {})}
                    sent.append(producer.send(where[0], message.key() or b"", message.value(), headers))
        for future in sent:
            future.result(_TIMEOUT_SECONDS)
    finally:
        producer.close()


def _cut(settings: KafkaSettings, cuts: dict[tuple[str, int], int]) -> None:
    admin = AdminClient(client_config(settings))
    wheres = [TopicPartition(*where, cut) for where, cut in cuts.items()]
    try:
        answers = admin.delete_records(wheres, request_timeout=_TIMEOUT_SECONDS)
        for future in answers.values():
            future.result(_TIMEOUT_SECONDS)
    except (KafkaException, TimeoutError) as error:
        raise StageError(
            "kafka", f"{settings.bootstrap_servers} does not delete dead letters ({error}); all of them are still there"
        ) from error


def users_of(letter: Letter, messages: Mapping[str, type[Message]]) -> set[str]:
    """Whom a letter is about: its key, and the user of its value, as far as that can be read as what the topic holds.

    Args:
        letter: of a topic of users.
        messages: what each topic holds.
    """
    raw, users = letter.letter, set[str]()
    with suppress(UnicodeDecodeError):
        users.add(raw.key.decode())
    kind = messages.get(raw.topic)
    if kind is not None:
        with suppress(DecodeError):
            users.add(getattr(kind.FromString(raw.value), "user_id", ""))
    with suppress(ValueError):
        content = json.loads(raw.value)
        if isinstance(content, dict):
            users.update(str(content.get(name, "")) for name in ("user_id", "userId"))
    return users - {""}


def may_name_user(letter: Letter, user_id: str) -> bool:
    """Whether the id stands anywhere in a letter, also as a part of something else."""
    return user_id.encode() in letter.letter.key + b"\0" + letter.letter.value
