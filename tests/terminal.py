"""Commands in a pseudo terminal, whose screen a terminal emulator (pyte) reads."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte")

ROWS = 30


def lines_of(screen):
    """Everything that was shown: lines that have scrolled away, and the screen without its empty end."""
    gone = ["".join(line[x].data for x in range(screen.columns)).rstrip() for line in screen.history.top]
    lines = gone + [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


@dataclass
class Session:
    """What a recorded command has shown.

    Attributes:
        status: Its exit status.
        lines: All lines at its end.
        snapshots: All lines after each piece of its output.
    """

    status: int
    lines: list[str]
    snapshots: list[list[str]] = field(default_factory=list)


def record(command, columns, resize=(), cwd=None, **environment):
    """Run a command in a terminal; ``resize`` are pairs of a text and the columns to take when it has been shown."""
    parent, child = pty.openpty()

    def size(columns):
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))

    size(columns)
    screen = pyte.HistoryScreen(columns, ROWS, history=5000, ratio=0.5)
    stream, waiting, snapshots = pyte.ByteStream(screen), list(resize), []
    path = {"PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm-256color"}
    own = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | path | environment
    process = subprocess.Popen(
        [sys.executable, *command], stdin=child, stdout=child, stderr=child, cwd=cwd, env=own, start_new_session=True
    )
    os.close(child) if not waiting else None
    seen = b""
    with contextlib.suppress(OSError):  # Linux ends the output of a terminal with an error
        while data := os.read(parent, 65536):
            stream.feed(data)
            seen += data
            snapshots.append(lines_of(screen))
            if waiting and waiting[0][0].encode() in seen:
                _, columns = waiting.pop(0)
                size(columns)
                screen.resize(ROWS, columns)
                if not waiting:
                    os.close(child)
    os.close(parent)
    return Session(process.wait(), lines_of(screen), snapshots)
