"""Copies of tasks whose questions are asked in another way, and scores of a model on both, row by row."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shadowlit.errors import EvaluationError
from shadowlit.harness.perturbations import PERTURBATIONS, perturb
from shadowlit.harness.suites import Score, Suite, SuiteTask, TaskScore, mean_difference, mean_of

if TYPE_CHECKING:
    from lm_eval.api.task import Task

QUESTION_FIELDS = ("question", "Question", "problem", "prompt", "query", "instruction", "input")
"""Columns in which the question is looked for."""
_TWO_SIDED = 1.96  # standard errors on each side of a 95 % interval, by the normal approximation


@dataclass(frozen=True)
class Perturbed:
    """A perturbation of a task's rows.

    Attributes:
        task: The harness' name of the task.
        kind: One of :data:`shadowlit.harness.perturbations.PERTURBATIONS`.
        question: Column with the question.
        num_rows: Rows that were tried; those of ``indices`` could be perturbed.
        rows: Of each perturbed row the columns before and after.
    """

    task: str
    kind: str
    question: str
    num_rows: int
    indices: tuple[int, ...]
    rows: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The name of the task's copy."""
        return f"{self.task}_{self.kind}"


@dataclass(frozen=True)
class Change:
    """A model's scores on the rows that were perturbed: as they are, perturbed, and the difference, paired by row."""

    before: float
    after: float
    difference: Score

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the difference over rows, by the normal approximation; None for a single row, or where all
        rows differ by as much, of which it says nothing.
        """
        if not self.difference.stderr:
            return None
        reach = _TWO_SIDED * self.difference.stderr
        return self.difference.value - reach, self.difference.value + reach


def require_kinds(kinds: Sequence[str]) -> None:
    """Raise an EvaluationError for unknown or repeated perturbations."""
    if unknown := [kind for kind in kinds if kind not in PERTURBATIONS]:
        raise EvaluationError(f"perturb has {unknown[0]!r}; expected one or more of {', '.join(PERTURBATIONS)}.")
    if len(set(kinds)) < len(kinds):
        raise EvaluationError(f"perturb has {', '.join(kinds)}; expected each once.")


def perturbed_tasks(
    suites: Sequence[Suite],
    tasks: Mapping[str, Any],
    kinds: Sequence[str],
    question: str | None,
    seed: int,
    limit: int | None,
) -> tuple[list[Perturbed], list[Suite], dict[str, Task]]:
    """Return the perturbations of all tasks, a suite of their copies, and the copies by name.

    Raises:
        EvaluationError: A task is a group, has no column with the question, or takes its examples from the rows that
            it scores, among which the original of a perturbed row would be.
    """
    found: list[Perturbed] = []
    entries: list[SuiteTask] = []
    twins: dict[str, Task] = {}
    for entry in (entry for suite in suites for entry in suite.tasks):
        task = tasks[str(entry.task)]
        if hasattr(task, "get_all_tasks"):
            raise EvaluationError(f"perturb works on single tasks, and {entry.task} is a group. Name its tasks.")
        _require_other_examples(task)
        docs = [dict(doc) for doc in task.eval_docs][:limit]
        column = _question(task, docs[0], question)
        for kind in kinds:
            made = {i: new for i, doc in enumerate(docs) if (new := perturb(kind, doc, column, seed, i)) is not None}
            rows = tuple((docs[i], new) for i, new in made.items())
            one = Perturbed(task.task_name, kind, column, len(docs), tuple(made), rows)
            found.append(one)
            if made:
                twins[one.name] = _twin(task, one)
                entries.append(replace(entry, name=f"{entry.name}, {kind}", task=one.name, note=None))
    return found, [Suite(None, tuple(entries))] if entries else [], twins


def change(one: Perturbed, scores: Sequence[TaskScore]) -> Change | None:
    """A model's change by a perturbation; None where no row could be perturbed, or the score is no mean over rows."""
    by_task = {score.task: score.values for score in scores}
    before, after = by_task.get(one.task), by_task.get(one.name)
    if not before or not after:
        return None
    (old,), (new,) = before.values(), after.values()
    pairs = [(old[index], new[number]) for number, index in enumerate(one.indices) if number in new and index in old]
    firsts, seconds = [a for a, _ in pairs], [b for _, b in pairs]
    difference = mean_difference(seconds, firsts)
    mean = lambda values: mean_of([Score(value) for value in values]).value  # noqa: E731
    return Change(mean(firsts), mean(seconds), difference) if math.isfinite(difference.value) else None


def _question(task: Task, doc: Mapping[str, Any], given: str | None) -> str:
    column = given or next((name for name in QUESTION_FIELDS if isinstance(doc.get(name), str)), None)
    if column is None or not isinstance(doc.get(column), str):
        raise EvaluationError(
            f"task '{task.task_name}' has the columns {', '.join(doc)}, none of which is known to hold the question as "
            f"a text{f' ({given} is not one)' if given else ''}. Name it with perturb_field."
        )
    return column


def _require_other_examples(task: Task) -> None:
    scored = task.get_config("test_split") or task.get_config("validation_split")
    split = getattr(task.get_config("fewshot_config"), "split", None) or task.get_config("fewshot_split")
    split = split or task.get_config("training_split") or scored
    has_samples = getattr(task.get_config("fewshot_config"), "samples", None) is not None
    if task.get_config("num_fewshot") and split == scored and not has_samples:
        raise EvaluationError(
            f"task '{task.task_name}' takes its examples from the rows that it scores, so that the original "
            "of a perturbed row could be among them. Set fewshot=0, or leave perturb out."
        )


def _twin(task: Task, one: Perturbed) -> Task:
    """A copy of a task that scores the perturbed rows."""
    import datasets

    twin: Any = copy.copy(task)
    twin._config = copy.copy(task.config)
    twin._config.task = one.name
    twin._config.process_docs = None  # the rows are those that it returns
    split = task.get_config("test_split") or task.get_config("validation_split")
    rows = datasets.Dataset.from_list([dict(new) for _, new in one.rows])
    twin.dataset = {**{name: task.dataset[name] for name in task.dataset}, split: rows}
    twin._instances = None
    if hasattr(twin, "sampler"):
        twin.sampler = copy.copy(twin.sampler)
    twin.task_docs = twin.eval_docs
    return twin
