"""From the folders of finished trainings to rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowlit.analysis.similarity import compare, in_one_layout
from shadowlit.checkpoint.names import in_totals
from shadowlit.delta.delta import Delta
from shadowlit.grafting.update import FullUpdate
from shadowlit.pair.buffers import open_model
from shadowlit.pair.pair import ModelPair
from shadowlit.studies.arms import UNTOUCHED, is_grafted, metrics_of, subject_of
from shadowlit.studies.comparison.plan import Training, rates_of_arms
from shadowlit.studies.comparison.scoring import samples_of_sets
from shadowlit.studies.rows import UNTOUCHED_TRIAL, Row
from shadowlit.studies.trials.process import is_finished, read_result
from shadowlit.studies.trials.recipe import Recipe
from shadowlit.studies.trials.trial import ROWS


def collect(
    recipe: Recipe,
    trainings: Sequence[Training],
    arms: Sequence[str],
    rates: Mapping[str, Sequence[float]],
    folder: Path,
    line: str = "loss",
    score: Sequence[str] = (),
) -> list[Row]:
    """Collect a row for each arm of each finished training, at each scale, and those of the untouched models.

    ``line`` is the metric whose values along the line from the target to the graft are kept: loss, or <set>/loss. The
    rows of the validation that the metrics ``score`` are made of become samples.
    """
    home = folder / UNTOUCHED_TRIAL
    logged = read_result(home)["metrics"]
    found = [
        Row(
            arm,
            metrics=metrics_of(logged, arm.lower()),
            samples=_samples(home / "evaluation" / arm.lower()) | _rows_of_sets(home, arm.lower(), score),
        )
        for arm in UNTOUCHED
    ]
    own = rates_of_arms(arms, rates)
    finished = {t: folder / t.name for t in trainings if is_finished(folder / t.name)}
    facts = _Facts(recipe, own, finished)
    starts = {row.arm[0]: row.metrics.get(line, math.nan) for row in found}
    for training, home in finished.items():
        result = read_result(home)
        evaluated = home / "evaluation" / f"step-{result['step']}"
        for arm in sorted(own, key=is_grafted):
            if arm[0] != training.source or training.lr not in own[arm]:
                continue
            scales = recipe.scales if is_grafted(arm) else (None,)
            known = facts.of(training, result) if is_grafted(arm) else {}
            subjects = {scale: subject_of(arm, scale, recipe.scales) for scale in scales}
            metrics = {scale: metrics_of(result["metrics"], subject) for scale, subject in subjects.items()}
            losses = {0.0: starts[arm[-1]]}
            losses |= {scale: metrics[scale].get(line, math.nan) for scale in scales if scale is not None}
            for scale, subject in subjects.items():
                row = training.row(
                    arm,
                    scale,
                    metrics=metrics[scale],
                    samples=_samples(evaluated / subject) | _rows_of_sets(home, subject, score),
                    cost=_cost(result),
                    facts=known,
                    line=dict(sorted(losses.items())) if scale == recipe.scales[0] else {},
                )
                found.append(row)
    return found


def _samples(home: Path) -> dict[str, dict[int, float]]:
    found = {}
    for file in sorted(home.glob("*.jsonl")):
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found[file.stem] = {row["index"]: float(row["score"]) for row in rows}
    return found


def _rows_of_sets(home: Path, subject: str, metrics: Sequence[str]) -> dict[str, dict[int, float]]:
    """The validation's rows that metrics are made of; none of trainings by earlier versions, which kept none."""
    file = home / ROWS
    if not metrics or not file.is_file():
        return {}
    return samples_of_sets(json.loads(file.read_text(encoding="utf-8")).get(subject, {}), metrics)


def _cost(result: Mapping[str, Any]) -> dict[str, float]:
    """What the training cost without its evaluation, and what the evaluation cost."""
    logged = result["metrics"]
    evaluation_s = sum(logged.get(name, 0.0) for name in ("graft/seconds", "evaluation/seconds"))
    train_s = max(0.0, result["wall_s"] - evaluation_s)
    return {
        "train_s": train_s,
        "evaluation_s": evaluation_s,
        "tokens_per_s": result["train_tokens"] / train_s if train_s else math.nan,
        "peak_memory_bytes": float(result["peak_memory_bytes"]),
        "trained_parameters": float(result["trained_parameters"]),
    }


class _Facts:
    """Facts about a pair and its updates, computed once."""

    def __init__(
        self, recipe: Recipe, rates: Mapping[str, tuple[float, ...]], finished: Mapping[Training, Path]
    ) -> None:
        self._finished = finished
        self._rates = {
            source: sorted({rate for arm, own in rates.items() if arm[0] == source for rate in own}) for source in "BI"
        }
        pair = ModelPair(**recipe.pair())
        folders = pair.base_folder(), pair.instruct_folder()
        self._base, self._instruct = (open_model(folder).learned() for folder in folders)
        shared = self._base.tensors.keys() & self._instruct.tensors.keys()
        self._comparable = all(self._base.tensors[n].shape == self._instruct.tensors[n].shape for n in shared)
        self._sigma = compare(in_one_layout([self._base, self._instruct])).similarities[0].sigma
        self._offset: float | None = None
        self._cosines: dict[frozenset[Training], float] = {}

    def of(self, training: Training, result: Mapping[str, Any]) -> dict[str, float]:
        """The facts of a training's graft."""
        logged = result["metrics"]
        delta = Delta.open(self._finished[training] / "delta")
        facts = {"sigma": self._sigma, "delta_norm": delta.norm()}
        for name in ("relative_delta", "survival"):
            facts[name] = logged.get(f"graft/{name}", math.nan)
        total = in_totals(delta.shapes)  # an Instruct's norms may have moved further than all of its matrices
        if self._offset is None and self._comparable:
            offset = Delta.from_update(FullUpdate(self._base, self._instruct))
            self._offset = offset.only(total).norm()
        if self._offset:
            facts["delta_over_offset"] = delta.only(total).norm() / self._offset
        other = self._other(training)
        if other is not None:
            pair = frozenset((training, other))
            if pair not in self._cosines:  # asked for from both of its sides
                self._cosines[pair] = delta.cosine(Delta.open(self._finished[other] / "delta"))
            facts["cos_deltas"] = self._cosines[pair]
        return facts

    def _other(self, training: Training) -> Training | None:
        """The training of the other model with the same seed, at the rate of the same rank in its list."""
        target = "I" if training.source == "B" else "B"
        rank, others = self._rates[training.source].index(training.lr), self._rates[target]
        if rank >= len(others):
            return None
        other = Training(target, others[rank], training.seed)
        return other if other in self._finished else None
