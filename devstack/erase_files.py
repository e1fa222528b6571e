"""The part of an erasure that lies in files: event log and batch scores are rewritten without what records name.

Used by erase.py, for one user or for all whose tombstones came; one pass for all of them. Invariant: files are replaced
one by one, each in one step, so a run that was cut off is finished by another one.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from core.bundle import BATCH_SCORES, MANIFEST, put_file
from features.stores import erasures
from features.stores.erasures import Erasure
from features.stores.event_log import EventLog
from features.stores.event_rows import EVENTS, FEEDBACK, IMPRESSIONS, USERS
from features.stores.log_positions import source_of

# Place -> user -> rows removed.
Removed = dict[str, Counter[str]]


def rewrite_log(log_root: str, records: Sequence[Erasure]) -> Removed:
    """Rewrites the files of a log that hold something of a record's user. Raises ConfigError, StageError."""
    log, users = EventLog(log_root), pa.array(sorted({one.user_id for one in records}), pa.string())
    removed: Removed = {}
    for table in (EVENTS, FEEDBACK, IMPRESSIONS, USERS):
        counts = removed.setdefault(f"event log: {table.name}", Counter())
        for path in log.files(table):
            rows = log.read(table, [path], ["user_id", "partition", "offset", "ingest_time"])
            names = rows["user_id"].cast(pa.string())
            if not pc.any(pc.is_in(names, users)).as_py():
                continue
            kept = pa.array(erasures.surviving(rows, source_of(path), records, profiles=table is USERS))
            gone = names.filter(pc.invert(kept)).to_pylist()
            if gone:
                # An empty file stays: its name says how far the log has come.
                log.rewrite(path, kept)
                counts.update(gone)
    return removed


def rewrite_bundles(registry: Path, users: Collection[str]) -> Removed:
    """Takes users out of batch scores: those of bundles, and finished parts of runs that were cut off."""
    removed: Removed = {}
    unwanted = pa.array(sorted(users), pa.string())
    for path in _score_files(registry):
        rows = pq.read_table(path, partitioning=None)
        names = rows["user_id"].cast(pa.string())
        kept = pc.invert(pc.is_in(names, unwanted))
        counts = removed.setdefault(f"bundles: {path.relative_to(registry).as_posix()}", Counter())
        counts.update(names.filter(pc.invert(kept)).to_pylist())
        if not counts:
            continue
        unfinished = path.with_name(f".{path.name}.erasing")
        pq.write_table(rows.filter(kept), unfinished, compression="zstd")
        if path.name == BATCH_SCORES and (path.parent / MANIFEST).is_file():
            put_file(path.parent, BATCH_SCORES, unfinished)
        else:
            unfinished.replace(path)
    return removed


def _score_files(registry: Path) -> Iterator[Path]:
    for path in sorted(registry.rglob("*.parquet")):
        if "user_id" in pq.read_schema(path).names:
            yield path
