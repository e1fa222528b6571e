"""Reading text files so that whatever is wrong can be said with file, line and column.

Used by the loaders and the importer. Invariant: a file that is not as promised ends in one ConfigError (the file) or
MalformedEventError (a row of it), and the message says what to do.
"""

import csv
import difflib
import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError, MalformedEventError

# A cell longer than this is no cell: a quote was left open.
csv.field_size_limit(4_000_000)


def broken_row(path: Path, line: int, column: str, problem: str) -> MalformedEventError:
    """The error of one row."""
    return MalformedEventError(f"{path}, line {line}, column {column}" if column else f"{path}, line {line}", problem)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing where no choice is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f'; did you mean "{by_lower[near[0]]}"?' if near else ""


def need_file(path: Path) -> Path:
    """The path, if it is a file that can be read."""
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file in it (or use --kind movielens or trivago)")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"{path}: there is no folder {folder}; check the path")
    names = sorted(entry.name for entry in folder.iterdir())
    hint = did_you_mean(path.name, names) or (f"; {folder} holds {', '.join(names[:8])}" if names else "")
    raise ConfigError(f"{path}: no such file{hint}")


@contextmanager
def opened(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """The file as text, unpacked where its name ends in .gz; a byte order mark is skipped.

    Raises:
        ConfigError: not readable, not gzip, or not of the encoding (also while the caller reads).
    """
    encoding = "utf-8-sig" if encoding.lower().replace("_", "-") in {"utf-8", "utf8"} else encoding
    try:
        if need_file(path).suffix == ".gz":
            with gzip.open(path, "rt", encoding=encoding, newline="") as file:
                yield file
        else:
            with path.open("r", encoding=encoding, newline="") as file:
                yield file
    except UnicodeDecodeError as error:
        problem = f"{path}: byte {error.start} is not {error.encoding}"
        raise ConfigError(f"{problem}; say --encoding latin-1, or whatever it is in") from error
    except LookupError as error:
        raise ConfigError(f"{path}: {error}; say --encoding utf-8, latin-1 or cp1252") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: not a whole gzip file: {error}; fetch it again") from error
    except csv.Error as error:
        raise ConfigError(f"{path}: {error}; is a quote left open, or the delimiter another?") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; check its permissions") from error


def cells(file: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each line that is not empty. One-character separators may be quoted around."""
    if len(separator) == 1:
        reader = csv.reader(file, delimiter=separator)
        for row in reader:
            if row:
                yield reader.line_num, row
        return
    for number, line in enumerate(file, start=1):
        text = line.rstrip("\r\n")
        if text:
            yield number, text.split(separator)


@dataclass(frozen=True)
class Columns:
    """A small table of text, by column, that knows its file and lines."""

    path: Path
    lines: list[int]
    columns: dict[str, list[str]]

    def __getitem__(self, name: str) -> list[str]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.lines)

    def ids(self, name: str) -> list[str]:
        """A column whose cells must not be empty."""
        values = self.columns[name]
        if not all(values):
            raise broken_row(self.path, self.lines[values.index("")], name, "must not be empty")
        return values

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """A column of finite numbers. Shape [rows]."""
        try:
            numbers = np.array(self.columns[name], dtype=np.float64)
        except ValueError:
            numbers = np.array([_number_or_nan(text) for text in self.columns[name]])
        wrong = np.flatnonzero(~np.isfinite(numbers))
        if len(wrong):
            row = int(wrong[0])
            problem = f"{self.columns[name][row]!r} is not a number; mend or remove the line"
            raise broken_row(self.path, self.lines[row], name, problem)
        return numbers


def read_columns(
    path: Path, names: Sequence[str], separator: str, *, header: bool = False, encoding: str = "utf-8"
) -> Columns:
    """Reads a whole file of known columns.

    Args:
        path: the file; .gz is unpacked.
        names: its columns, in order; with `header`, the columns that are wanted.
        separator: between cells.
        header: the first line names the columns.
        encoding: of the text.
    """
    with opened(path, encoding) as file:
        rows = cells(file, separator)
        present = list(names)
        if header:
            present = [name.strip() for name in next(rows, (0, []))[1]]
            for name in names:
                if present and name not in present:
                    hint = did_you_mean(name, present)
                    raise ConfigError(f"{path}: no column {name!r} among {', '.join(present)}{hint}")
        lines, table = [], []
        for line, row in rows:
            if len(row) != len(present):
                problem = f"{len(row)} columns instead of {len(present)} ({', '.join(present)}); mend or remove it"
                raise broken_row(path, line, "", problem)
            lines.append(line)
            table.append(row)
    if not table:
        raise ConfigError(f"{path}: holds no rows; is it the right file?")
    by_name = dict(zip(present, map(list, zip(*table, strict=True)), strict=True))
    return Columns(path, lines, {name: by_name[name] for name in names})


def _number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
