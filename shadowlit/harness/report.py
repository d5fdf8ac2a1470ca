"""A table of models' scores, with notes on its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from shadowlit.errors import EvaluationError
from shadowlit.harness.models import Evaluation
from shadowlit.harness.perturbed import Perturbed, change
from shadowlit.harness.suites import Score, SuiteScore, TaskScore, difference, load_suites, mean_of, suite_difference
from shadowlit.harness.tasks import harness_version


@dataclass(frozen=True)
class Report:
    """Scores of one or more models in the same tasks.

    Attributes:
        models: Letter and name of every model; with several, the first is the reference.
        headings: Headings of the columns.
        sections: Rows of every suite, of which the last one is its mean.
        notes: Notes on the numbers.
        perturbed: Rows of the table of perturbed questions, under :data:`PERTURBED_HEADINGS`.
    """

    models: tuple[tuple[str, str], ...]
    headings: tuple[str, ...]
    sections: tuple[tuple[tuple[str, ...], ...], ...]
    notes: tuple[str, ...]
    perturbed: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        """Markdown."""
        lines = [f"- {letter} = {name}" for letter, name in self.models]
        lines += ["", _markdown_row(self.headings), _markdown_row(["---", "---", *["--:"] * (len(self.headings) - 2)])]
        lines += [_markdown_row(row) for section in self.sections for row in section]
        if self.perturbed:
            rule = ["---"] * 3 + ["--:"] * (len(PERTURBED_HEADINGS) - 3)
            lines += ["", *map(_markdown_row, (PERTURBED_HEADINGS, rule, *self.perturbed))]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"


PERTURBED_HEADINGS = (
    "task", "perturbation", "model", "rows", "as they are", "perturbed", "difference", "95 % interval",
)  # fmt: skip
"""Headings of the table of perturbed questions."""


def make_report(evaluations: Sequence[Evaluation], perturbed: Sequence[Perturbed] = ()) -> Report:
    """Compare models with the first one, sample by sample; and of each, rows as they are and ``perturbed``.

    Raises:
        EvaluationError: The models were evaluated in different tasks.
    """
    tasks = [[(score.task, score.metric) for suite in found.suites for score in suite.tasks] for found in evaluations]
    if any(other != tasks[0] for other in tasks[1:]):
        raise EvaluationError("the models were evaluated on different tasks. Evaluate them with the same benchmarks.")
    letters = [ascii_uppercase[i] if i < len(ascii_uppercase) else f"M{i + 1}" for i in range(len(evaluations))]
    models = tuple(
        (letter, f"{found.model} ({'' if found.chat else 'no '}chat template)")
        for letter, found in zip(letters, evaluations, strict=True)
    )
    headings = ("task", "metric", "shots", "samples", *letters, *(f"{other} − {letters[0]}" for other in letters[1:]))
    suites = list(zip(*(found.suites for found in evaluations), strict=True))
    sections = [_section(family) for family in suites]
    means = [family for family in suites if family[0].mean is not None]
    if len(means) > 1:
        sections.append((_overall(means),))
    notes = tuple(_notes(evaluations))
    if perturbed:
        notes += ("perturbed questions: the difference is paired row by row; rows that can't be perturbed don't count",)
    changes = tuple(
        _change(one, letter, e) for one in perturbed for letter, e in zip(letters, evaluations, strict=True)
    )
    return Report(models, headings, tuple(sections), notes, changes)


def _change(one: Perturbed, letter: str, found: Evaluation) -> tuple[str, ...]:
    """A row of the table of perturbed questions."""
    count = f"{len(one.indices)} of {one.num_rows}"
    changed = change(one, [score for suite in found.suites for score in suite.tasks])
    if changed is None:
        return (one.task, one.kind, letter, count, "–", "–", "–", "–")
    interval = "–" if changed.difference.stderr is None else "none: the same on all rows"
    if changed.interval is not None:
        interval = f"{changed.interval[0]:+.4f} to {changed.interval[1]:+.4f}".replace("-", "−")
    return (
        one.task, one.kind, letter, count, f"{changed.before:.4f}", f"{changed.after:.4f}",
        _signed(changed.difference), interval,
    )  # fmt: skip


def _section(family: Sequence[SuiteScore]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for scores in zip(*(suite.tasks for suite in family), strict=True):
        first: TaskScore = scores[0]
        arrow = "" if first.higher_is_better else " ↓"
        shots = "–" if first.num_fewshot is None else str(first.num_fewshot)
        cells = [str(score.score) for score in scores] + [_signed(difference(s, first)) for s in scores[1:]]
        metric = first.metric.removesuffix(",none").replace(",", ", ")
        rows.append((first.name, metric + arrow, shots, str(first.num_samples), *cells))
    means = [suite.mean for suite in family]
    if means[0] is not None:
        cells = [str(mean) for mean in means] + [_signed(suite_difference(suite, family[0])) for suite in family[1:]]
        rows.append((f"mean of {family[0].title}", "", "", "", *cells))
    return tuple(rows)


def _overall(means: Sequence[Sequence[SuiteScore]]) -> tuple[str, ...]:
    """The row of the mean of the suites' means."""
    by_model = list(zip(*means, strict=True))
    cells = [str(mean_of([suite.mean for suite in suites if suite.mean])) for suites in by_model]
    for suites in by_model[1:]:
        parts = [suite_difference(suite, first) for suite, first in zip(suites, by_model[0], strict=True)]
        cells.append(_signed(mean_of([part for part in parts if part])))
    return (f"mean of {len(means)} groups", "", "", "", *cells)


def _signed(score: Score | None) -> str:
    return "" if score is None else f"+{score}" if score.value >= 0 else str(score).replace("-", "−", 1)


def _notes(evaluations: Sequence[Evaluation]) -> list[str]:
    notes = []
    first = evaluations[0]
    for suite in first.suites:
        if suite.missing:
            rest = f"; the mean of {suite.title} is over the other {len(suite.tasks)}" if suite.mean else ""
            notes.append(f"not in lm-evaluation-harness {harness_version()}: {', '.join(suite.missing)}{rest}")
    scores = [score for suite in first.suites for score in suite.tasks]
    bare = [score.name for score in scores if score.score.stderr is None]
    if bare:
        notes.append(f"no standard error from the harness, so none of a mean with it: {', '.join(bare)}")
    unpaired = [score.name for score in scores if score.values is None]
    if len(evaluations) > 1 and unpaired:
        notes.append(f"not a mean over samples, so no standard error of the difference: {', '.join(unpaired)}")
    limit = first.harness.get("config", {}).get("limit")
    if limit is not None:
        first_rows = "the first sample" if limit == 1 else f"the first {limit:g} samples"
        notes.append(f"only {first_rows} of every task: not to be compared with published numbers")
    if len({found.chat for found in evaluations}) > 1:
        notes.append("the models differ in whether a chat template was applied")
    in_suites = {task.task: task for suites in load_suites().values() for suite in suites for task in suite.tasks}
    for score in scores:
        task = in_suites.get(score.task)
        if task is not None and task.note and task.name == score.name:
            notes.append(f"{score.name}: {task.note}")
    return notes


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
