"""Erases users everywhere, and says so in receipts. Behind `headrace erase`.

A tombstone alone has the stream worker erase the rows and leave a record (features/stores/erasures.py), which every
reader of the log follows. This sends it, and does what a tombstone alone does not: when the event log holds all that
came before it, the event log, the batch scores of bundles and the dead letters are rewritten. What Kafka's topics hold
nobody can rewrite: the receipt says until when it is there. Invariant: files change only after the row is gone, and a
record counts as done only after all of them; a run that was cut off is finished by another one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.codec import check_id
from core.errors import ConfigError, StageError
from core.kafka import KafkaProducer, topic_sources
from core.settings import Settings
from core.topics import Topics, dead_letter
from devstack.erase_files import Removed, rewrite_bundles, rewrite_log
from devstack.letter_removal import may_name_user, remove_letters, users_of
from devstack.letters import Letter, erasing_letters
from devstack.retention import Retention, retention_of
from features.definitions import USER_BATCH_SCORES, USER_EMBEDDING, USER_PROFILE, USER_STATE
from features.stores import erasures
from features.stores.erasures import Erasure, Erasures
from features.stores.online import OnlineStore, read_offsets
from features.windows import Position
from streams.segments import Segments, Stretch
from streams.sink import tables_of

_POLL_SECONDS = 0.05
_USER_VIEWS = (USER_STATE, USER_EMBEDDING, USER_BATCH_SCORES, USER_PROFILE)
# What stays of an erased row: positions, in columns and in the state (which has no revision then).
_LEFT = frozenset(["state", "offsets", "profile_offsets"])
_LETTERS = "dead letters"
_STAYS = (
    "online store: one row without features, with the positions behind which the user's messages are replays",
    "event log: _erased/, the user's id and the same positions, so that no replay or rebuild brings anything back",
    "event log: _staging/, rows that a killed worker left unfinished, for a day and until a worker starts",
    "dead letters that were removed: no reader gets them; the broker's files have them until it drops their segment",
    "item statistics: sums over everybody, without ids; a rebuild makes them anew without the user",
    "models: trained before the erasure; `headrace train` makes them anew without the user",
    "Feast's offline files: `headrace history` makes them anew without the user",
    "serving's memory: nothing, the last good answer went with the tombstone",
    "the stream worker's memory: the old state, unused, until room is needed, the user acts, or it restarts",
)


@dataclass(slots=True)
class Receipt:
    """What was removed, what was looked for and not found, and what stays where until when."""

    user_id: str
    reason: str
    requested_time: str
    # Where the users topic has it.
    tombstone: str = ""
    removed: dict[str, int] = field(default_factory=dict)
    not_found: list[str] = field(default_factory=list)
    # The user has acted since: what the online store holds now is from after the erasure.
    came_back: bool = False
    kafka_holds: dict[str, Retention] = field(default_factory=dict)
    # Positions of dead letters that are still there, and why.
    dead_letters_left: dict[str, str] = field(default_factory=dict)
    stays: list[str] = field(default_factory=list)
    finished_time: str = ""

    def count(self, place: str, number: int) -> None:
        if number:
            self.removed[place] = self.removed.get(place, 0) + number
        elif place not in self.removed and place not in self.not_found:
            self.not_found.append(place)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def erase(
    user_id: str, log_root: str, registry: Path, settings: Settings, *, reason: str = "", timeout_seconds: float = 60
) -> Receipt:
    """Erases a user.

    Args:
        user_id: whom.
        log_root: folder or URL of the event log.
        registry: where bundles are.
        settings: where Kafka and Redis are.
        reason: goes into the receipt.
        timeout_seconds: how long the stream worker and its event log may take.

    Raises:
        StageError: Kafka or Redis does not answer, or no stream worker takes the tombstone; nothing in files changed.
        MalformedEventError: that is no user id.
    """
    check_id("user_id", user_id)
    receipt = Receipt(user_id, reason, _now())
    store = OnlineStore(settings.redis, settings.features.project)
    try:
        held = _held(store, user_id)
        record = _erase_row(store, user_id, log_root, settings, receipt, timeout_seconds)
        for view in _USER_VIEWS:
            receipt.count(f"online store: {view.name}", int(held[view.name]))
        _finish([record], [receipt], store, log_root, registry, settings, timeout_seconds)
    finally:
        store.close()
    return receipt


def erase_pending(
    log_root: str, registry: Path, settings: Settings, *, reason: str = "", timeout_seconds: float = 60
) -> list[Receipt]:
    """Rewrites the files for all users whose tombstones a stream worker has taken and nobody has finished.

    Args as of `erase`. Returns a receipt for each user; none where there is nothing to do.

    Raises:
        StageError: as `erase`.
    """
    pending = {one.user_id: one for one in Erasures(log_root).unfinished()}
    topic = Topics(settings.kafka.topic_prefix).users
    receipts = [
        # The worker has erased the rows then.
        Receipt(user_id, reason, _time(one.time_ms), f"{topic}/{one.tombstone.partition}/{one.tombstone.offset}")
        for user_id, one in pending.items()
    ]
    if not pending:
        return []
    store = OnlineStore(settings.redis, settings.features.project)
    try:
        _finish(list(pending.values()), receipts, store, log_root, registry, settings, timeout_seconds)
    finally:
        store.close()
    return receipts


def _finish(
    records: Sequence[Erasure],
    receipts: Sequence[Receipt],
    store: OnlineStore,
    log_root: str,
    registry: Path,
    settings: Settings,
    timeout_seconds: float,
) -> None:
    """All that comes after the rows are gone; each record has its receipt."""
    by_user = {receipt.user_id: receipt for receipt in receipts}
    _wait_for_log(records, log_root, settings, timeout_seconds)
    # Earlier ones of the same users, too: a run may have been cut off.
    book = Erasures(log_root)
    all_records = [one for one in book.all() if one.user_id in by_user]
    _count(rewrite_log(log_root, all_records), by_user)
    _count(rewrite_bundles(registry, by_user.keys()), by_user)
    Segments(log_root).sweep()
    _remove_letters(settings, all_records, by_user)
    for record in records:
        _look_again(store, record, by_user[record.user_id])
    _tell_what_stays(settings, receipts)
    for receipt in receipts:
        receipt.finished_time = _now()
    book.finish(all_records, receipts[0].finished_time)


def _count(removed: Removed, receipts: dict[str, Receipt]) -> None:
    for place, counts in removed.items():
        for user_id, receipt in receipts.items():
            receipt.count(place, counts[user_id])


# --- the online store ---


def _held(store: OnlineStore, user_id: str) -> dict[str, bool]:
    rows = {view.name: store.read(view, [(user_id,)])[0] for view in _USER_VIEWS}
    return {name: bool(row.cells) and row.time_ms is not None for name, row in rows.items()}


def _erase_row(
    store: OnlineStore, user_id: str, log_root: str, settings: Settings, receipt: Receipt, timeout_seconds: float
) -> Erasure:
    """Sends the tombstone and waits for the worker; returns the record of what it reached."""
    topic = Topics(settings.kafka.topic_prefix).users
    source = topic_sources(settings.kafka, [topic])[topic]
    producer = KafkaProducer(settings.kafka)
    try:
        written = producer.send(topic, user_id.encode(), None).result(20)
    finally:
        producer.close()
    receipt.tombstone = f"{written.topic}/{written.partition}/{written.offset}"
    tombstone = Position(source, written.partition, written.offset)
    bare = Erasure(user_id, tombstone)
    if not _until(lambda: not erasures.pending(store, [bare]), timeout_seconds):
        raise StageError(
            "streams",
            f"no stream worker has taken the tombstone in {timeout_seconds:g} s; it is in Kafka and will be taken when "
            "a worker runs: start one, then erase again (nothing was rewritten yet)",
        )
    records = Erasures(log_root)
    found = [one for one in records.of(user_id) if one.tombstone == tombstone]
    if found:
        return found[0]
    # The worker keeps its records elsewhere, or nowhere: what its row includes is what it erased.
    (row,) = store.read(USER_STATE, [(user_id,)], ("offsets",))
    cut = read_offsets(row.raw.get("offsets", b""))
    return records.add(Erasure(user_id, tombstone, cut, time.time_ns() // 1_000_000))


def _look_again(store: OnlineStore, record: Erasure, receipt: Receipt) -> None:
    """A vector that was being made while the row went may have come after it."""
    cells = {
        name: cell for view in _USER_VIEWS for name, cell in store.read(view, [(record.user_id,)])[0].cells.items()
    }
    receipt.came_back = "revision" in cells or "profile" in cells
    if not receipt.came_back and not cells.keys() <= _LEFT:
        erasures.apply_anew(store, record)


# --- the event log ---


def _wait_for_log(records: Sequence[Erasure], log_root: str, settings: Settings, timeout_seconds: float) -> None:
    """Returns when the log holds all that came before the tombstones: what comes later would bring it back."""
    if log_root.rstrip("/") != settings.streams.event_log_path.rstrip("/"):
        return
    topics, segments = Topics(settings.kafka.topic_prefix), Segments(log_root)
    tables = tables_of(topics)
    topic_of = {source: topic for topic, source in topic_sources(settings.kafka, topics.inbound).items()}
    waiting: dict[Stretch, int] = {}
    for record in records:
        for (source, partition), offset in {**record.cut, record.tombstone[:2]: record.tombstone.offset}.items():
            if source in topic_of:
                stretch = Stretch(tables[topic_of[source]], source, partition)
                waiting[stretch] = max(offset, waiting.get(stretch, -1))

    def reached() -> bool:
        return all(segments.position(stretch) >= offset for stretch, offset in waiting.items())

    if not _until(reached, timeout_seconds):
        raise StageError(
            "event-log",
            f"{log_root} has not come to the tombstone in {timeout_seconds:g} s; is a stream worker writing it? The "
            "online store is erased; erase again for the files",
        )


# --- dead letters ---


def _remove_letters(settings: Settings, records: Sequence[Erasure], receipts: dict[str, Receipt]) -> None:
    """Those from before the tombstones, as positions tell."""
    erases = erasing_letters(settings, records)
    messages = {topic: table.message for topic, table in tables_of(Topics(settings.kafka.topic_prefix)).items()}
    found: dict[str, tuple[str, str]] = {}
    may_name: dict[str, str] = {}

    def is_unwanted(letter: Letter) -> bool:
        for user_id in users_of(letter, messages) & receipts.keys():
            if erases(letter.letter, user_id):
                found[letter.position] = user_id, letter.position.partition("/")[0]
                return True
        may_name.update((letter.position, user_id) for user_id in receipts if may_name_user(letter, user_id))
        return False

    problem = ""
    try:
        remove_letters(settings.kafka, is_unwanted)
    except (StageError, ConfigError) as error:
        problem = str(error)
    left = {position: (user_id, problem) for position, (user_id, _) in found.items() if problem}
    why = "names the user, perhaps, or is from after the tombstone: `headrace dead-letter show` it, `remove` it"
    left |= {position: (user_id, why) for position, user_id in may_name.items() if position not in found}
    for position, (user_id, reason) in left.items():
        receipts[user_id].dead_letters_left[position] = reason
    for user_id, receipt in receipts.items():
        topics = [topic for position, (owner, topic) in found.items() if owner == user_id and position not in left]
        for topic in sorted(set(topics)):
            receipt.count(f"{_LETTERS}: {topic}", topics.count(topic))
        if not topics:
            receipt.count(_LETTERS, 0)


# --- what stays ---


def _tell_what_stays(settings: Settings, receipts: Sequence[Receipt]) -> None:
    topics = Topics(settings.kafka.topic_prefix)
    held = retention_of(settings.kafka, [*topics.user_keyed, topics.users])
    letters = retention_of(settings.kafka, [dead_letter(name) for name in topics.inbound])
    for receipt in receipts:
        # What was deleted no reader gets any more; the broker's files still have it.
        named = [dead_letter(name) for name in topics.inbound if _has_letters(receipt, settings, name)]
        receipt.kafka_holds = held | {name: letters[name] for name in named}
        receipt.stays = list(_STAYS)


def _has_letters(receipt: Receipt, settings: Settings, topic: str) -> bool:
    short = topic.removeprefix(f"{settings.kafka.topic_prefix}.").partition(".")[0]
    return f"{_LETTERS}: {short}" in receipt.removed or any(
        position.startswith(f"{short}/") for position in receipt.dead_letters_left
    )


def _until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    end = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _now() -> str:
    return _time(time.time_ns() // 1_000_000)


def _time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
