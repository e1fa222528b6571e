"""Reading an event log as a whole: is it there, what catalogue does it have, is it the same as before.

Used by every offline command before it replays. Invariant: what is read depends on the log's content, not on how it
lies in files.
"""

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from core.errors import ConfigError
from features.stores.erasures import UnerasedLog
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, ITEMS, USERS, LogTable
from features.stores.log_positions import source_of
from headrace.v1.events_pb2 import Item


class ImportedLog(UnerasedLog):
    """What was imported: what came over the topics is counted by the stream, whose rows carry its positions."""

    def files(self, table: LogTable) -> list[str]:
        return [path for path in super().files(table) if source_of(path) is None]


def open_log(log_root: str | Path, before_ms: int | None = None) -> UnerasedLog:
    """The log without erased users, checked to hold events; ConfigError says what to do where it does not."""
    log = UnerasedLog(log_root)
    if not log.exists():
        raise ConfigError(f"no event log at {log_root}; make one with `headrace import` or `headrace simulate`")
    if not log.events(end_ms=before_ms, columns=["event_time"]).num_rows:
        when = "" if before_ms is None else f" before {datetime.fromtimestamp(before_ms / 1000, UTC).isoformat()}"
        raise ConfigError(f"the event log at {log_root} has no events{when}; import some with `headrace import`")
    return log


def read_items(log: EventLog) -> list[Item]:
    """The catalogue of a log, by item_id, with every item that events name.

    An item that only events name cannot be recommended before its description arrives; in a log without any catalogue
    it can, since there will be none.
    """
    items = list(log.items())
    named: set[str] = set()
    for table in (EVENTS, FEEDBACK):
        named.update(log.rows(table, columns=["item_id"])["item_id"].unique().to_pylist())
    missing = sorted(named - {item.item_id for item in items})
    described = bool(log.files(ITEMS))
    return items + [Item(item_id=item_id, available=not described) for item_id in missing]


def with_new_items(items: Iterable[Item], log: EventLog) -> list[Item]:
    """Items in their order (their rows stay), as the log describes them now, then the log's further ones."""
    now = {item.item_id: item for item in read_items(log)}
    return [now.pop(item.item_id, item) for item in items] + list(now.values())


def log_fingerprint(log: EventLog, before_ms: int | None = None) -> str:
    """Hash of what a log says, up to a time; the same content in other files gives the same."""
    digest = hashlib.blake2b(digest_size=16)
    for table in (EVENTS, FEEDBACK, IMPRESSIONS):
        _hash_rows(digest, log.rows(table, end_ms=before_ms))
    for table in (ITEMS, USERS):
        _hash_rows(digest, log.states(table))
    return digest.hexdigest()


def _hash_rows(digest: "hashlib.blake2b", rows: pa.Table) -> None:
    """Feeds rows to the hash, column by column, as plain values."""
    for name in rows.column_names:
        column = rows[name]
        if pa.types.is_dictionary(column.type):
            # How texts are numbered depends on the files; which texts they are does not.
            column = column.cast(column.type.value_type)
        batch = pa.record_batch([pa.array([], column.type) if not len(column) else column.combine_chunks()], [name])
        digest.update(name.encode() + batch.serialize())
