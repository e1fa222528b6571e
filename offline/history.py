"""The history of the feature rows, for Feast's offline side: what a row held at which event time.

    FOLDER/<view>/*.parquet    user_state, user_profile, item_profile, item_stats; FOLDER is HEADRACE_FEAST_OFFLINE

Derived from the event log by the very replay that training uses; point-in-time joins on it are Feast's
(`get_historical_features`). Vectors, batch scores and popularity lists have no history: models make them. Invariant: a
row's event_timestamp is the time of the newest event in it (of a profile: of its message), so a join as of a moment
sees all up to it and nothing later; a removal is a row without values, and who was erased is not in it.
"""

import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from core.settings import Settings
from features import item_stats, windows
from features.definitions import ITEM_PROFILE, ITEM_STATS, USER_PROFILE, USER_STATE, View
from features.stores.erasures import UnerasedLog
from features.stores.event_rows import ITEMS, USERS, LogTable, from_table
from features.stores.feast_repo import offline_schema
from headrace.v1.events_pb2 import Item, User
from offline.logs import open_log, read_items
from offline.rebuild import PlacedReplay, Where, placed_entries
from offline.replay import LOG_PARTITION, Entry, Shown

_ROWS_PER_FILE = 50_000

Values = dict[str, Any]


@dataclass(frozen=True)
class HistorySummary:
    """Rows written per view."""

    user_state: int
    user_profile: int
    item_profile: int
    item_stats: int
    seconds: float


def write_history(log_root: str | Path, folder: Path, settings: Settings) -> HistorySummary:
    """Writes the history of a log anew; each view's folder is replaced in one step.

    Raises:
        ConfigError: a log that cannot be read.
    """
    started = time.monotonic()
    log = open_log(log_root)
    replay = PlacedReplay(read_items(log), settings.features)
    states, stats = _Files(folder, USER_STATE), _Files(folder, ITEM_STATS)
    for time_ms, group in groupby(placed_entries(log), key=lambda pair: pair[0].time_ms):
        now = list(group)
        replay.place(now)
        for row in _states(replay, now):
            states.add(row, time_ms)
        for row in _stats(replay, now, settings):
            stats.add(row, time_ms)
    profiles, items = _Files(folder, USER_PROFILE), _Files(folder, ITEM_PROFILE)
    for files, table in ((profiles, USERS), (items, ITEMS)):
        for row, time_ms in _profiles(log, table):
            files.add(row, time_ms)
    counts = {files.view.name: files.finish() for files in (states, stats, profiles, items)}
    return HistorySummary(**counts, seconds=time.monotonic() - started)


def _states(replay: PlacedReplay, now: list[tuple[Entry, Where]]) -> Iterator[Values]:
    """The states that a moment changed; what was merely shown changes no feature."""
    for user_id in dict.fromkeys(entry.user_id for entry, _ in now if not isinstance(entry, Shown)):
        state = replay.state(user_id)
        yield {
            "user_id": user_id,
            "state": windows.encode(state),
            "revision": state.revision,
            "watermark_ms": state.watermark_ms,
        }


def _stats(replay: PlacedReplay, now: list[tuple[Entry, Where]], settings: Settings) -> Iterator[Values]:
    """The partial sums of the items that a moment was about."""
    touched: dict[tuple[str, int], None] = {}
    for entry, where in now:
        partition = LOG_PARTITION if where is None else where[1]
        for item_id in entry.item_ids if isinstance(entry, Shown) else (entry.item_id,):
            touched[item_id, partition] = None
    for item_id, partition in touched:
        # None where the moment's events were duplicates, all of them.
        partial = replay.partition_partials.get(partition, {}).get(item_id)
        if partial is not None:
            yield {
                "item_id": item_id,
                "source_partition": str(partition),
                "stats": item_stats.encode(item_id, partition, partial, settings.features),
                "revision": partial.revision,
            }


def _profiles(log: UnerasedLog, table: LogTable) -> Iterator[tuple[Values, int]]:
    """Every version of users or items, oldest first, with its time."""
    rows = log.read(table, log.files(table), table.read_schema.names)
    # What was imported, nobody knows when, was there since ever.
    rows = rows.set_column(
        rows.column_names.index("ingest_time"), "since", pc.fill_null(rows["ingest_time"].cast(pa.int64()), 0)
    )
    rows = rows.take(pc.sort_indices(rows, [("since", "ascending"), ("offset", "ascending")]))
    marks = zip(rows["deleted"].to_pylist(), rows["since"].to_pylist(), strict=True)
    for message, (is_deleted, time_ms) in zip(from_table(table, rows), marks, strict=True):
        values: Values = {table.key: getattr(message, table.key)}
        if not is_deleted:
            values |= _cells(message)
        yield values, time_ms


def _cells(message: Item | User) -> Values:
    raw = message.SerializeToString(deterministic=True)
    if isinstance(message, Item):
        return {"item": raw, "title": message.title}
    return {"profile": raw, "profile_segment": message.segment}


class _Files:
    """The files of one view, in the order of their rows; in sight of readers when finished."""

    def __init__(self, folder: Path, view: View) -> None:
        self.view = view
        self._schema = offline_schema(view)
        self._target = folder / view.name
        self._unfinished = folder / f".{view.name}-{uuid.uuid4().hex}"
        self._unfinished.mkdir(parents=True)
        self._begin_ms = time.time_ns() // 1_000_000
        self._count = 0
        self._batch: list[Values] = []

    def add(self, row: Values, time_ms: int) -> None:
        # Of rows of one moment the one that was made last holds.
        times = {"event_timestamp": time_ms, "created_timestamp": self._begin_ms + self._count}
        self._batch.append({**row, **times})
        self._count += 1
        if len(self._batch) == _ROWS_PER_FILE:
            self._flush()

    def finish(self) -> int:
        """Puts the files in the place of older ones; returns how many rows they have."""
        if self._batch or not self._count:
            # A view without rows is an empty file: Feast wants its columns.
            self._flush()
        old = self._target.with_name(f".{self.view.name}-old-{uuid.uuid4().hex}")
        if self._target.exists():
            self._target.rename(old)
        self._unfinished.rename(self._target)
        shutil.rmtree(old, ignore_errors=True)
        return self._count

    def _flush(self) -> None:
        rows = pa.Table.from_pylist(self._batch, self._schema)
        pq.write_table(rows, self._unfinished / f"part-{self._count:012d}.parquet", compression="zstd")
        self._batch.clear()
