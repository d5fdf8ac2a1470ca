"""What commands print is whole, whatever the width of the terminal, and without one: no text is broken or cut."""

import io
import re

import pytest
from rich.box import SIMPLE_HEAD
from rich.table import Table

from shadowlit.progress import make_console, make_table

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


@pytest.mark.parametrize("columns", [12, 45, 66, 80, 120])
@pytest.mark.parametrize("style", [{}, {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}])
def test_a_table_never_breaks_a_number(monkeypatch, columns, style):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", Terminal())
    console = make_console()
    table = make_table("kind", "number of tensors", "rms", "share of zeros", title="delta", **style)
    table.add_column("", overflow="fold")
    rows = [[f"experts.gate_up_proj{i}", f"{i}234", f"{i}.23e-05", f"{i}2.3%", "████████"] for i in range(1, 4)]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = shown(console)
    assert all(any(cell in line for line in lines) for row in rows for cell in row[1:])
    is_list = "kind: experts.gate_up_proj1" in lines
    assert is_list == (columns <= (66 if style else 80)) and (is_list or max(map(len, lines)) <= columns)
    assert not is_list or lines[1:6] == [
        "kind: experts.gate_up_proj1", "  number of tensors: 1234", "  rms: 1.23e-05", "  share of zeros: 12.3%",
        "  ████████",
    ]  # fmt: skip
