"""The rows of a comparison as a file: ``records.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowlit.errors import DataError
from shadowlit.studies.arms import ARMS, UNTOUCHED, is_grafted
from shadowlit.studies.comparison.plan import Training
from shadowlit.studies.rows import Row

_MEASURED: dict[str, Callable[[str], Any]] = {"metrics": str, "cost": str, "facts": str, "line": float}
_FIELDS = ("arm", "lr", "seed", "scale", "metrics", "samples", "cost", "facts", "line")


def to_json(rows: Sequence[Row]) -> str:
    """Return the rows as JSON; a number that is not finite becomes null. A tuned model has the scale 1."""
    found = []
    for row in rows:
        scale = 1.0 if row.scale is None and row.arm not in UNTOUCHED else row.scale
        measured = {name: _finite(getattr(row, name)) for name in _FIELDS[4:]}
        found.append({"arm": row.arm, "lr": row.lr, "seed": row.seed, "scale": scale, **measured})
    return json.dumps(found, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> list[Row]:
    """Return the rows from :func:`to_json`; null among the numbers becomes NaN.

    Raises:
        DataError: It isn't a list of records.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"the records are not JSON: {error}. Expected a file that a comparison has written.") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError("the records are not a list of objects. Expected a file that a comparison has written.")
    return [_row(one) for one in found]


def read_records(file: Path) -> list[Row]:
    """Read rows from a file.

    Raises:
        DataError: There is none, or it doesn't hold records.
    """
    if not file.is_file():
        raise DataError(f"there is no {file}. Expected the records of a comparison.")
    return from_json(file.read_text(encoding="utf-8"))


def _finite(value: Any) -> Any:
    """Numbers that aren't finite as None, keys as text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(found: Mapping[str, Any]) -> Row:
    if "arm" not in found or not found.keys() <= set(_FIELDS):
        raise DataError(f"a record has the fields {', '.join(found) or 'none'}; expected {', '.join(sorted(_FIELDS))}.")
    arm = found["arm"]
    if arm not in ARMS:
        raise DataError(f"a record is of the arm {arm!r}; expected one of {', '.join(ARMS)}.")
    missing = [name for name in ("lr", "seed", "scale") if found.get(name) is None]
    if missing and arm not in UNTOUCHED:
        names = " or ".join(missing)
        raise DataError(f"a record of the arm {arm} has no {names}; only Base and Instruct may lack it.")
    try:
        measured: dict[str, Any] = {name: _numbers(found.get(name, {}), key) for name, key in _MEASURED.items()}
        measured["samples"] = {name: _numbers(scores, int) for name, scores in found.get("samples", {}).items()}
        if arm in UNTOUCHED:
            return Row(arm, **measured)
        training = Training(arm[0], found["lr"], found["seed"])
        return training.row(arm, found["scale"] if is_grafted(arm) else None, **measured)
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"a record of {arm} holds something that is not a number: {error}.") from error


def _numbers(found: Mapping[str, Any], key: Callable[[str], Any]) -> dict[Any, float]:
    return {key(name): math.nan if value is None else float(value) for name, value in found.items()}
