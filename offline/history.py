"""The history of the feature rows, for Feast's offline side: what a row of `user_state` held at which event time.

    FOLDER/user_state/*.parquet  FOLDER/user_profile/*.parquet    FOLDER is HEADRACE_FEAST_OFFLINE

Derived from the event log by the very replay that training uses; point-in-time joins on it are Feast's
(`get_historical_features`). Invariant: a row's event_timestamp is the time of the newest event in it, so a join as of
a moment sees all up to it and nothing later; who was erased is not in it.
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
import pyarrow.parquet as pq

from core.settings import Settings
from features import windows
from features.definitions import USER_PROFILE, USER_STATE, View
from features.stores.event_rows import USERS, from_table
from features.stores.feast_repo import offline_schema
from offline.logs import open_log, read_items
from offline.rebuild import placed_entries
from offline.replay import Replay, Shown

_ROWS_PER_FILE = 50_000


@dataclass(frozen=True)
class HistorySummary:
    """Rows written per view."""

    user_state: int
    user_profile: int
    seconds: float


def write_history(log_root: str | Path, folder: Path, settings: Settings) -> HistorySummary:
    """Writes the history of a log anew; each view's folder is replaced in one step.

    Raises:
        ConfigError: a log that cannot be read.
    """
    started = time.monotonic()
    log = open_log(log_root)
    replay = Replay(read_items(log), settings.features)
    entries = (entry for entry, _ in placed_entries(log))
    states = _write(folder, USER_STATE, _states(replay, entries))
    rows = log.states(USERS)
    times = rows["ingest_time"].cast(pa.int64()).to_pylist()
    profiles = (
        {
            "user_id": user.user_id,
            "profile": user.SerializeToString(deterministic=True),
            "profile_segment": user.segment,
            # Of imported users nobody knows since when: since ever.
            "event_timestamp": time_ms or 0,
        }
        for user, time_ms in zip(from_table(USERS, rows), times, strict=True)
    )
    return HistorySummary(states, _write(folder, USER_PROFILE, profiles), time.monotonic() - started)


def _states(replay: Replay, entries: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """After each moment, the states that it changed."""
    for time_ms, group in groupby(entries, key=lambda entry: entry.time_ms):
        now = list(group)
        replay.advance(now)
        # What was merely shown changes no feature.
        for user_id in dict.fromkeys(entry.user_id for entry in now if not isinstance(entry, Shown)):
            state = replay.state(user_id)
            yield {
                "user_id": user_id,
                "state": windows.encode(state),
                "revision": state.revision,
                "watermark_ms": state.watermark_ms,
                "event_timestamp": time_ms,
            }


def _write(folder: Path, view: View, rows: Iterator[dict[str, Any]]) -> int:
    schema = offline_schema(view)
    unfinished = folder / f".{view.name}-{uuid.uuid4().hex}"
    unfinished.mkdir(parents=True)
    count = 0
    batch: list[dict[str, Any]] = []

    def flush() -> None:
        now_ms = time.time_ns() // 1_000_000
        made = [{**row, "created_timestamp": now_ms} for row in batch]
        pq.write_table(pa.Table.from_pylist(made, schema), unfinished / f"part-{count:012d}.parquet")
        batch.clear()

    for row in rows:
        batch.append(row)
        count += 1
        if len(batch) == _ROWS_PER_FILE:
            flush()
    if batch or not count:
        # A view without rows is an empty file: Feast wants its columns.
        flush()
    target = folder / view.name
    old = folder / f".{view.name}-old-{uuid.uuid4().hex}"
    if target.exists():
        target.rename(old)
    unfinished.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return count
