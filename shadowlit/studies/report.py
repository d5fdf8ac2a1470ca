"""What the reports of all studies have in common: their files, tables in Markdown, and how means are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from shadowlit.files import replace_text
from shadowlit.plotting import save_figure
from shadowlit.studies.rows import TABLE, Row, to_csv
from shadowlit.studies.statistics import Average

REPORT = "REPORT.md"
NONE = "–"


def write_files(
    folder: Path, text: str, rows: Sequence[Row], axes: Sequence[str], figures: Mapping[str, Figure | None]
) -> Path:
    """Write ``table.csv`` with a column per axis, the figures as PNG and PDF by their stems, and at last ``REPORT.md``.

    A figure that is None has nothing to show, and files of an earlier one are removed. Each file is written atomically;
    the path of ``REPORT.md`` is returned.
    """
    replace_text(folder / TABLE, to_csv(rows, axes))
    for stem, figure in figures.items():
        if figure is None:
            for ending in ("png", "pdf"):
                (folder / f"{stem}.{ending}").unlink(missing_ok=True)
        else:
            save_figure(figure, folder / stem)
    return replace_text(folder / REPORT, text)


def paragraphs(parts: Sequence[str]) -> str:
    """Blocks of Markdown with an empty line between them; empty ones are left out."""
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown; None is an empty cell."""
    cells = [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])


def bullets(lines: Sequence[str]) -> str:
    """Return a list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def mean_text(found: Average, form: Callable[[float], str], form_of_error: Callable[[float], str] | None = None) -> str:
    """``mean ± standard error``, with ``(2 of 3)`` if some are missing; a dash where no value was expected.

    The standard error is written as the mean is, unless it has a form of its own.
    """
    if not found.count:
        return "missing" if found.expected else NONE
    error = f" ± {(form_of_error or form)(found.standard_error)}" if math.isfinite(found.standard_error) else ""
    short = f" ({found.count} of {found.expected})" if found.count < found.expected else ""
    return f"{form(found.mean)}{error}{short}"
