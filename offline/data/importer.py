"""`headrace import`: a user's own items, users and events into the event log.

Third part, after sources.py (files to rows) and convert.py (rows to messages); mapping.py says which column is what.
Invariant: a file is written as a whole or not at all, replacing what the same file brought before; every row is
written, or in the error, or (with skip_broken) counted and kept in `OUT/broken/`.
"""

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow as pa
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from core.clock import Clock, SystemClock
from core.errors import ConfigError, MalformedEventError
from features.stores.event_log import EventLog
from features.stores.event_rows import ITEMS, Source, to_table
from offline.data.convert import Converter, is_absent, is_numeric, recognise_time_unit
from offline.data.dataset import DatasetSummary, Progress, no_progress, summarise
from offline.data.mapping import ImportMapping, Plan, resolve
from offline.data.reading import broken_row
from offline.data.sources import RowSource

_SAMPLE_ROWS = 1000
_CHUNK_ROWS = 50_000
# Examples of broken rows that a check shows.
_SHOWN_PROBLEMS = 5
_TYPE_NAMES = {
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_DOUBLE: "number",
    FieldDescriptor.TYPE_INT32: "whole number",
    FieldDescriptor.TYPE_BOOL: "yes/no",
}
_ADVICE = "mend the row, or say --skip-broken to leave such rows out"


@dataclass(frozen=True)
class ColumnReport:
    """What became of one column."""

    column: str
    # Field, or `labels.x`; empty = left out.
    field: str
    # text, number, time (s), list, ...
    type: str
    # mapped, recognised, free, constant or ignored
    reason: str
    sample: str


@dataclass
class FileReport:
    """What was understood of one file."""

    path: Path
    format: str
    columns: list[ColumnReport]
    rows: int = 0
    broken: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImportResult:
    """The files as understood, and what they hold together (written, unless it was a check)."""

    files: list[FileReport]
    summary: DatasetSummary

    @property
    def broken(self) -> int:
        return sum(report.broken for report in self.files)


