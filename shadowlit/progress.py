"""Consoles and tables for results, and progress bars without a thread, which would forbid forking to compute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

from shadowlit.text import fitted

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

_REFRESH_S = 0.1
# Wide enough for every table, where no terminal sets a width: one line per row, for grep.
_PLAIN_WIDTH = 220


def make_console() -> Console:
    """Create a console that breaks text between words alone and prints brackets as they are; tables adapt too."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return _Console(highlight=False, markup=False, soft_wrap=True, width=width)


class _Console(Console):
    """A console that breaks text between words, and nothing that is to be copied."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print strings in lines that fit, and everything else as it is."""
        super().print(*(fitted(each, self.file) if isinstance(each, str) else each for each in objects), **options)


class _Table(Table):
    """A table that never breaks a number: where the terminal is narrower, every row becomes a list."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if Measurement.get(console, options.update_width(sys.maxsize), self).maximum <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        yield self.title or ""
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for i, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                yield "  " * (i > 0) + ": ".join(filter(None, (" ".join(str(column.header).split()), str(cell))))


def make_table(*headings: str, left: int = 1, **options: Any) -> Table:
    """Create a table that is readable at any width; columns after the first ``left`` are aligned right."""
    return _Table(
        *(Column(head, justify="left" if i < left else "right") for i, head in enumerate(headings)), **options
    )


@contextmanager
def progress_bar(what: str, total: int, *columns: ProgressColumn) -> Iterator[Callable[[int], None]]:
    """Show a bar until the block ends; nothing is shown if the output is not a terminal.

    Args:
        what: Text before the bar.
        total: Amount of work.
        columns: Columns after the bar; by default the share that is done and the time that is left.

    Yields:
        A function to call with the amount of work done since the last call.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    shown = columns or (TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(
        TextColumn(what), BarColumn(), *shown, console=Console(highlight=False), transient=True, auto_refresh=False
    )
    with progress:
        task = progress.add_task(what, total=total)
        due = time.monotonic()

        def advance(count: int) -> None:
            nonlocal due
            progress.advance(task, count)
            if (now := time.monotonic()) >= due:
                progress.refresh()
                due = now + _REFRESH_S

        yield advance
