"""Segments of the event log: rows of one stretch of a topic-partition, in the log exactly once.

    ROOT/_staging/<time>-<unique>/…                     rows, written but in no reader's sight
    ROOT/_commits/<table>/<source>-p<partition>/<first> one record per stretch: its last offset and its files

Used by sink.py. A stretch is committed by creating the record of its first offset, which only one writer can; then
its files move to where readers look. Invariant: a record is created once, and whoever opens the partition next
finishes the move that a dead writer left; so each position lands once, whoever is killed or wakes up late. What no
record names is nobody's, once it is older than any commit can take: `sweep` removes it.
"""

import json
import os
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from core.clock import Clock, SystemClock
from core.errors import StageError
from features.stores.event_log import EventLog
from features.stores.event_rows import LogTable

_STAGING, _COMMITS = "_staging", "_commits"
# Records below the newest are only kept for a reader that is just looking at them.
_RECORDS_KEPT = 3
# A batch that touches more days than this (a replayed history) lies by month.
_DAYS_MAX = 8
_DAY_MS = 86_400_000
# A commit that takes half as long gives up; what is older was left behind.
_STAGED_MAX_MS = _DAY_MS
_STAGED = re.compile(rf"/{_STAGING}/([^/]+)/")


class SegmentTakenError(StageError):
    """Another writer has committed this stretch: read the position anew."""

    def __init__(self, what: str) -> None:
        super().__init__("event-log", f"{what} was written by another worker")


@dataclass(frozen=True, slots=True)
class Stretch:
    """One topic-partition of one log, for one table."""

    table: LogTable
    source: int
    partition: int

    @property
    def name(self) -> str:
        return f"{self.source:016x}-p{self.partition}"


