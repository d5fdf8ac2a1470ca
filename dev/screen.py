"""Run a command in a terminal of 80 columns, and save what its screen shows at the end as SVG.

Usage: python dev/screen.py OUT.svg LINES python -m shadowlit demo
       python dev/screen.py OUT.svg LINES - < TEXT
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(out: str, count: str, *command: str) -> None:
    """Record the command, without the name of the interpreter, and draw its last lines."""
    if command == ("-",):
        title, lines = "shadowlit", sys.stdin.read().splitlines()
    else:
        from tests.terminal import record

        title, lines = " ".join(command).removeprefix("python -m "), record(command[1:], 80).lines
    console = Console(record=True, width=80, file=io.StringIO())
    for line in lines[-int(count) :]:
        console.print(Text(line), soft_wrap=True)
    drawn = console.export_svg(title=title, unique_id="screen")
    # Without the font that would be fetched from another server.
    Path(out).write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
