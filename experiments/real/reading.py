"""Reads the study's result files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from shadowlit.errors import DataError, first_line

_Out = TypeVar("_Out")


def read_result(file: Path, convert: Callable[[Any], _Out]) -> _Out:
    """Return what ``convert`` makes of a file of JSON.

    Raises:
        DataError: The file is damaged: it is no JSON, or ``convert`` misses something in it.
    """
    try:
        return convert(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is damaged ({first_line(error)}). Restore it, or remove it: the study "
            "measures again what is missing."
        ) from error