class Importer:
    """Imports files of one kind into one log."""

    def __init__(
        self,
        out: Path | str,
        mapping: ImportMapping,
        *,
        skip_broken: bool = False,
        check_only: bool = False,
        progress: Progress = no_progress,
        clock: Clock | None = None,
    ) -> None:
        self._log = EventLog(out)
        self._mapping = mapping
        self._skip_broken = skip_broken
        self._check_only = check_only
        self._progress = progress
        self._now_ms = (clock or SystemClock()).now_ms()
        # Id -> file and line, to name the first of two.
        self._seen: dict[str, tuple[Path, int]] = {}
        self._made_ids: Counter[int] = Counter()
        self._categories: dict[str, list[str]] = {}
        self._segments: dict[str, str] = {}
        self._unknown_items = 0

    def run(self, paths: Sequence[Path]) -> ImportResult:
        """Imports the files, or with `check_only` says what it would do.

        Raises:
            ConfigError: a file that cannot be read, or a mapping that does not fit it.
            MalformedEventError: a broken row, unless skip_broken or check_only.
        """
        started = time.monotonic()
        if self._mapping.kind == "events":
            states = self._log.states(ITEMS).select(["item_id", "categories"])
            self._categories = dict(zip(*(column.to_pylist() for column in states.columns), strict=True))
            self._segments = {user.user_id: user.segment for user in self._log.users() if user.segment}
        # All files are read before the first is written: an error leaves the log as it was.
        parts = [self._read(path) for path in paths]
        tables = []
        for report, plan, stem, rows, broken in parts:
            tables.append(rows)
            if self._check_only:
                continue
            self._log.replace(plan.table, [rows] if rows.num_rows else [], stem)
            self._keep_broken(stem, broken)
            self._progress(f"wrote {report.path.name}", 1.0)
        reports, name = [part[0] for part in parts], self._mapping.kind or ""
        return ImportResult(
            reports,
            summarise(
                name,
                self._log.root,
                {name: pa.concat_tables(tables)},
                {"broken rows": sum(report.broken for report in reports)},
                self._notes(),
                time.monotonic() - started,
            ),
        )

    def _read(self, path: Path) -> tuple[FileReport, Plan, str, pa.Table, list[dict[str, Any]]]:
        source = RowSource(path, self._mapping)
        sample = [row for _, row, _ in itertools.islice(source.rows(), _SAMPLE_ROWS) if isinstance(row, dict)]
        plan, units = self._plan(source, sample)
        converter = Converter(plan, self._mapping, path, units)
        report = FileReport(path, source.format, _column_reports(plan, units, sample))
        chunks, broken = [], []
        messages: list[Message] = []
        for outcome in self._messages(source, converter):
            if isinstance(outcome, Message):
                messages.append(outcome)
            else:
                line, row, error = outcome
                report.broken += 1
                if report.broken <= _SHOWN_PROBLEMS:
                    report.problems.append(str(error))
                broken.append({"line": line, "problem": str(error), "row": row})
            if len(messages) == _CHUNK_ROWS:
                chunks.append(self._rows(plan, messages))
                messages = []
        chunks.append(self._rows(plan, messages))
        rows = pa.concat_tables(chunks).combine_chunks()
        report.rows = rows.num_rows
        if not report.rows and not report.broken:
            raise ConfigError(f"{path}: has column names but no rows")
        return report, plan, f"import-{_content_hash(path)}", rows, broken

    def _plan(self, source: RowSource, sample: list[dict[str, Any]]) -> tuple[Plan, dict[str, str]]:
        values = {
            column: [row[column] for row in sample if not is_absent(row.get(column))] for column in source.columns
        }
        numeric = frozenset(column for column, cells in values.items() if cells and all(map(is_numeric, cells)))
        plan = resolve(self._mapping, source.columns, numeric, str(source.path))
        times = [target.column for target in plan.targets if not target.part and target.field.endswith("_time")]
        units = {
            column: "format"
            if self._mapping.time_format
            else self._mapping.time_unit or recognise_time_unit(values[column])
            for column in times
        }
        return plan, units

    def _messages(
        self, source: RowSource, converter: Converter
    ) -> Iterator[Message | tuple[int, Any, MalformedEventError]]:
        for count, (line, row, share) in enumerate(source.rows()):
            if count % 2000 == 0:
                self._progress(f"reading {source.path.name}", share)
            try:
                if isinstance(row, MalformedEventError):
                    raise row
                message = converter.message(line, row)
                self._complete(message, source.path, line, converter)
                yield message
            except MalformedEventError as error:
                if not (self._skip_broken or self._check_only):
                    raise MalformedEventError("", f"{error}; {_ADVICE}") from error
                yield line, None if isinstance(row, MalformedEventError) else row, error

    def _complete(self, message: Any, path: Path, line: int, converter: Converter) -> None:
        """Adds what the row does not say, and checks the message."""
        plan, made = converter.plan, False
        if plan.table.name == "events":
            made = not message.event_id
            if made:
                message.event_id = self._made_id(message)
            if not message.categories:
                message.categories.extend(self._categories_of(message.item_id))
            message.segment = message.segment or self._segments.get(message.user_id, "")
        converter.check(line, message)
        if made:
            return
        key = getattr(message, plan.table.key)
        if key in self._seen:
            first, first_line = self._seen[key]
            where = f"on line {first_line}" if first == path else f"in {first}, line {first_line}"
            raise broken_row(path, line, plan.column_of(plan.table.key), f"{key!r} is there already, {where}")
        self._seen[key] = (path, line)

    def _categories_of(self, item_id: str) -> list[str]:
        known = self._categories.get(item_id)
        if known is None:
            self._unknown_items += 1
            return []
        return known

    def _made_id(self, message: Any) -> str:
        """An id from what the event says: the same row has it again in the next export of the same data."""
        said = int.from_bytes(hashlib.blake2b(message.SerializeToString(deterministic=True), digest_size=8).digest())
        self._made_ids[said] += 1
        count = self._made_ids[said]
        return f"row-{said:016x}" + (f"-{count}" if count > 1 else "")

    def _rows(self, plan: Plan, messages: list[Message]) -> pa.Table:
        # Of two imports of an item, the later one holds.
        stamp = None if plan.table.by_date else [Source(ingest_time_ms=self._now_ms)] * len(messages)
        return to_table(plan.table, messages, stamp)

    def _keep_broken(self, stem: str, broken: list[dict[str, Any]]) -> None:
        path = f"{self._log.root}/broken/{stem}.jsonl"
        files, inner = fsspec.core.url_to_fs(path)
        if broken:
            files.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
            files.pipe_file(inner, b"".join(orjson.dumps(entry, default=str) + b"\n" for entry in broken))
        elif files.exists(inner):
            files.rm_file(inner)

    def _notes(self) -> tuple[str, ...]:
        if not self._unknown_items:
            return ()
        problem = f"{self._unknown_items} events are of items that the log does not have, so no categories were added"
        return (f"{problem}; import the items first, then the events again",)


def _column_reports(plan: Plan, units: dict[str, str], sample: list[dict[str, Any]]) -> list[ColumnReport]:
    reports = []
    for target in plan.targets:
        if target.part:
            kind = {"numbers": "number", "vectors": "vector"}.get(target.part, "text")
        else:
            kind = _type_name(plan, target.field, units.get(target.column, ""))
        values = (row[target.column] for row in sample if not is_absent(row.get(target.column)))
        shown = str(next(values, ""))
        reports.append(ColumnReport(target.column, target.path, kind, target.reason, shown))
    reports += [ColumnReport("", target.path, "", "constant", str(value)) for target, value in plan.constants]
    reports += [ColumnReport(column, "", "", "ignored", "") for column in plan.left_out]
    return reports


def _type_name(plan: Plan, name: str, unit: str) -> str:
    descriptor = plan.table.fields[name]
    if unit:
        return f"time ({unit})"
    if descriptor.is_repeated:
        return "list" if descriptor.message_type is None else "attributes"
    return _TYPE_NAMES[descriptor.type]


def _content_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
