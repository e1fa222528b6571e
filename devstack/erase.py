"""Erases a user everywhere, and says so in a receipt. Behind `headrace erase`.

Order: the tombstone, which the stream worker turns into an erased row and a record (features/stores/erasures.py);
then, when the event log holds all that came before it, the files: event log, batch scores of bundles. What Kafka
holds nobody can rewrite: the receipt says until when it is there. Invariant: files are replaced one by one, each in
one step, and only after the row is gone; a run that was cut off is finished by another one.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from core.bundle import BATCH_SCORES, MANIFEST, put_file
from core.codec import check_id
from core.errors import StageError
from core.kafka import KafkaProducer, topic_sources
from core.settings import Settings
from core.topics import Topics
from devstack.letters import Choice, read_letters
from devstack.retention import Retention, retention_of
from features.definitions import USER_BATCH_SCORES, USER_EMBEDDING, USER_PROFILE, USER_STATE
from features.stores import erasures
from features.stores.erasures import Erasure, Erasures
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, USERS
from features.stores.log_positions import source_of
from features.stores.online import OnlineStore, read_offsets
from features.windows import Position
from streams.segments import Segments, Stretch
from streams.sink import tables_of

_POLL_SECONDS = 0.05
_USER_VIEWS = (USER_STATE, USER_EMBEDDING, USER_BATCH_SCORES, USER_PROFILE)
# What stays of an erased row: positions, in columns and in the state (which has no revision then).
_LEFT = frozenset(["state", "offsets", "profile_offsets"])


@dataclass(slots=True)
class Receipt:
    """What was removed, what was looked for and not found, and what stays where until when."""

    user_id: str
    reason: str
    requested_time: str
    tombstone: str = ""
    removed: dict[str, int] = field(default_factory=dict)
    not_found: list[str] = field(default_factory=list)
    # The user has acted since: what the online store holds now is from after the erasure.
    came_back: bool = False
    kafka_holds: dict[str, Retention] = field(default_factory=dict)
    dead_letters: list[str] = field(default_factory=list)
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
        _wait_for_log(record, log_root, settings, timeout_seconds)
        _rewrite_log(log_root, user_id, receipt)
        _rewrite_bundles(registry, user_id, receipt)
        _look_again(store, record, receipt)
    finally:
        store.close()
    _tell_what_stays(settings, user_id, receipt)
    receipt.finished_time = _now()
    return receipt


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


# --- files ---


def _wait_for_log(record: Erasure, log_root: str, settings: Settings, timeout_seconds: float) -> None:
    """Returns when the log holds all that came before the tombstone: what comes later would bring it back."""
    if log_root.rstrip("/") != settings.streams.event_log_path.rstrip("/"):
        return
    topics, segments = Topics(settings.kafka.topic_prefix), Segments(log_root)
    tables = tables_of(topics)
    topic_of = {source: topic for topic, source in topic_sources(settings.kafka, topics.inbound).items()}
    targets = {**record.cut, record.tombstone[:2]: record.tombstone.offset}
    waiting = {
        Stretch(tables[topic_of[source]], source, partition): offset
        for (source, partition), offset in targets.items()
        if source in topic_of
    }

    def reached() -> bool:
        return all(segments.position(stretch) >= offset for stretch, offset in waiting.items())

    if not _until(reached, timeout_seconds):
        raise StageError(
            "event-log",
            f"{log_root} has not come to the tombstone in {timeout_seconds:g} s; is a stream worker writing it? The "
            "online store is erased; erase again for the files",
        )


def _rewrite_log(log_root: str, user_id: str, receipt: Receipt) -> None:
    log, records = EventLog(log_root), Erasures(log_root).of(user_id)
    for table in (EVENTS, FEEDBACK, IMPRESSIONS, USERS):
        removed = 0
        for path in log.files(table):
            rows = log.read(table, [path], ["user_id", "partition", "offset", "ingest_time"])
            if not _names(rows, user_id):
                continue
            kept = erasures.surviving(rows, source_of(path), records, profiles=table is USERS)
            if not kept.all():
                # An empty file stays: its name says how far the log has come.
                log.rewrite(path, pa.array(kept))
                removed += int((~kept).sum())
        receipt.count(f"event log: {table.name}", removed)


def _rewrite_bundles(registry: Path, user_id: str, receipt: Receipt) -> None:
    """Batch scores: those of bundles, and finished parts of runs that were cut off."""
    for path in _score_files(registry):
        rows = pq.read_table(path, partitioning=None)
        kept = pc.not_equal(rows["user_id"], user_id)
        removed = rows.num_rows - (pc.sum(kept).as_py() or 0)
        where = path.relative_to(registry).as_posix()
        receipt.count(f"bundles: {where}", removed)
        if not removed:
            continue
        unfinished = path.with_name(f".{path.name}.erasing")
        pq.write_table(rows.filter(kept), unfinished, compression="zstd")
        if path.name == BATCH_SCORES and (path.parent / MANIFEST).is_file():
            put_file(path.parent, BATCH_SCORES, unfinished)
        else:
            unfinished.replace(path)


def _score_files(registry: Path) -> Iterator[Path]:
    for path in sorted(registry.rglob("*.parquet")):
        if "user_id" in pq.read_schema(path).names:
            yield path


def _names(rows: pa.Table, user_id: str) -> bool:
    return bool(pc.any(pc.equal(rows["user_id"].cast(pa.string()), user_id)).as_py())


# --- what stays ---


def _tell_what_stays(settings: Settings, user_id: str, receipt: Receipt) -> None:
    topics = Topics(settings.kafka.topic_prefix)
    letters = read_letters(settings.kafka, Choice())
    needle = user_id.encode()
    receipt.dead_letters = [
        one.position for one in letters if one.letter.key == needle or needle in one.letter.value
    ]  # fmt: skip
    names = [*topics.user_keyed, topics.users]
    names += [f"{name}.dead-letter" for name in (*topics.inbound,)] if receipt.dead_letters else []
    receipt.kafka_holds = retention_of(settings.kafka, names)
    receipt.stays = [
        "online store: one row without features, with the positions behind which the user's messages are replays",
        "event log: _erased/, the user's id and the same positions, so that no replay or rebuild brings anything back",
        "item statistics: sums over everybody, without ids; a rebuild makes them anew without the user",
        "models: trained before the erasure; `headrace train` makes them anew without the user",
        "Feast's offline files: `headrace history` makes them anew without the user",
        "serving's memory: nothing, the last good answer went with the tombstone",
        "the stream worker's memory: the old state, unused, until the room is needed, the user acts, or it restarts",
    ]


def _until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    end = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
