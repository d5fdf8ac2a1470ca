"""Suites of benchmarks: which tasks of lm-evaluation-harness they are, and how scores become means and differences.

The suites are defined in ``suites.yaml`` next to this module. Imports neither torch nor the harness.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

# The harness rounds nothing; sums in another order differ by this much.
_SAME_MEAN = 1e-6


@dataclass(frozen=True)
class Score:
    """A number as the harness reports it (fractions of 1, not percent) and its standard error, if there is one."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {'–' if self.stderr is None else f'{self.stderr:.4f}'}"


@dataclass(frozen=True)
class SuiteTask:
    """A benchmark of a suite.

    Attributes:
        name: The paper's name; the harness' name for a task that was asked for by it.
        task: The harness' name; None where the harness has no such task.
        metric: Metric that is reported; None for the first one that the harness reports.
        filter: Filter of the answers that the metric is computed on.
        num_fewshot: Number of examples in the prompt; None for the task's own number.
        executes_code: Whether the model's answers are run as programs.
        based_on: Task of the harness of which this one is a variant.
        changes: Settings of the variant that differ.
        note: How the task may differ from the paper's.
    """

    name: str
    task: str | None
    metric: str | None = None
    filter: str = "none"
    num_fewshot: int | None = None
    higher_is_better: bool = True
    executes_code: bool = False
    based_on: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None

    @property
    def key(self) -> str | None:
        """The harness' name of the reported number; None for the first one."""
        return None if self.metric is None else f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class Suite:
    """Benchmarks whose plain mean is a score of its own.

    Attributes:
        title: The paper's name; None for tasks that were asked for by their own names, which have no mean.
        tasks: Benchmarks of the suite.
        max_new_tokens: Length of the longest answer, in tokens; None for each task's own limit.
        missing: The paper's names of benchmarks that the harness lacks.
    """

    title: str | None
    tasks: tuple[SuiteTask, ...]
    max_new_tokens: int | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskScore:
    """A model's score in a task.

    Attributes:
        name: Name in reports.
        task: The harness' name of the task.
        metric: The harness' name of the score, ``metric,filter``.
        num_fewshot: Number of examples in the prompt; None where subtasks differ.
        values: Number of every sample by its place in the data, by subtask. None where the task's score isn't the
            mean of its samples' numbers.
        weighted: Whether subtasks count by their size; otherwise all count equally.
    """

    name: str
    task: str
    metric: str
    score: Score
    higher_is_better: bool
    num_fewshot: int | None
    num_samples: int
    values: Mapping[str, Mapping[int, float]] | None = field(repr=False)
    weighted: bool = True


@dataclass(frozen=True)
class SuiteScore:
    """A model's scores in a suite."""

    title: str | None
    tasks: tuple[TaskScore, ...]
    missing: tuple[str, ...] = ()

    @property
    def mean(self) -> Score | None:
        """The plain mean over the tasks; None for fewer than two tasks, and for tasks that are not a suite."""
        return mean_of([task.score for task in self.tasks]) if self.title and len(self.tasks) > 1 else None


@cache
def load_suites() -> dict[str, tuple[Suite, ...]]:
    """Return all suites by name; a name such as ``paper`` stands for several."""
    entries = yaml.safe_load((files("shadowlit.harness") / "suites.yaml").read_text(encoding="utf-8"))
    single = {
        name: Suite(
            title=entry["title"],
            tasks=tuple(SuiteTask(**task) for task in entry["tasks"]),
            max_new_tokens=entry.get("max_new_tokens"),
        )
        for name, entry in entries.items()
        if isinstance(entry, dict)
    }
    return {
        name: (single[name],) if name in single else tuple(single[part] for part in entry)
        for name, entry in entries.items()
    }


def select_suites(names: Sequence[str]) -> list[Suite]:
    """Return the suites of these names, each once, and last a suite without a title of all names that no suite has."""
    known = load_suites()
    found = dict.fromkeys(suite.title for name in names for suite in known.get(name, ()))
    by_title = {suite.title: suite for suites in known.values() for suite in suites}
    within = {task.task for title in found for task in by_title[title].tasks}
    others = [name for name in dict.fromkeys(names) if name not in known and name not in within]
    suites = [by_title[title] for title in found]
    return [*suites, Suite(None, tuple(SuiteTask(name, name) for name in others))] if others else suites


def mean_of(scores: Sequence[Score]) -> Score:
    """Return the plain mean of independent scores, with the error ``sqrt(Σ se²) / k`` if all of them have one."""
    value = statistics.fmean(score.value for score in scores)
    errors = [score.stderr for score in scores if score.stderr is not None]
    complete = len(errors) == len(scores)
    return Score(value, math.sqrt(math.fsum(e * e for e in errors)) / len(scores) if complete else None)


