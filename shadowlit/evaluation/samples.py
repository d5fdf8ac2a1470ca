"""Answers of several models to the same prompts, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ORDER = ("instruct", "grafted", "tuned", "base")

Samples = Sequence[Mapping[str, Any]]


def side_by_side(found: Mapping[tuple[str, str], Samples], root: Path, evaluators: Iterable[str], num_rows: int) -> str:
    """Prompts, references and answers of ``num_rows`` rows of each evaluator as Markdown; empty without answers.

    ``found`` has samples by subject and evaluator in the order of the rows; those of the untouched models are in
    ``<root>/<subject>/<evaluator>.jsonl``.
    """
    parts = []
    for name in evaluators:
        subjects = {who: found[who, name] for who in _ORDER if (who, name) in found}
        for who in ("instruct", "base"):
            if who not in subjects and (rows := read_samples(root / who / f"{name}.jsonl")):
                subjects[who] = rows
        answers = {who: {row["index"]: row for row in rows} for who, rows in subjects.items()}
        shown = [row for row in next(iter(subjects.values()), ()) if "answer" in row][:num_rows]
        parts += [_row(name, row, {who: answers[who] for who in _ORDER if who in answers}) for row in shown]
    return "\n".join(parts)


def read_samples(file: Path) -> Samples:
    """Return the samples of a model that were written before, one object a line; none without their file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _row(name: str, row: Mapping[str, Any], answers: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    lines = [
        f"## {name}, row {row['index']}",
        "",
        _quoted(row["prompt"]),
        "",
        f"reference: {row.get('reference')!r}",
        "",
    ]
    for who, rows in answers.items():
        if row["index"] in rows:
            own = rows[row["index"]]
            lines.append(f"- {who} ({own['score']:g}): {own['answer']!r}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())


def log_text(loggers: Iterable[Any], key: str, text: str, step: int) -> None:
    """Give a text to the loggers that take one: TensorBoard's and Weights & Biases'."""
    for logger in loggers:
        if hasattr(logger, "log_text"):
            logger.log_text(key=key, columns=["text"], data=[[text]], step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_text"):
            logger.experiment.add_text(key, text, step)
