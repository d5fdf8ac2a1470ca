"""What the arms of a comparison are scored by: the rows of evaluators, and metrics of the last validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from shadowlit.errors import DataError
from shadowlit.studies.arms import without_subject
from shadowlit.studies.rows import Row

_WEIGHTS = {"loss": "num_tokens", "accuracy": "num_tokens", "first_token_loss": "num_answers", "sequence_accuracy": ""}
"""Metrics that are means over rows, and the sample of a row that is its weight; empty for 1."""
_LOWER: dict[str, Literal["nats", "number"]] = {"loss": "nats", "first_token_loss": "nats", "perplexity": "number"}
_FORGETTING = ("kl", "agreement", "routing_agreement", "routing_top1_changed")
_WORDS = {"higher": True, "lower": False}


@dataclass(frozen=True)
class Measure:
    """How a score is read: whether a higher one is better, and its unit. A share, 0 to 1, is written in per cent."""

    higher: bool = True
    unit: Literal["share", "nats", "number"] = "share"

    @property
    def sign(self) -> int:
        """1 if a higher score is better, else -1."""
        return 1 if self.higher else -1


SHARE = Measure()


def read_measures(option: str, given: Sequence[str]) -> dict[str, Measure]:
    """Return the metrics that an option names, e.g. ``report/loss`` or ``reward_margin:higher``, and how each is read.

    A subject in front, as in ``val/grafted/loss``, is dropped: each arm is measured at its own model.

    Raises:
        DataError: A metric is named twice, its direction is unknown, or it measures what is forgotten.
    """
    found: dict[str, Measure] = {}
    for text in given:
        name, _, word = text.partition(":")
        name = without_subject(name)
        what = name.rpartition("/")[2]
        if what in _FORGETTING:
            raise DataError(
                f"--{option} names {name}, which measures how much of the Instruct is forgotten, and not what is "
                "learned. Leave it out: the report shows it next to the scores."
            )
        if word not in ("", *_WORDS):
            raise DataError(f"--{option} is {text!r}; expected {name}:higher or {name}:lower.")
        if name in found:
            raise DataError(f"--{option} names {name} twice. Name it once.")
        is_share = "accuracy" in what or what in ("score", "exact")
        if not word and not is_share and what not in _LOWER:
            raise DataError(
                f"--{option} names {name}, of which it isn't known whether higher is better. Write {name}:higher or "
                f"{name}:lower."
            )
        unit = "share" if is_share else _LOWER.get(what, "number")
        found[name] = Measure(_WORDS.get(word, is_share), unit)
    return found


def set_of(metric: str) -> str:
    """Return the validation set of a metric, ``report`` of ``report/loss``; empty for all sets together."""
    return metric.rpartition("/")[0]


@dataclass(frozen=True)
class Scoring:
    """What the arms are scored by, and what chooses their rates.

    Attributes:
        gain: Evaluators and metrics of what is to be learned.
        keep: Evaluators of what is to be kept.
        metrics: How the metrics among them are read; everything else is an evaluator.
        choose: Metrics whose mean chooses the rates; empty for the scores themselves: evaluators on one half of their
            rows, metrics on the rows that are reported.
        forgetting: Evaluators that measure the agreement with the Instruct, which chooses no rate.
        halves: Indices of each evaluator's samples, for the selection and to be reported.
    """

    gain: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    metrics: Mapping[str, Measure] = field(default_factory=dict)
    choose: Mapping[str, Measure] = field(default_factory=dict)
    forgetting: frozenset[str] = frozenset()
    halves: Mapping[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All scores."""
        return self.gain + self.keep

    @property
    def evaluators(self) -> tuple[str, ...]:
        """The evaluators among the scores."""
        return tuple(name for name in self.names if name not in self.metrics)

    def measure(self, name: str) -> Measure:
        """Return how a score is read."""
        return self.metrics.get(name, SHARE)

    @property
    def whole(self) -> Measure:
        """How the mean is read: as the first score is."""
        return self.measure(self.mean[0]) if self.mean else SHARE

    @property
    def mean(self) -> tuple[str, ...]:
        """The scores that are averaged: those that are read as the first one, and no agreement with the Instruct."""
        able = [name for name in self.names if name not in self.forgetting]
        return tuple(name for name in able if self.measure(name) == self.measure(able[0]))

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The scores that each kind of score is a mean of: ``<name>/score``, ``mean``, ``gain`` and ``keep``."""
        groups = {f"{name}/score": (name,) for name in self.names}
        means = {"mean": self.mean}
        for what, names in (("gain", self.gain), ("keep", self.keep)):
            means[what] = tuple(name for name in names if self.measure(name) == self.measure(names[0]))
        return groups | {what: names for what, names in means.items() if names}

    def measure_of(self, group: str) -> Measure:
        """Return how a kind of score is read, of those of :attr:`groups`."""
        return self.measure(self.groups[group][0]) if group in self.groups else SHARE

    @property
    def choice(self) -> Measure:
        """How the score that chooses the rates is read."""
        return next(iter(self.choose.values()), self.whole)

    @property
    def sharing(self) -> tuple[str, ...]:
        """The reported scores whose rows have a say in the choice too."""
        choosing = [set_of(name) for name in (self.choose or [n for n in self.mean if n in self.metrics])]
        metrics = tuple(n for n in self.metrics if any(of == set_of(n) or "" in (of, set_of(n)) for of in choosing))
        return metrics + tuple(name for name in self.evaluators if name in choosing)

    def value(self, row: Row, name: str, half: Literal["selection", "reported"]) -> float:
        """Return a row's score; an evaluator's is the mean over one half, NaN if a sample lacks its score."""
        if name in self.metrics:
            return row.metrics.get(name, math.nan)
        found = scores_of(row, name, self.halves[name][half == "reported"])
        return math.nan if found is None else float(found.mean())

    def rows(self, row: Row, name: str, num_rows: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the scores and weights ``[N]`` of the reported samples; None where the run has none that the score is
        made of.

        Args:
            row: Row of the comparison.
            name: Name of the score.
            num_rows: Number of samples that a metric's set has.
        """
        if name not in self.metrics:
            scores = scores_of(row, name, self.halves[name][1])
            return None if scores is None else (scores, np.ones(len(scores)))
        scores = scores_of(row, name, range(num_rows))
        if scores is None or len(row.samples[name]) != num_rows:
            return None
        weights: np.ndarray | None = np.ones(num_rows)
        if weight := _WEIGHTS[name.rpartition("/")[2]]:
            weights = scores_of(row, _in_set(set_of(name), weight), range(num_rows))
        if weights is None:
            return None
        mean = float((scores * weights).sum() / weights.sum())
        logged = row.metrics.get(name, math.nan)
        return (scores, weights) if math.isclose(mean, logged, rel_tol=1e-5, abs_tol=1e-7) else None


