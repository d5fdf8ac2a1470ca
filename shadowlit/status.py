"""A status line: the last line of a terminal, redrawn in place; without a terminal, a line at intervals."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

_ERASE = "\r\x1b[2K"
_REDRAW_S = 0.2
_WIDEST = 79  # a longer line would be broken, and leave a part behind, when a terminal is made narrower
EVERY_S = 30.0
"""Seconds between two lines where there is no terminal."""


class StatusLine:
    """Shows what is happening in one line.

    On a terminal the line is redrawn in place. It has at most 79 characters, and fewer where the terminal is narrower,
    so that no resize from 80 columns on leaves copies of it. Whatever is written meanwhile to stdout, stderr or by a
    logger appears above it. Without a terminal, ``log`` is called with a line every ``every_s`` seconds.

    Args:
        log: Writes a line where stderr is not a terminal.
        every_s: Seconds between two such lines.
    """

    def __init__(self, log: Callable[[str], None], every_s: float = EVERY_S) -> None:
        self.live = False
        self._log, self._every_s = log, every_s
        self._due = 0.0
        self._text = ""
        self._drawn = self._open = False  # whether the line is on the screen; whether another's line has not ended
        self._lock = threading.RLock()
        self._out: TextIO = sys.stderr
        self._undo = contextlib.ExitStack()

    def start(self) -> None:
        """Reserve the last line of the terminal, if there is one, until :meth:`stop`."""
        if self.live:
            return
        self._due = time.monotonic() + (0.0 if is_terminal(sys.stderr) else self._every_s)
        if is_terminal(sys.stderr):
            self.live, self._out = True, sys.stderr
            self._undo.enter_context(self._above("stdout"))
            self._undo.enter_context(self._above("stderr"))

    def stop(self) -> None:
        """Erase the line; harmless if it was stopped before."""
        if self.live:
            self._erase()
            self.live, self._text = False, ""
            self._undo.close()

    def is_due(self) -> bool:
        """Whether :meth:`show` would show anything now."""
        return time.monotonic() >= self._due

    def show(self, parts: Callable[[], Sequence[str]], now: bool = False) -> None:
        """Show the line if it is due, or ``now``.

        Args:
            parts: Function that returns the parts of the line, the most important first; parts that don't fit are
                left out.
            now: Show it even if it is not due.
        """
        if not (now or self.is_due()):
            return
        self._due = time.monotonic() + (_REDRAW_S if self.live else self._every_s)
        if not self.live:
            self._log(", ".join(parts()))
            return
        with self._lock:
            self._text = _fitted(parts(), min((os.get_terminal_size(self._out.fileno()).columns or 80) - 1, _WIDEST))
            self._draw()

    def _draw(self) -> None:
        if not self._open and self._text:
            self._out.write(_ERASE + self._text)
            self._out.flush()
            self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            self._out.write(_ERASE)
            self._out.flush()
            self._drawn = False

    def write_above(self, stream: TextIO, text: str) -> int:
        """Write other output, and redraw the line below it."""
        with self._lock:
            if not self.live or not text:
                return stream.write(text)
            self._erase()
            written = stream.write(text)
            stream.flush()
            self._open = not text.endswith("\n")
            self._draw()
            return written

    @contextlib.contextmanager
    def _above(self, name: str) -> Iterator[None]:
        """Let what is written to sys.stdout or sys.stderr, and by loggers, appear above the line."""
        stream = getattr(sys, name)
        if not is_terminal(stream):
            yield
            return
        above: Any = _Above(stream, self)
        handlers = [each for each in _handlers() if getattr(each, "stream", None) is stream]
        setattr(sys, name, above)
        for handler in handlers:
            handler.setStream(above)
        try:
            yield
        finally:
            if getattr(sys, name) is above:
                setattr(sys, name, stream)
            for handler in _handlers():
                if getattr(handler, "stream", None) is above:
                    handler.setStream(stream)


class _Above:
    """A stream whose text appears above a status line."""

    def __init__(self, stream: TextIO, line: StatusLine) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        return self._line.write_above(self._stream, text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal whose cursor can be moved."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def _handlers() -> list[Any]:
    """The handlers of all loggers that write to a stream."""
    loggers = [logging.root, *(each for each in logging.root.manager.loggerDict.values())]
    found = {id(h): h for logger in loggers for h in getattr(logger, "handlers", ())}
    return [handler for handler in found.values() if isinstance(handler, logging.StreamHandler)]


def _fitted(parts: Sequence[str], width: int) -> str:
    """The parts that the width holds, the more important ones first; the first is cut if even it is too long."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        text = longer if len(longer) <= width else text
    return text or parts[0][: max(0, width - 1)] + "…"
