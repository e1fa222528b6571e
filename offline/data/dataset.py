"""A data set as an event log: writing it, its summary, and its split by time.

Every loader ends here. Invariant: writing a data set again replaces its own files and no others; no event of the
train part of a split is later than, or at the same time as, one of the test part.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError
from features.stores.event_log import EventLog, stem_of
from features.stores.event_rows import EVENTS, LOG_TABLES, USERS

# Told what is being done, and the share of it that is done (0..1).
Progress = Callable[[str, float], None]


def no_progress(what: str, share: float) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class DatasetSummary:
    """What was read and written. Times are milliseconds since the epoch, None where there are no events."""

    name: str
    path: str
    # Rows by table: events, impressions, items, users.
    rows: Mapping[str, int]
    # Distinct users and items of the events.
    event_users: int
    event_items: int
    kinds: Mapping[str, int]
    start_ms: int | None
    end_ms: int | None
    # Reason -> input rows that are in no table.
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def events(self) -> int:
        return self.rows.get("events", 0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times as text."""
        span = {"start_time": time_text(self.start_ms), "end_time": time_text(self.end_ms)}
        plain = {name: getattr(self, name) for name in ("name", "path", "event_users", "event_items")}
        counts = {"rows": dict(self.rows), "kinds": dict(self.kinds), "skipped": dict(self.skipped)}
        return plain | counts | span | {"notes": list(self.notes), "seconds": round(self.seconds, 3)}


def write_dataset(
    out: Path | str,
    name: str,
    tables: Mapping[str, pa.Table],
    *,
    started: float,
    skipped: Mapping[str, int] | None = None,
    notes: tuple[str, ...] = (),
) -> DatasetSummary:
    """Writes the tables of a data set into the log at `out`.

    Args:
        out: folder or fsspec URL of the log.
        name: the data set's name: its files begin with it, and those of an earlier run are replaced.
        tables: rows by table name (events, impressions, items, users).
        started: time.monotonic() at the beginning, for the summary.
        skipped: input rows left out, by reason.
        notes: what the reader of the summary should know.
    """
    log = EventLog(out)
    if EVENTS.name in tables and USERS.name in tables:
        tables = {**tables, EVENTS.name: _with_segments(tables[EVENTS.name], tables[USERS.name])}
    for table in LOG_TABLES:
        rows = tables.get(table.name)
        log.replace(table, [rows] if rows is not None and rows.num_rows else [], name)
    if any(stem_of(path) != name for table in LOG_TABLES for path in log.files(table)):
        notes = (*notes, f"{out} also holds other data; it is read together with this")
    return summarise(name, str(out), tables, skipped or {}, notes, time.monotonic() - started)


def summarise(
    name: str,
    path: str,
    tables: Mapping[str, pa.Table],
    skipped: Mapping[str, int],
    notes: tuple[str, ...],
    seconds: float,
) -> DatasetSummary:
    events = tables.get(EVENTS.name, EVENTS.schema.empty_table())
    kinds = {entry["values"]: entry["counts"] for entry in pc.value_counts(events["kind"]).to_pylist()}
    span = pc.min_max(events["event_time"].cast(pa.int64())).as_py()
    return DatasetSummary(
        name=name,
        path=path,
        rows={table.name: tables[table.name].num_rows for table in LOG_TABLES if table.name in tables},
        event_users=pc.count_distinct(events["user_id"]).as_py(),
        event_items=pc.count_distinct(events["item_id"]).as_py(),
        kinds=dict(sorted(kinds.items(), key=lambda entry: -entry[1])),
        start_ms=span["min"],
        end_ms=span["max"],
        skipped={reason: count for reason, count in skipped.items() if count},
        notes=notes,
        seconds=seconds,
    )


def split_by_time(table: pa.Table, share: float = 0.8) -> tuple[pa.Table, pa.Table]:
    """Splits events in time order: the first `share` train, the rest test (the event-time replay of benchmarks).

    Events of one time stay together, in the test part, so the train part may be a little smaller than `share`.

    Args:
        table: rows with `event_time`, in its order (as EventLog.events gives them).
        share: of the rows that train, 0..1.

    Raises:
        ConfigError: a part would be empty, or the rows are not in order.
    """
    times = times_of(table)
    if np.any(times[1:] < times[:-1]):
        raise ConfigError("the events are not in order of event_time; read them with EventLog.events")
    cut = int(len(times) * share)
    if 0 < cut < len(times):
        cut = int(np.searchsorted(times, times[cut], side="left"))
    if not 0 < cut < len(times):
        raise ConfigError(f"{len(times)} events cannot be split at {share:.0%} of their time; import more history")
    return table.slice(0, cut), table.slice(cut)


def times_of(table: pa.Table) -> npt.NDArray[np.int64]:
    """event_time in milliseconds since the epoch. Shape [rows]."""
    times: npt.NDArray[np.int64] = table["event_time"].cast(pa.int64()).to_numpy()
    return times


def categories_of(items: pa.Table, item_ids: Any) -> pa.Array:
    """The categories of each of `item_ids` by the item table; none where the item is not in it."""
    ids = item_ids if isinstance(item_ids, pa.Array | pa.ChunkedArray) else pa.array(item_ids, pa.string())
    where = pc.index_in(ids, value_set=items["item_id"].combine_chunks())
    categories = items["categories"].combine_chunks()
    empty = pa.array([[]], categories.type)
    return pa.concat_arrays([categories, empty]).take(pc.fill_null(where, len(categories)))


def _with_segments(events: pa.Table, users: pa.Table) -> pa.Table:
    """Events with the segment of their users, as ingestion would give it to them."""
    where = pc.index_in(events["user_id"], value_set=users["user_id"].combine_chunks())
    segments = pc.fill_null(users["segment"].combine_chunks().take(where.combine_chunks()), "")
    return events.set_column(events.column_names.index("segment"), EVENTS.schema.field("segment"), segments)


def time_text(time_ms: int | None) -> str:
    return "" if time_ms is None else datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")
