"""What a comparison is made of: one record for each arm of each finished training, at each scale."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shadowlit.errors import DataError
from shadowlit.files import replace_text

UNTOUCHED = ("Base", "Instruct")
"""The two reference points."""
TUNED = ("B2B", "B2I", "I2B", "I2I")
"""The arms, named by the source of the delta and the target of the graft."""
ARMS = UNTOUCHED + TUNED


@dataclass(frozen=True)
class Record:
    """One arm of one finished training, at one scale.

    A number that is missing or not finite counts as not measured.

    Attributes:
        arm: One of ``ARMS``. ``Base`` and ``Instruct`` are the untouched models, which have no rate, seed or scale.
        lr: Learning rate of the training that the delta is from.
        seed: Its seed.
        scale: λ of the graft; 1.0 for the tuned models themselves.
        metrics: ``<evaluator>/<metric>`` or ``<metric>``: ``new/score``, ``forgetting/kl``, ``loss``, ``old/loss``.
        samples: Of each evaluator that has them, the score of every row by the row's index in its file. Scores lie
            between 0 and 1.
        cost: ``train_s``, ``evaluation_s``, ``tokens_per_s``, ``peak_memory_bytes``, ``trained_parameters``.
        facts: ``sigma`` of the pair; ``cos_deltas``, the cosine of the updates of Base and Instruct at the same rate
            (by rank in the list) and seed; ``delta_norm``; ``relative_delta``, to the Instruct's norm;
            ``delta_over_offset``; ``survival`` in the exported dtype.
        line: Validation loss (nats per token) by scale, on the line from Instruct to grafted; may be empty.
    """

    arm: str
    lr: float | None = None
    seed: int | None = None
    scale: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, dict[int, float]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    line: dict[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise DataError(f"a record is of the arm {self.arm!r}; expected one of {', '.join(ARMS)}.")
        missing = [name for name in ("lr", "seed", "scale") if getattr(self, name) is None]
        if self.arm in TUNED and missing:
            told = " or ".join(missing)
            raise DataError(f"a record of the arm {self.arm} has no {told}; only Base and Instruct may lack it.")


def to_json(records: Sequence[Record]) -> str:
    """Records as JSON; a number that is not finite becomes null."""
    return json.dumps([_finite(asdict(record)) for record in records], allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> list[Record]:
    """Records from :func:`to_json`; null among the numbers becomes NaN.

    Raises:
        DataError: It isn't a list of records.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"the records are no JSON: {error}. Expected what a comparison has written.") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError("the records are no list of objects. Expected what a comparison has written.")
    return [_record(one) for one in found]


def write_records(records: Sequence[Record], file: Path) -> None:
    """Write records as JSON, beside the file and then renamed to it."""
    replace_text(file, to_json(records))


def read_records(file: Path) -> list[Record]:
    """Read records from a file.

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


def _record(found: dict[str, Any]) -> Record:
    names = {each.name for each in fields(Record)}
    if "arm" not in found or not names >= found.keys():
        raise DataError(f"a record has the fields {', '.join(found) or 'none'}; expected {', '.join(sorted(names))}.")
    try:
        return Record(
            found["arm"],
            found.get("lr"),
            found.get("seed"),
            found.get("scale"),
            metrics=_numbers(found.get("metrics", {}), str),
            samples={name: _numbers(rows, int) for name, rows in found.get("samples", {}).items()},
            cost=_numbers(found.get("cost", {}), str),
            facts=_numbers(found.get("facts", {}), str),
            line=_numbers(found.get("line", {}), float),
        )
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"a record of {found['arm']} holds something that is no number: {error}.") from error


def _numbers(found: dict[str, Any], key: Callable[[str], Any]) -> dict[Any, float]:
    return {key(name): math.nan if value is None else float(value) for name, value in found.items()}
