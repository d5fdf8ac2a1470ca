"""Progress bars that need no thread of their own: beside a thread, no process is forked to compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

_REFRESH_S = 0.1


@contextmanager
def progress_bar(what: str, total: int, *columns: ProgressColumn) -> Iterator[Callable[[int], None]]:
    """A bar that goes when the block ends; nothing is shown where the output is no terminal.

    Args:
        what: is being done, before the bar.
        total: how much there is to do.
        columns: behind the bar; the share that is done and the time that is left, if none are given.

    Yields:
        A function to call with what has been done since the last call.
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
