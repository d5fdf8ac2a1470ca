"""What ``compare`` and ``sweep`` show while trainings run: how many have ended, and the metrics of those that run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Self

from shadowlit.progress import make_console
from shadowlit.status import StatusLine
from shadowlit.studies.trials.process import Running
from shadowlit.text import duration, number

SKIPPED = "is complete already"


class StudyProgress:
    """A status line of a study; each training that ends has a line of its own. A context manager.

    Args:
        what: What is counted, e.g. trials.
        total: How many are planned.
        metric: The metric that :attr:`Running.value` holds.
        done: How many were complete before.
    """

    def __init__(self, what: str, total: int, metric: str, done: int = 0) -> None:
        self._what, self._total, self._metric = what, total, metric
        self._console = make_console()
        self._line = StatusLine(self._console.print)
        self._ended, self._failed, self._run, self._begun = done, 0, 0, time.monotonic()

    def __enter__(self) -> Self:
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()

    def end(self, name: str, state: str, reason: str = "") -> None:
        """Print how a training has ended."""
        self._ended += 1
        self._failed += state == "failed"
        self._run += state != SKIPPED
        make_console().print(f"{name} {state}" + (f": {reason}" if reason else ""))

    def poll(self, running: Sequence[Running], refresh: Callable[[Running], None] = lambda each: None) -> None:
        """Show what runs, if the line is due; ``refresh`` is called before with each of them."""

        def parts() -> list[str]:
            for each in running:
                refresh(each)
            taken = time.monotonic() - self._begun
            counts = [
                f"{self._ended}/{self._total} {self._what}",
                *([f"{self._failed} failed"] if self._failed else []),
            ]
            # As long as those took that have run, side by side as they do now.
            left = taken / self._run * max(0, self._total - self._ended) if self._run else None
            times = [duration(taken), *([] if left is None else [f"{duration(left)} left"])]
            return [*counts, *times, *map(self._described, running)]

        if running:
            self._line.show(parts)

    def _described(self, each: Running) -> str:
        value = "" if each.value is None else f" {self._metric} {number(each.value)}"
        return f"{each.name}: {'starting' if each.step is None else f'step {each.step:,}'}{value}"