def scores_of(row: Row, name: str, indices: Sequence[int]) -> np.ndarray | None:
    """``[N]`` scores of the samples; None if one of them is missing or not finite, or if there are none."""
    found = np.array([row.samples.get(name, {}).get(index, math.nan) for index in indices], dtype=np.float64)
    return found if len(found) and np.isfinite(found).all() else None


def samples_of_sets(
    sets: Mapping[str, Sequence[Sequence[float]]], wanted: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Return the score of each row for the wanted metrics, and its weight, from one subject's part of ``rows.json``.

    A metric is the mean of its rows' scores, weighted by their ``num_tokens`` or ``num_answers``. Metrics that are made
    of something else have no rows.
    """
    found: dict[str, dict[int, float]] = {}
    for metric in wanted:
        of, what = set_of(metric), metric.rpartition("/")[2]
        rows = [row for row in sets.get(of, []) if row[1] > 0]
        if not rows or what not in _WEIGHTS:
            continue
        values = {
            "loss": [loss / tokens for loss, tokens, *_ in rows],
            "accuracy": [correct / tokens for _, tokens, correct, *_ in rows],
            "sequence_accuracy": [float(correct == tokens) for _, tokens, correct, *_ in rows],
            "first_token_loss": [first / answers for *_, first, answers in rows],
        }
        weights = {"num_tokens": [row[1] for row in rows], "num_answers": [row[4] for row in rows]}
        found[metric] = dict(enumerate(values[what]))
        if weight := _WEIGHTS[what]:
            found[_in_set(of, weight)] = dict(enumerate(weights[weight]))
    return found


def _in_set(name: str, what: str) -> str:
    return f"{name}/{what}" if name else what