def mean_difference(values: Sequence[float], reference: Sequence[float]) -> Score:
    """Return the mean of ``values - reference``, sample by sample, and its standard error; none for a single sample.

    Samples that both models get right, or both wrong, add nothing to the error: it is smaller than that of two
    independent scores (Miller 2024, arXiv 2411.00640).
    """
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    n = len(differences)
    return Score(statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n) if n > 1 else None)


def difference(score: TaskScore, reference: TaskScore) -> Score:
    """Return a model's score minus a reference's in the same task; no standard error where samples can't be paired."""
    ours, theirs = score.values, reference.values
    if ours is None or theirs is None or any(ours[name].keys() != theirs.get(name, {}).keys() for name in ours):
        return Score(score.score.value - reference.score.value)
    parts = [([ours[name][i] for i in ours[name]], [theirs[name][i] for i in ours[name]]) for name in ours]
    if score.weighted:
        return mean_difference([v for values, _ in parts for v in values], [v for _, values in parts for v in values])
    return mean_of([mean_difference(a, b) for a, b in parts])


def suite_difference(score: SuiteScore, reference: SuiteScore) -> Score | None:
    """Return the difference of two means over the same tasks; None where there is no mean."""
    if score.mean is None:
        return None
    return mean_of([difference(a, b) for a, b in zip(score.tasks, reference.tasks, strict=True)])


def read_scores(suites: Sequence[Suite], results: Mapping[str, Any]) -> tuple[SuiteScore, ...]:
    """Read the scores of suites from the result of the harness' ``simple_evaluate``.

    Raises:
        KeyError: The harness did not report a suite's metric.
    """
    return tuple(
        SuiteScore(suite.title, tuple(_task_score(task, results) for task in suite.tasks), suite.missing)
        for suite in suites
    )


def _task_score(task: SuiteTask, results: Mapping[str, Any]) -> TaskScore:
    assert task.task is not None
    reported = results["results"][task.task]
    key = task.key or next(key for key in reported if "," in key and "_stderr," not in key)
    metric, _, used_filter = key.partition(",")
    stderr = reported.get(f"{metric}_stderr,{used_filter}")
    score = Score(float(reported[key]), float(stderr) if _is_number(stderr) else None)
    leaves = _leaves(task.task, results.get("group_subtasks", {}))
    values = _values(leaves, key, results)
    weighted = _is_weighted(values, score.value)
    shots = {results.get("n-shot", {}).get(leaf) for leaf in leaves}
    better = results.get("higher_is_better", {}).get(task.task, {}).get(metric)
    return TaskScore(
        name=task.name,
        task=task.task,
        metric=key,
        score=score,
        higher_is_better=task.higher_is_better if better is None else bool(better),
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        num_samples=sum(int(results["results"][leaf]["sample_len"]) for leaf in leaves),
        values=None if weighted is None else values,
        weighted=bool(weighted),
    )


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group; a task itself."""
    children = subtasks.get(name)
    return [name] if children is None else list(dict.fromkeys(x for c in children for x in _leaves(c, subtasks)))


def _is_weighted(values: Mapping[str, Mapping[int, float]] | None, value: float) -> bool | None:
    """Whether the score is the mean over all samples (True), the plain mean of subtasks' means (False), or neither."""
    if values is None:
        return None
    if abs(statistics.fmean(v for part in values.values() for v in part.values()) - value) < _SAME_MEAN:
        return True
    plain = statistics.fmean(statistics.fmean(part.values()) for part in values.values())
    return False if abs(plain - value) < _SAME_MEAN else None


def _values(leaves: Sequence[str], key: str, results: Mapping[str, Any]) -> dict[str, dict[int, float]] | None:
    """The samples' numbers by subtask and document; None unless every document has one."""
    metric, _, used_filter = key.partition(",")
    found: dict[str, dict[int, float]] = {}
    for leaf in leaves:
        samples = [s for s in results.get("samples", {}).get(leaf, ()) if s["filter"] == used_filter]
        if not samples or not all(_is_number(sample.get(metric)) for sample in samples):
            return None
        found[leaf] = {int(sample["doc_id"]): float(sample[metric]) for sample in samples}
    return found


def _is_number(value: object) -> bool:
    """Whether a value is a finite number: of Python, a bool, or of numpy."""
    return hasattr(value, "__float__") and not isinstance(value, str) and math.isfinite(float(value))
