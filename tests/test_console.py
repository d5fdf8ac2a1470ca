"""What commands print is whole, whatever the width of the terminal, and without one: no text is broken or cut."""

import io
import re

import pytest
from rich.table import Table

from shadowlit.progress import make_console

LONG = "/a/folder/" + "of-many-names/" * 20 + "[bold]x"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(console):
    return re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()


@pytest.mark.parametrize("columns", [40, 100])
@pytest.mark.parametrize("output", [io.StringIO, Terminal])
def test_texts_and_titles_are_not_broken_nor_numbers_cut(monkeypatch, output, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", output())
    console = make_console()
    console.print(f"out: {LONG} is complete")
    table = Table(title=f"{LONG}: norm 0.1327")
    for name in "abcdefg":
        table.add_column(name, overflow="fold")
    table.add_row(*["1.234e-05"] * 7)
    console.print(table)
    first, title, *rows = shown(console)
    assert first == f"out: {LONG} is complete" and title.strip() == f"{LONG}: norm 0.1327"
    natural = 7 * (9 + 3) + 1
    assert max(map(len, rows)) == (40 if output is Terminal and columns == 40 else natural)
    cells = [
        "".join(cell.strip() for cell in column)
        for column in zip(*(row.split("│")[1:-1] for row in rows[3:-1]), strict=True)
    ]
    assert cells == ["1.234e-05"] * 7
