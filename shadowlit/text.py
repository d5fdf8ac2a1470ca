"""Numbers and lines as people read them: three to four digits, units, and no word broken at a terminal's edge."""

from __future__ import annotations

import math
import os
import textwrap
from typing import IO


def number(value: float, signed: bool = False, digits: int = 4) -> str:
    """A number with four digits, ``0.4120`` or ``1,234``, and with its sign if asked for."""
    sign, value = "+" if signed else "", value + 0.0  # never -0.000
    if 1000 <= abs(value) < 100_000:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}#.{digits}g}".rstrip(".")


def count(value: float) -> str:
    """A large number with three to four digits: ``987``, ``4,120``, ``12.3k``, ``1.25M``."""
    for power, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 10 * 1e3 and value >= 0.9995 * power:
            return f"{value / power:#.3g}".rstrip(".") + unit
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A time as ``0:07``, ``12:05`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(num_bytes: float) -> str:
    """A number of bytes with three digits, ``39.1 MB``."""
    if math.isnan(num_bytes):
        return "not known"
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, power = next(((u, p) for u, p in units if num_bytes >= 0.9995 * p), ("bytes", 1.0))
    return f"{number(num_bytes / power, digits=3) if power > 1 else round(num_bytes)} {unit}"


def fitted(text: str, stream: IO[str], taken: int = 0) -> str:
    """Break lines between words where a terminal would break them within one; elsewhere nothing is changed.

    What can't be broken stays whole, so that it can be copied: a word that is longer than a line, such as a path, and
    a line of code, which begins with four spaces.

    Args:
        text: What will be written.
        stream: Where it will be written.
        taken: Number of characters that the first line already has.
    """
    if not stream.isatty():
        return text
    try:
        columns = os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal after all
        return text
    lines = text.split("\n")
    return "\n".join(_broken(line, columns, taken * (i == 0)) for i, line in enumerate(lines))


def _broken(line: str, columns: int, taken: int) -> str:
    if len(line) + taken <= columns or line.startswith("    "):
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    lines = textwrap.wrap(
        "x" * taken + line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)[taken:]


def is_number(word: str) -> bool:
    """Return whether Python reads a text as a number, ``nan`` and ``inf`` included."""
    try:
        float(word)
    except ValueError:
        return False
    return True
