"""Where rows of the event log come from: topic identity, partition, offset.

The stream's sink names its files `<source>-p<partition>-<first>-<last>`; rows carry partition and offset. Used to
rebuild the online store and to erase. Invariant: what was imported has no position, and gets none.
"""

import re
from collections.abc import Iterator, Sequence

import pyarrow as pa

from features.stores.event_log import EventLog
from features.stores.event_rows import LogTable

_NAME = re.compile(r"/(?P<source>[0-9a-f]{16})-p(?P<partition>\d+)-\d+-(?P<last>\d+)\.parquet$")
SOURCE = pa.field("source", pa.uint64())


def source_of(path: str) -> int | None:
    """The topic's identity (core.topics.source_id) of a file of the log; None for imported rows."""
    match = _NAME.search(path)
    return int(match["source"], 16) if match else None


def positions(log: EventLog, table: LogTable) -> dict[tuple[int, int], int]:
    """(source, partition) -> newest offset that the log has. Offsets up to there are all in it, or were malformed."""
    newest: dict[tuple[int, int], int] = {}
    for match in map(_NAME.search, log.files(table)):
        if match is not None:
            where = (int(match["source"], 16), int(match["partition"]))
            newest[where] = max(int(match["last"]), newest.get(where, -1))
    return newest


def by_source(log: EventLog, table: LogTable, columns: Sequence[str]) -> Iterator[tuple[int | None, pa.Table]]:
    """Rows as they lie in the files, per source, with a column `source` more."""
    paths: dict[int | None, list[str]] = {}
    for path in log.files(table):
        paths.setdefault(source_of(path), []).append(path)
    for source, files in paths.items():
        rows = log.read(table, files, list(columns))
        yield source, rows.append_column(SOURCE, pa.array([source] * rows.num_rows, SOURCE.type))
