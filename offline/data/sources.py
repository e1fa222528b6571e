"""Rows of a user's file, whatever its format: CSV, JSON lines or Parquet, packed or not.

First part of the importer. Invariant: a row comes with its line (CSV, JSON lines) or number (Parquet), and a row that
cannot be read comes as the error that says so, in its place.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import ConfigError, MalformedEventError
from offline.data.mapping import ImportMapping
from offline.data.reading import broken_row, cells, need_file, opened

# (line, row) or (line, what is wrong with it); the share of the file that is read so far.
Row = tuple[int, Mapping[str, Any] | MalformedEventError, float]
_DELIMITERS = (",", "\t", ";", "|", "::")


class RowSource:
    """A file as rows of column -> value; values are text (CSV) or typed (JSON lines, Parquet)."""

    def __init__(self, path: Path, mapping: ImportMapping) -> None:
        self.path = path
        self._mapping = mapping
        self.format, first_line = self._recognise()
        self.delimiter = ""
        if self.format == "csv":
            self.delimiter = mapping.delimiter or max(_DELIMITERS, key=first_line.count)
            self.columns = list(mapping.columns) or self._header()
        elif self.format == "json lines":
            self.columns = self._keys()
        else:
            self.columns = self._parquet().schema_arrow.names
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise ConfigError(f"{path}: two columns are called {twice[0]!r}; rename one")

    def rows(self) -> Iterator[Row]:
        if self.format == "csv":
            return self._csv_rows()
        return self._json_rows() if self.format == "json lines" else self._parquet_rows()

    def _recognise(self) -> tuple[str, str]:
        """The format and the first line that says something, by the content rather than by the name."""
        with need_file(self.path).open("rb") as file:
            if file.read(4) == b"PAR1":
                return "parquet", ""
        with opened(self.path, self._mapping.encoding) as text:
            first = next((line for line in text if line.strip()), "")
        if not first:
            raise ConfigError(f"{self.path}: is empty")
        if first.lstrip().startswith("["):
            raise ConfigError(f"{self.path}: a JSON list; one object per line is needed (jq -c '.[]' makes that of it)")
        return ("json lines" if first.lstrip().startswith("{") else "csv"), first

    def _header(self) -> list[str]:
        with opened(self.path, self._mapping.encoding) as file:
            _, names = next(cells(file, self.delimiter))
        names = [name.strip() for name in names]
        if all(_is_number(name) for name in names):
            shown = ", ".join(names[:4])
            raise ConfigError(f"{self.path}: the first line names no columns ({shown}); name them: --columns a,b,c")
        return names

    def _csv_rows(self) -> Iterator[Row]:
        size = max(1, self.path.stat().st_size)
        with opened(self.path, self._mapping.encoding) as file:
            rows = cells(file, self.delimiter)
            if not self._mapping.columns:
                next(rows)
            for line, row in rows:
                if len(row) != len(self.columns):
                    count = f"{len(row)} columns, but there are {len(self.columns)} names"
                    problem = f"{count}; is the delimiter {self.delimiter!r}?"
                    yield line, broken_row(self.path, line, "", problem), 0.0
                else:
                    yield line, dict(zip(self.columns, row, strict=True)), _position(file) / size

    def _keys(self) -> list[str]:
        keys: dict[str, None] = {}
        for _, row, _ in self._json_rows():
            if not isinstance(row, MalformedEventError):
                keys.update(dict.fromkeys(row))
        return list(keys)

    def _json_rows(self) -> Iterator[Row]:
        size = max(1, self.path.stat().st_size)
        with opened(self.path, self._mapping.encoding) as file:
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    row = orjson.loads(text)
                except orjson.JSONDecodeError as error:
                    yield line, broken_row(self.path, line, "", f"not JSON: {error}"), 0.0
                    continue
                if isinstance(row, dict):
                    yield line, row, _position(file) / size
                else:
                    yield line, broken_row(self.path, line, "", "not a JSON object"), 0.0

    def _parquet(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{self.path}: not a whole Parquet file: {' '.join(str(error).split())[:200]}") from error

    def _parquet_rows(self) -> Iterator[Row]:
        with self._parquet() as file:
            total, number = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=8192):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield number, row, number / total


def _position(file: TextIO) -> float:
    """Bytes of the file (as it lies on the disk) that are read."""
    buffer: Any = file.buffer
    return float(getattr(buffer, "fileobj", buffer).tell())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
