"""Small tables and texts that a notebook shows, and a terminal prints."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows under the headings ``columns``; numbers are shown with four digits, NaN and None as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""

    def __str__(self) -> str:
        """As Markdown."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.columns, *map(_texts, self.rows))]
        lines.insert(1, "|" + "---|" * len(self.columns))
        return "\n".join([f"{self.caption}\n"] * bool(self.caption) + lines)

    def _repr_html_(self) -> str:
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        body = "".join(f"<tr>{_cells('td', _texts(row))}</tr>" for row in self.rows)
        head = f"<thead><tr>{_cells('th', self.columns)}</tr></thead>"
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class Markdown:
    """A text in Markdown, which a notebook renders."""

    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.text


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _texts(row: Sequence[object]) -> list[str]:
    return [cell_text(value) for value in row]


def cell_text(value: object) -> str:
    """Return a number with four digits, a dash where it is missing, anything else as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