class Segments:
    """The committed stretches of one event log."""

    def __init__(self, root: str, clock: Clock | None = None) -> None:
        self._root = root.rstrip("/")
        self._clock = clock or SystemClock()
        self._files, path = fsspec.core.url_to_fs(self._root)
        self._path = path.rstrip("/")
        self._local = isinstance(self._files, LocalFileSystem)

    def position(self, stretch: Stretch) -> int:
        """The newest offset that is in the log, -1 for none. Finishes what a dead writer has left.

        Raises:
            StageError: the folder or object store does not answer.
        """
        try:
            while names := self._records(stretch):
                record = self._read(f"{self._commits(stretch)}/{names[-1]}")
                if record is not None:
                    self._publish(record)
                    return int(record["last"])
        except (OSError, ValueError, KeyError) as error:
            raise self._failed(error) from error
        return -1

    def commit(self, stretch: Stretch, first: int, last: int, rows: pa.Table) -> None:
        """Puts rows of the offsets first..last into the log, once.

        Raises:
            SegmentTakenError: another writer has committed from `first` on; nothing was added.
            StageError: the folder or object store does not take it; nothing was added, or `position` will finish it.
        """
        name = f"{stretch.name}-{first:012d}-{last:012d}"
        begin_ms = self._clock.now_ms()
        staging = f"{self._root}/{_STAGING}/{begin_ms:013d}-{uuid.uuid4().hex}"
        try:
            staged = self._stage(staging, stretch, rows, name) if len(rows) else []
            if self._clock.now_ms() - begin_ms > _STAGED_MAX_MS // 2:
                raise OSError("this process stood still for hours; it writes these rows anew")
            files = [[path, self._final(path)] for path in staged]
            record = {"last": last, "files": files}
            folder = self._commits(stretch)
            if not self._create(f"{folder}/{first:020d}", json.dumps(record).encode()):
                self._remove(staging)
                raise SegmentTakenError(f"{stretch.table.name} of partition {stretch.partition} from offset {first}")
            names = self._records(stretch)
            if names[-1] > f"{first:020d}":
                # A late riser: the record of this stretch had come and gone already.
                self._files.rm_file(f"{folder}/{first:020d}")
                self._remove(staging)
                raise SegmentTakenError(f"{stretch.table.name} of partition {stretch.partition} from offset {first}")
            self._publish(record)
            self._remove(staging)
            for old in names[:-_RECORDS_KEPT]:
                with suppress(FileNotFoundError):
                    self._files.rm_file(f"{folder}/{old}")
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def sweep(self) -> int:
        """Removes rows that failed commits and dead writers have left in no record; returns how many folders.

        Raises:
            StageError: the folder or object store does not answer.
        """
        try:
            self._files.invalidate_cache()
            oldest = f"{self._clock.now_ms() - _STAGED_MAX_MS:013d}"
            old = {name for name in self._names(f"{self._path}/{_STAGING}") if name < oldest}
            if old:
                old -= self._named()
            for name in old:
                self._remove(f"{self._root}/{_STAGING}/{name}")
        except (OSError, ValueError, KeyError) as error:
            raise self._failed(error) from error
        return len(old)

    def _stage(self, staging: str, stretch: Stretch, rows: pa.Table, name: str) -> list[str]:
        try:
            return EventLog(staging).write(stretch.table, rows, name, by_month=_is_spread(rows))
        except (OSError, ValueError):
            with suppress(OSError):
                self._remove(staging)
            raise

    def _named(self) -> set[str]:
        """Folders of the staging area that records name: whoever opens their partition moves what is in them."""
        named: set[str] = set()
        for path in self._files.glob(f"{self._path}/{_COMMITS}/*/*/*"):
            if path.rsplit("/", 1)[1].isdigit():
                record = self._read(str(path)) or {"files": []}
                named.update(match[1] for staged, _ in record["files"] if (match := _STAGED.search(staged)))
        return named

    def _names(self, folder: str) -> list[str]:
        try:
            return [str(path).rstrip("/").rsplit("/", 1)[1] for path in self._files.ls(folder, detail=False)]
        except FileNotFoundError:
            return []

    def _commits(self, stretch: Stretch) -> str:
        return f"{self._path}/{_COMMITS}/{stretch.table.name}/{stretch.name}"

    def _records(self, stretch: Stretch) -> list[str]:
        self._files.invalidate_cache()
        return sorted(name for name in self._names(self._commits(stretch)) if name.isdigit())

    def _read(self, path: str) -> dict[str, Any] | None:
        """A record; None where it has gone in the meantime (a newer one is there)."""
        try:
            record: dict[str, Any] = json.loads(self._files.cat_file(path))
        except FileNotFoundError:
            return None
        return record

    def _create(self, path: str, content: bytes) -> bool:
        """Creates a file whole, or not at all where there is one already."""
        if not self._local:
            try:
                self._files.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True
        folder, name = path.rsplit("/", 1)
        Path(folder).mkdir(parents=True, exist_ok=True)
        unfinished = f"{folder}/.{name}.{uuid.uuid4().hex}"
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(unfinished, path)
        except FileExistsError:
            return False
        finally:
            Path(unfinished).unlink()
        return True

    def _publish(self, record: dict[str, Any]) -> None:
        for staged, final in record["files"]:
            if self._local:
                Path(final).parent.mkdir(parents=True, exist_ok=True)
            # Moved already: by this writer before it was killed, or by whoever came after it.
            with suppress(FileNotFoundError):
                self._files.mv(staged, final)

    def _final(self, staged: str) -> str:
        head, tail = staged.split(f"/{_STAGING}/", 1)
        return f"{head}/{tail.split('/', 1)[1]}"

    def _remove(self, staging: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm(self._files._strip_protocol(staging), recursive=True)

    def _failed(self, error: Exception) -> StageError:
        return StageError("event-log", f"{self._root}: {' '.join(str(error).split())[:300]}; is it writable?")


def _is_spread(rows: pa.Table) -> bool:
    if "event_time" not in rows.column_names:
        return False
    times = rows["event_time"].cast(pa.int64()).to_numpy()
    return len(np.unique(times // _DAY_MS)) > _DAYS_MAX
