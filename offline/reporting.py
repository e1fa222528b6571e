"""What the offline commands say while they work: steps and progress bars on stderr, or nothing at all.

Invariant: stdout stays free for results, so `--json` output can be piped.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Says what is going on. `shown=False` says nothing."""

    def __init__(self, *, shown: bool = True) -> None:
        self.shown = shown
        self._console = Console(stderr=True, quiet=not shown, highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; call what it gives with the number of things that got done."""
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            # A log file gets no half-drawn bars.
            disable=self._console.quiet or not sys.stderr.isatty(),
            transient=True,
        )
        with progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.advance(task, done)
