"""What the data commands print: tables on stdout, a progress bar on stderr.

Invariant: decides nothing; shows what importer, loaders and simulator return.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from offline.data.dataset import DatasetSummary, Progress, time_text
from offline.data.importer import FileReport, ImportResult


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal."""
    bar = ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def print_check(result: ImportResult, console: Console) -> None:
    """What the importer understood of each file, column by column."""
    for report in result.files:
        console.print(f"[bold]{escape(report.path.name)}[/] ({report.format}): {report.rows:,} rows", highlight=False)
        console.print(_columns(report))
        for problem in report.problems:
            console.print(f"[red]broken:[/] {escape(problem)}", soft_wrap=True, highlight=False)
        if report.broken > len(report.problems):
            console.print(f"[red]... and {report.broken - len(report.problems)} more broken rows[/]")


def _columns(report: FileReport) -> Table:
    table = Table()
    for name in ("column", "becomes", "type", "why", "sample"):
        table.add_column(name, overflow="ellipsis" if name == "sample" else "fold", max_width=40)
    for column in report.columns:
        cells = (column.column, column.field or "(left out)", column.type, column.reason, column.sample)
        table.add_row(*(escape(cell) for cell in cells))
    return table


def print_summary(summary: DatasetSummary, console: Console, *, written: bool = True) -> None:
    """Counts, kinds, the time span, and what was left out."""
    where = f"in {summary.path}" if written else "(a check: nothing was written)"
    console.print(f"[bold]{escape(summary.name)}[/] {escape(where)}", soft_wrap=True, highlight=False)
    table = Table(show_header=False)
    for name, count in summary.rows.items():
        table.add_row(name, f"{count:,}")
    if summary.events:
        table.add_row("users and items in events", f"{summary.event_users:,} and {summary.event_items:,}")
        table.add_row("kinds", ", ".join(f"{escape(kind)} {count:,}" for kind, count in summary.kinds.items()))
        table.add_row("time", f"{time_text(summary.start_ms)} .. {time_text(summary.end_ms)}")
    for reason, count in summary.skipped.items():
        table.add_row(f"left out: {escape(reason)}", f"{count:,}")
    table.add_row("seconds", f"{summary.seconds:.1f}")
    console.print(table)
    for note in summary.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True, highlight=False)
