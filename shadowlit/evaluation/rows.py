"""Reads, checks and picks the rows of an evaluation; every error names the file, the row and the remedy."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from shadowlit.data.conversation import collect
from shadowlit.data.sources import read_rows
from shadowlit.errors import DataError

Columns = Mapping[str, Any]
Item = TypeVar("Item")


def read_items(source: str, limit: int | None, convert: Callable[[int, Columns], Item]) -> list[Item]:
    """Read a source of rows, as for training, and convert ``limit`` rows, evenly spread over it; None for all.

    ``convert`` makes an item of a row's index and its columns; its DataErrors needn't say which row.

    Raises:
        DataError: The file can't be read or has no rows, or rows are refused; up to five are listed.
    """
    rows = read_rows(source, "validation")
    if not rows:
        raise DataError(f"{source} has no rows, so nothing can be evaluated. Give a file with at least one.")

    return collect(lambda row: convert(row.index, row.columns), spread(rows, limit))


def spread(rows: Sequence[Item], limit: int | None) -> list[Item]:
    """``limit`` rows, evenly spread, in order; all of them for None."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def read_field(columns: Columns, name: str) -> Any:
    """Field ``name``; a DataError where the row has none."""
    if name not in columns:
        found = ", ".join(f"'{name}'" for name in sorted(columns)) or "none"
        raise DataError(f"lacks the field '{name}'; it has {found}. Add it, or name the field that holds it.")
    return columns[name]


def read_text(columns: Columns, name: str) -> str:
    """Return the text in field ``name``; a DataError where it is missing, no text or empty."""
    value = read_field(columns, name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"has {_shown(value)} in '{name}'; expected a text, not an empty one. Correct or remove the row."
        )
    return value


def read_choices(columns: Columns, name: str) -> list[str]:
    """Return the choices in field ``name``; a DataError where it is missing or no list of at least two
    different texts.
    """
    choices = read_field(columns, name)
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(
            f"has {_shown(choices)} in '{name}'; expected a list of texts, none empty. Correct or remove the row."
        )
    if len(choices) < 2:
        raise DataError(f"has {len(choices)} in '{name}'; expected at least two choices. Add some or remove the row.")
    twice = sorted({choice for choice in choices if choices.count(choice) > 1})
    if twice:
        raise DataError(f"has {_shown(twice[0])} twice in '{name}'; expected different choices. Remove one.")
    return choices


def read_label(columns: Columns, name: str, choices: Sequence[str]) -> int:
    """Return the right choice, from 0: field ``name`` holds its number from 0, its text, or its letter from A.

    A text that is itself one of the choices is read as that choice, not as a letter. A DataError where the field is
    missing or names none of the choices.
    """
    value = read_field(columns, name)
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip() in letters:
        return letters.index(value.strip())
    raise DataError(
        f"has {_shown(value)} in '{name}', which is none of its {len(choices)} choices; expected a number from 0 to "
        f"{len(choices) - 1}, a letter from A to {letters[-1]}, or the text of a choice. Correct it."
    )


def fingerprint(name: str, *parts: Any) -> str:
    """``name-`` and a hash of ``parts``, whose ``repr`` says everything about them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return f"{name}-{digest.hexdigest()}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} ({type(value).__name__})"
