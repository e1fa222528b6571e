"""The event log as Parquet files: what the stream's sink writes, training reads, and Feast's offline side is fed from.

    ROOT/events/date=YYYY-MM-DD/*.parquet    one row per event; so do feedback/ and impressions/
    ROOT/items/*.parquet  ROOT/users/*.parquet    one row per upsert or removal, the newest holds

ROOT is a folder or an fsspec URL. Dates are of the event time, in UTC; history of many thinly filled days may lie by
month (date=YYYY-MM). Invariant: a file appears whole or not at all, under the name that the writer gave it, so
writing the same batch again changes nothing; what is read is in event-time order (ties by event_id), each event once.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from core.errors import ConfigError
from features.stores import event_rows
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, ITEMS, TIME, USERS, LogTable
from features.transforms import stable_hash
from features.windows import UserEvent
from headrace.v1.events_pb2 import Feedback, ImpressionList, Item, User

_DAY_MS = 86_400_000
# Below this many rows a day, many days: a file each would cost more than its rows.
_THIN_DAY_ROWS, _MANY_DAYS = 1000, 62
_BATCH_ROWS = 65_536
# What the order and the duplicates are decided by.
_ORDER_COLUMNS = ("event_time", "event_id", "user_id")


class EventLog:
    """One log folder, for reading and writing."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self._files, path = fsspec.core.url_to_fs(self.root)
        self._path = path.rstrip("/")
        self._local = isinstance(self._files, LocalFileSystem)

    def exists(self) -> bool:
        """Whether anything was ever written here."""
        return any(self.files(table) for table in event_rows.LOG_TABLES)

    def write(self, table: LogTable, rows: pa.Table, name: str, *, by_month: bool = False) -> list[str]:
        """Writes rows as new files, one per date that they touch; a file of the same name and date is replaced.

        Args:
            table: EVENTS, FEEDBACK, IMPRESSIONS, ITEMS or USERS.
            rows: of `table.schema` (event_rows.to_table makes them).
            name: the file's name without its ending; the sink gives the same batch the same name again, as in
                `p3-000000000100-000000000199`.
            by_month: one folder per month instead of one per day.

        Returns:
            The paths written.
        """
        if not table.by_date:
            return [self._put(f"{self._path}/{table.name}/{name}.parquet", rows)] if rows.num_rows else []
        return [
            self._put(f"{self._path}/{table.name}/date={date}/{name}.parquet", part)
            for date, part in _by_date(rows, by_month)
        ]

    def replace(self, table: LogTable, rows: Sequence[pa.Table], stem: str) -> None:
        """Bulk write: `rows` become the only files of the name `stem-<number>`; older such files go away."""
        written: set[str] = set()
        for index, part in enumerate(rows):
            by_month = table.by_date and _is_thin(part)
            written.update(self.write(table, part, f"{stem}-{index:05d}", by_month=by_month))
        for path in self.files(table):
            if stem_of(path) == stem and path not in written:
                self._files.rm_file(path)

    def events(
        self, start_ms: int | None = None, end_ms: int | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Events of start_ms <= event_time < end_ms in order, each once (of copies the earliest), ids as dictionaries.

        Raises:
            ConfigError: a file that is no Parquet file of this log, or a column that the log does not have.
        """
        return self.rows(EVENTS, start_ms, end_ms, columns)

    def feedback(self, start_ms: int | None = None, end_ms: int | None = None) -> Iterator[Feedback]:
        return event_rows.from_table(FEEDBACK, self.rows(FEEDBACK, start_ms, end_ms))

    def impressions(self, start_ms: int | None = None, end_ms: int | None = None) -> Iterator[ImpressionList]:
        return event_rows.from_table(IMPRESSIONS, self.rows(IMPRESSIONS, start_ms, end_ms))

    def items(self) -> Iterator[Item]:
        """The catalogue: the newest version of each item that was not removed, by item_id."""
        return event_rows.from_table(ITEMS, self.states(ITEMS))

    def users(self) -> Iterator[User]:
        return event_rows.from_table(USERS, self.states(USERS))

    def rows(
        self,
        table: LogTable,
        start_ms: int | None = None,
        end_ms: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Rows of EVENTS, FEEDBACK or IMPRESSIONS, as `events` gives them."""
        names = list(columns) if columns is not None else table.read_schema.names
        unknown = sorted(set(names) - set(table.read_schema.names))
        if unknown:
            raise ConfigError(f"{table.name} has no column {unknown[0]!r}; it has {', '.join(table.read_schema.names)}")
        needed = list(dict.fromkeys([*names, *_ORDER_COLUMNS]))
        condition = None
        for limit, compare in ((start_ms, pc.greater_equal), (end_ms, pc.less)):
            if limit is not None:
                part = compare(ds.field("event_time"), pa.scalar(limit, TIME))
                condition = part if condition is None else condition & part
        paths = [path for path in self.files(table) if _may_hold(path, start_ms, end_ms)]
        return in_order(self.read(table, paths, needed, condition)).select(names)

    def states(self, table: LogTable) -> pa.Table:
        """Rows of ITEMS or USERS: of each key the newest, if it is no removal, in order of the key."""
        rows = self.newest(table)
        return rows.filter(pc.invert(pc.fill_null(rows["deleted"], False)))  # noqa: FBT003 - the value to fill in

    def newest(self, table: LogTable) -> pa.Table:
        """Rows of ITEMS or USERS: of each key the newest, be it a removal, in order of the key.

        Newest is by ingest time, then by offset; rows that were imported without either come first.
        """
        rows = self.read(table, self.files(table), table.read_schema.names)
        if not rows.num_rows:
            return rows
        ingest, offset = (_int64(rows[name], -1) for name in ("ingest_time", "offset"))
        rank, _ = _codes(rows[table.key])
        order = np.lexsort((np.arange(rows.num_rows), offset, ingest, rank))
        last = np.append(rank[order][1:] != rank[order][:-1], True)
        return rows.take(pa.array(order[last]))

    def files(self, table: LogTable) -> list[str]:
        """Paths of a table's files, sorted."""
        pattern = "date=*/*.parquet" if table.by_date else "*.parquet"
        # A listing may be cached; another process writes here too.
        self._files.invalidate_cache()
        return sorted(str(path) for path in self._files.glob(f"{self._path}/{table.name}/{pattern}"))

    def read(self, table: LogTable, paths: list[str], columns: list[str], condition: Any = None) -> pa.Table:
        """Rows of some files as they lie there. Raises ConfigError where one cannot be read."""
        schema = pa.schema([table.read_schema.field(name) for name in columns])
        if not paths:
            return schema.empty_table()
        options = ds.ParquetReadOptions(
            dictionary_columns={f.name for f in table.read_schema if pa.types.is_dictionary(f.type)}
        )
        try:
            rows = ds.dataset(
                paths,
                schema=table.read_schema,
                format=ds.ParquetFileFormat(read_options=options),
                filesystem=pafs.LocalFileSystem() if self._local else self._files,
            ).to_table(columns=columns, filter=condition)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(
                f"event log {self.root}/{table.name}: {' '.join(str(error).split())[:300]}; "
                "remove that file, or import again"
            ) from error
        return rows.unify_dictionaries().combine_chunks()

    def rewrite(self, path: str, kept: pa.Array) -> None:
        """Replaces a file, in one step, by those of its rows for which `kept` is true."""
        with self._files.open(path, "rb") as file:
            rows = pq.read_table(file, partitioning=None)
        self._put(path, rows.filter(kept))

    def _put(self, path: str, rows: pa.Table) -> str:
        folder, name = path.rsplit("/", 1)
        buffer = pa.BufferOutputStream()
        pq.write_table(
            rows,
            buffer,
            compression="zstd",
            write_statistics=["event_time"] if "event_time" in rows.column_names else False,
        )
        content = buffer.getvalue()
        if not self._local:
            # An object store shows an object when it is whole.
            self._files.pipe_file(path, content.to_pybytes())
            return path
        Path(folder).mkdir(parents=True, exist_ok=True)
        unfinished = f"{folder}/.{name}.{os.getpid()}.tmp"
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(unfinished).replace(path)
        return path


def stem_of(path: str) -> str:
    """The name that `replace` was given for a file."""
    return path.rsplit("/", 1)[1].rpartition("-")[0]


def user_events(rows: pa.Table) -> Iterator[UserEvent]:
    """Events of `EventLog.events` or `rows(FEEDBACK)` as `features.windows.apply` takes them, in order, cheaply."""
    texts, numbers = ("user_id", "event_id", "item_id", "kind", "segment"), ("value", "confidence")
    for batch in rows.select([*texts, "event_time", *numbers, "categories"]).to_batches(max_chunksize=_BATCH_ROWS):
        users, events, items, kinds, segments = (_texts(batch[name]) for name in texts)
        times = batch["event_time"].cast(pa.int64()).to_numpy().tolist()
        values, confidences = (pc.fill_null(batch[name], 1.0).to_numpy().tolist() for name in numbers)
        hashes = map(stable_hash, events)
        fields = zip(users, hashes, items, kinds, times, values, confidences, _tuples(batch["categories"]), strict=True)
        yield from (UserEvent._make((*part, None, segment)) for part, segment in zip(fields, segments, strict=True))


def _texts(column: pa.Array) -> list[str]:
    """Values of a column; "" where a file is older than the column."""
    if column.null_count:
        return [text or "" for text in column.to_pylist()]
    if not pa.types.is_dictionary(column.type):
        return cast(list[str], column.to_pylist())
    words = column.dictionary.to_pylist()
    return [words[index] for index in column.indices.to_numpy().tolist()]


def _tuples(lists: pa.ListArray) -> list[tuple[str, ...]]:
    """List values as tuples; equal ones share one object."""
    flat = _texts(lists.flatten().dictionary_encode())
    offsets = (lists.offsets.to_numpy() - lists.offsets[0].as_py()).tolist()
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    parts = (tuple(flat[begin:end]) for begin, end in pairwise(offsets))
    return [shared.setdefault(part, part) for part in parts]


def in_order(rows: pa.Table, *, copies: bool = False) -> pa.Table:
    """In order of event time, ties by event_id, then as stored.

    Of one user's copies of an event the first stays; with `copies` all do, next to each other.
    """
    times = _int64(rows["event_time"], 0)
    event_rank, distinct = _codes(rows["event_id"])
    order = np.lexsort((event_rank, times))
    if distinct < rows.num_rows and not copies:
        # One id under two users is two events: the stream knows ids per user, too.
        user_rank, _ = _codes(rows["user_id"])
        both = event_rank[order].astype(np.int64) * rows.num_rows + user_rank[order]
        _, first = np.unique(both, return_index=True)
        order = order[np.sort(first)]
    in_order = len(order) == rows.num_rows and bool(np.all(order[1:] > order[:-1]))
    return rows if in_order else rows.take(pa.array(order))


def _codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], int]:
    """Numbers in the order of the texts (equal for equal texts), and how many texts there are."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(rank))
    return rank[encoded.indices.to_numpy(zero_copy_only=False)], len(rank)


def _int64(column: pa.ChunkedArray, missing: int) -> npt.NDArray[np.int64]:
    return cast(npt.NDArray[np.int64], pc.fill_null(column.cast(pa.int64()), missing).to_numpy())


def _by_date(rows: pa.Table, by_month: bool) -> Iterator[tuple[str, pa.Table]]:
    times = _int64(rows["event_time"], 0)
    dates = times.astype("datetime64[ms]").astype("datetime64[M]" if by_month else "datetime64[D]")
    if len(dates) and not np.all(dates[1:] >= dates[:-1]):
        order = np.argsort(dates, kind="stable")
        rows, dates = rows.take(pa.array(order)), dates[order]
    values, starts = np.unique(dates, return_index=True)
    for date, start, end in zip(values, starts, [*starts[1:], len(dates)], strict=True):
        yield str(date), rows.slice(start, end - start)


def _is_thin(rows: pa.Table) -> bool:
    days = len(np.unique(_int64(rows["event_time"], 0) // _DAY_MS))
    return days > _MANY_DAYS and rows.num_rows < days * _THIN_DAY_ROWS


def _may_hold(path: str, start_ms: int | None, end_ms: int | None) -> bool:
    """Whether a file may hold times in the range, by the day or month in its folder's name."""
    try:
        period = np.datetime64(path.rsplit("/", 2)[1].removeprefix("date="))
        begin = int(period.astype("datetime64[ms]").astype(np.int64))
        end = int((period + 1).astype("datetime64[ms]").astype(np.int64))
    except ValueError:
        return True
    return (start_ms is None or end > start_ms) and (end_ms is None or begin < end_ms)
