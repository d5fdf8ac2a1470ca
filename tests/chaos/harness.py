"""Kills a command again and again, starts it again each time, and looks at what it has left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.chaos.strikes import Aim, command
from tests.distributed import Forked

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ORPHANS_S = 5.0
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Kill:
    """How a command is ended: by a signal from outside after some time, or by a strike from the inside.

    A signal from outside is sent to the command's first process, as a shell's ``kill`` does it, or to its ``group``, as
    a terminal's Ctrl-C and schedulers do.
    """

    number: int
    delay_s: float = 0.0
    group: bool = False
    aim: Aim | None = None

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return (
            f"{self.aim}" if self.aim else f"{name}{' to the group' if self.group else ''} after {self.delay_s:.2f} s"
        )


class Case(Protocol):
    """A command that is killed: what it is called with in a folder, and what must be true of the folder after that."""

    name: str
    ranks: int
    prepare: Any

    def arguments(self, folder: Path) -> list[str]:
        """The command line, which is the same each time unless the command is told where to resume."""

    def is_done(self, folder: Path) -> bool:
        """Whether the command has nothing more to do, and would only say so."""

    def torn(self, folder: Path, kill: Kill) -> list[str]:
        """What must not be there, after a kill: what is cut short and would be taken for complete."""

    def differences(self, folder: Path) -> list[str]:
        """In what a finished command's results differ from the uninterrupted one's."""


@dataclass
class Chaos:
    """A campaign against one case, and its figures."""

    folder: Path
    seed: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.limit: int | None = None  # of kills
        self.runs = self.folder  # where the command's folders are
        self._number = 0
        Forked(int, out=self.folder / "told-0.txt").wait(_TIMEOUT_S)  # the server has imported everything by then

    def plan(
        self, count: int, duration_s: float, aims: Iterator[Aim], *, aimed: float = 1 / 3, first_s: float = 0.1
    ) -> list[Kill]:
        """Kills in an order of the seed: a share from the inside, the others by each signal at any moment."""
        count = min(count, self.limit or count)
        inside = [Kill(aim.signal, aim=aim) for _, aim in zip(range(round(count * aimed)), aims, strict=False)]
        outside = [
            Kill(SIGNALS[-1 - i % 3], self.random.uniform(first_s, duration_s), self.random.random() < 0.3)
            for i in range(count - len(inside))
        ]
        kills = [*inside, *outside]
        self.random.shuffle(kills)
        return kills

    def attack(self, case: Case, kills: Iterable[Kill], *, finish_each: bool = False) -> None:
        """Kill ``case`` by each of ``kills`` and start it again, until it finishes; then begin in another folder.

        Args:
            case: The command.
            kills: Kills; those that come too late are repeated, earlier.
            finish_each: Whether the command is run to its end after each kill.
        """
        round_number, waiting = 0, list(kills)
        late = 2 * len(waiting)
        while waiting:
            folder = self.runs / f"{case.name}-{round_number}"
            kill = waiting.pop(0)
            killed = self._kill(case, folder, kill)
            if killed and not finish_each:
                continue
            self._finish(case, folder, run=killed)
            round_number += 1
            if not killed and late:
                late -= 1
                waiting.append(replace(kill, delay_s=0.6 * kill.delay_s))
        if not finish_each and (folder := self.runs / f"{case.name}-{round_number}").exists():
            self._finish(case, folder, run=True)

    def measure(self, case: Case, folder: Path, aim: Aim) -> tuple[float, list[str]]:
        """Run a command that must succeed; return its seconds, and the changes that ``aim`` counts."""
        folder.mkdir()
        status, seconds, printed = self.run(case, folder, aim)
        assert status == 0, printed[-3000:]
        return seconds, self._changes()

    def run(self, case: Case, folder: Path, aim: Aim | None = None) -> tuple[int, float, str]:
        """Run a command to its end; return its status, the seconds, and what it printed."""
        started = time.monotonic()
        process, told = self._start(case, folder, aim)
        status, seconds = process.wait(_TIMEOUT_S), time.monotonic() - started
        self._log(f"{told.name} in {folder.name}: {status} after {seconds:.2f} s")
        self._count_orphans(process, "its end")
        return status, seconds, told.read_text()

    def _start(self, case: Case, folder: Path, aim: Aim | None) -> tuple[Forked, Path]:
        self._number += 1
        told = self.folder / f"told-{self._number}.txt"
        told.touch()
        record = self.folder / f"changes-{self._number}.txt"
        arguments = (command, aim, record, case.ranks, case.prepare, *case.arguments(folder))
        return Forked(*arguments, out=told), told

    def _kill(self, case: Case, folder: Path, kill: Kill) -> bool:
        """Start the command and kill it; return False if it finished before."""
        folder.mkdir(exist_ok=True)
        process, told = self._start(case, folder, kill.aim)
        if kill.aim is None:
            time.sleep(kill.delay_s)
            if process.poll() is None:
                (os.killpg if kill.group else os.kill)(process.pid, kill.number)
        status = process.wait(_TIMEOUT_S)
        self._log(f"{told.name} in {folder.name}: {kill}: {status}")
        if status == 0:
            return False
        struck = f"{kill} ({self._changes()[-1]})" if self._changes() else f"{kill}"
        self.counts["kills"] += 1
        self.counts[
            signal.Signals(kill.number).name if kill.aim is None or kill.aim.room is None else "in a write"
        ] += 1
        self.counts["aimed"] += kill.aim is not None
        expected = -kill.number if kill.number == signal.SIGKILL else 128 + kill.number
        if case.ranks == 1 and status not in (expected, -kill.number, -signal.SIGXFSZ):
            self._fault(f"exit status {status} after {struck}", told)
        self._count_orphans(process, struck)
        for each in case.torn(folder, kill):
            self.counts["torn"] += 1
            self._fault(f"torn after {struck}: {each}", told)
        return True

    def _count_orphans(self, process: Forked, struck: str) -> None:
        deadline = time.monotonic() + ORPHANS_S
        while (left := list(_session(process.pid))) and time.monotonic() < deadline:
            time.sleep(0.05)
        for each in left:
            self.counts["orphans"] += 1
            self.faults.append(f"orphan after {struck}: {each}")
            each.kill()

    def _finish(self, case: Case, folder: Path, *, run: bool) -> None:
        self.counts["compared"] += 1
        told = None
        if run and not case.is_done(folder):
            status, *_ = self.run(case, folder)
            told = self.folder / f"told-{self._number}.txt"
            if status != 0:
                return self._fault(f"{folder} can't be finished, status {status}", told)
        differences = case.differences(folder)
        self.counts["equal"] += not differences
        for each in differences:
            self._fault(f"{folder} differs: {each}", told)
        return None

    def reached(self, aim: Aim) -> bool:
        """Whether the last command was struck at its aim."""
        return len(self._changes()) >= aim.number > 0

    def _changes(self) -> list[str]:
        """What the aim of the last command has counted."""
        record = self.folder / f"changes-{self._number}.txt"
        return record.read_text().splitlines() if record.exists() else []

    def _log(self, line: str) -> None:
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"{line}\n")

    def _fault(self, what: str, told: Path | None) -> None:
        text = told.read_text()[-1500:] if told else ""
        self.faults.append(f"{what}\n{text}".strip())


def _session(leader: int) -> Iterator[psutil.Process]:
    """The processes of a session that have not ended."""
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(pid) == leader and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                yield process
