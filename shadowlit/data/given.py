"""A source of rows as a user writes it, before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """A source of rows, and how it is read.

    Args:
        path: File, folder or hub data set.
        format: Format of this source; null for ``data.format``.
        columns: Names of its columns; null for ``data.columns``.
        ignore_columns: Columns that are deliberately left out; null for ``data.ignore_columns``.
        weight: Share of this source in the training data, relative to the weights of the others. null takes all rows
            of all sources.
        max_rows: Number of rows that are read, from the beginning of the source; null for all.
    """

    path: str
    format: str | None = None
    columns: dict[str, str] | None = None
    ignore_columns: list[str] | None = None
    weight: float | None = None
    max_rows: int | None = None

    def __str__(self) -> str:
        """The path, as the user wrote it."""
        return self.path


Given = str | dict[str, Any] | Source
"""A source as a user writes it: its path, or a mapping of the fields of :class:`Source`."""


def values_of(given: Given) -> dict[str, Any]:
    """Return the fields of a source that the user gave; a path alone is the field ``path``."""
    if isinstance(given, str | os.PathLike):
        given = {"path": given}
    values = dict(given) if isinstance(given, Mapping) else vars(given).copy()
    if isinstance(values.get("path"), os.PathLike):
        values["path"] = os.fspath(values["path"])
    return values


def path_in(given: Given) -> str:
    """Return the path of a source, as the user wrote it; empty if it has none."""
    return str(values_of(given).get("path", ""))


def place_of(given: Given) -> str:
    """Return where the rows of a source are, for comparisons only: names of hub data sets become paths too."""
    return str(Path(path_in(given)).expanduser().resolve())
