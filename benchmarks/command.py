"""The command line of every benchmark: `--quick`, `--json`, errors in one line, a clean Ctrl-C, where public data lies.

Used by the `main` of each. Invariant: the table goes to the terminal either way, and with `--json` the last line of
standard output is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from core.errors import ConfigError, RecommenderError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DATA_VARIABLE = "HEADRACE_DATA"
_DATA_FOLDERS = (Path("data"), Path("../shared/data"))
_WIDTH = 200
# Arguments that the JSON repeats.
_TOLD = ("seed", "quick")

Result = TypeVar("Result")
P = TypeVar("P", bound="DataclassInstance")


class Command:
    """Arguments of one benchmark, and its run."""

    def __init__(self, name: str, doc: str | None, quick: str) -> None:
        """`name` of its module, the module's docstring, and what `--quick` does."""
        self._name = name
        first = (doc or "").split("\n")[0].partition(": `")[0]
        self._parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=first)
        self._parser.add_argument("--quick", action="store_true", help=f"{quick}; a rough figure, within a minute")
        self._parser.add_argument("--json", action="store_true", help="add one line of JSON")
        self.add = self._parser.add_argument

    def add_work(self) -> None:
        self.add("--work", type=Path, help="folder for data and logs, kept and used again; else a scratch folder")

    def add_data(self) -> None:
        told = f"folder of the public data sets; else ${DATA_VARIABLE}, else {' or '.join(map(str, _DATA_FOLDERS))}"
        self.add("--data", type=Path, help=told)

    def run(
        self,
        measure: Callable[[argparse.Namespace, Path], Result],
        show: Callable[[Result, Console], None],
        figures: Callable[[Any], Mapping[str, Any]] = dict,
        is_good: Callable[[Result], bool] = lambda _: True,
        argv: Sequence[str] | None = None,
    ) -> int:
        """Measures, shows, and returns the exit status: 0, 1 where something failed or is not good, 130 on Ctrl-C.

        Args:
            measure: from the arguments and a folder to work in.
            show: prints a table.
            figures: what goes into the JSON.
            is_good: whether the result is those of a system that works.
            argv: instead of the command line.
        """
        arguments = self._parser.parse_args(argv)
        try:
            with tempfile.TemporaryDirectory(prefix=f"headrace-{self._name}-") as scratch:
                result = measure(arguments, getattr(arguments, "work", None) or Path(scratch))
        except RecommenderError as error:
            print(f"benchmarks.{self._name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"benchmarks.{self._name}: stopped", file=sys.stderr)
            return 130
        console = Console(stderr=arguments.json)
        # A table that is cut says nothing.
        show(result, console if console.is_terminal else Console(stderr=arguments.json, width=_WIDTH))
        if arguments.json:
            asked = {name: value for name in _TOLD if (value := getattr(arguments, name, None)) is not None}
            print(json.dumps({**figures(result), **asked}))
        return 0 if is_good(result) else 1


def plan_of(given: argparse.Namespace, full: P, quick: P, *fields: str) -> P:
    """`full`, or with `--quick` the other, and what was given for these fields in place of its own."""
    own = {name: value for name in fields if (value := getattr(given, name)) is not None}
    return replace(quick if given.quick else full, **own)


def data_folder(name: str, given: Path | None) -> Path:
    """Where a public data set lies: a folder of that name, or one in `given`, in $HEADRACE_DATA or beside the project.

    Raises:
        ConfigError: nowhere.
    """
    if Path(name).is_dir():
        return Path(name)
    told = os.environ.get(DATA_VARIABLE)
    roots = (given,) if given else (Path(told),) if told else _DATA_FOLDERS
    for root in roots:
        if (root / name).exists():
            return root / name
    where = ", ".join(str(root / name) for root in roots)
    raise ConfigError(f"{name} is not there ({where}); set --data or {DATA_VARIABLE} to the folder of your public data")
