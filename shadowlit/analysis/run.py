"""The folder of a run, finished or not: settings, metrics, scores, answers."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowlit.analysis.curves import read_metrics
from shadowlit.analysis.tables import Markdown, Table
from shadowlit.delta.configured import read_config
from shadowlit.errors import DataError
from shadowlit.evaluation.samples import read_samples, side_by_side
from shadowlit.grafting.manifest import MANIFEST_FILE, read_manifest

Points = Sequence[tuple[int, float]]
SUBJECTS = ("tuned", "grafted", "base", "instruct")
_NO_ANSWERS = (
    "There are no answers. A run leaves them at a validation in which an evaluator of its configuration's section "
    "'evaluation' is due."
)
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Run:
    """The metrics that a run has logged so far.

    Attributes:
        config: The resolved configuration; empty if there is none.
        series: Values of every metric with the optimizer step they were logged at.
        written_s: Seconds since the metrics were last written.
    """

    folder: Path
    config: Mapping[str, Any]
    series: Mapping[str, Points]
    written_s: float = math.nan

    @property
    def step(self) -> int:
        """The last optimizer step that anything was logged at."""
        return max((points[-1][0] for points in self.series.values()), default=0)

    @property
    def sets(self) -> list[str]:
        """Names of the validation sets; none where there is only one, without a name."""
        return self._names("loss")

    @property
    def evaluators(self) -> list[str]:
        """Names of the evaluators that have scored something."""
        return self._names("score")

    @property
    def divergences(self) -> list[str]:
        """Names of the evaluators that measure a divergence from the Instruct."""
        return self._names("kl")

    @property
    def layers(self) -> list[str]:
        """Names of the metrics with the norm of the update in each layer, in order."""
        return sorted(name for name in self.series if name.startswith("graft/delta_norm/layer_"))

    def points(self, metric: str) -> Points:
        """Return the values of a metric; empty if it was never logged."""
        return self.series.get(metric, [])

    def last(self, metric: str) -> float:
        """Return the last value of a metric; NaN if it was never logged."""
        points = self.points(metric)
        return points[-1][1] if points else math.nan

    def gain(self, what: str = "loss") -> Points:
        """Return how much better the grafted Instruct is than the untouched one, at every validation.

        The difference of losses or scores, signed so that the graft helps where it is above 0.

        Args:
            what: ``loss``, ``<set>/loss``, or ``<evaluator>/score``.
        """
        before = self.last(f"val/instruct/{what}")
        sign = -1 if what.endswith(("loss", "perplexity", "kl")) else 1
        return [(step, sign * (value - before)) for step, value in self.points(f"val/grafted/{what}")]

    def _names(self, what: str) -> list[str]:
        found = (re.fullmatch(rf"val/[^/]+/([^/]+)/{what}", metric) for metric in self.series)
        return list(dict.fromkeys(match[1] for match in found if match))


def read_run(folder: str | Path) -> Run:
    """Read the metrics that a run has logged so far; it may still be running. Example: ``run = read_run("runs/lora")``.

    Args:
        folder: Folder with a ``metrics.csv``, e.g. ``runs/demo_lora/version_0``; or one above it, in which case the
            run that was written last is read.

    Raises:
        DataError: There is none.
    """
    home = Path(folder)
    if not (home / "metrics.csv").is_file():
        found = sorted(home.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise DataError(
                f"{home} holds no metrics.csv, in no folder below it either. Give the folder of a run, "
                "e.g. runs/demo_lora/version_0; it writes the file with the first metrics."
            )
        home = found[-1].parent
    file = home / "metrics.csv"
    return Run(home, read_config(home), read_metrics(file), time.time() - file.stat().st_mtime)


# -- tables ---------------------------------------------------------------------------------------------------


def overview(run: Run) -> Table:
    """Return the settings of a run, its progress, and its last validation. Example: ``overview(run)``."""
    pair, model = run.config.get("pair") or {}, run.config.get("model") or {}
    adapter = model.get("adapter")
    settings = (adapter or {}).get("init_args", adapter or {})
    rows: list[tuple[str, object]] = [
        ("folder", run.folder),
        ("base", pair.get("base")),
        ("instruct", pair.get("instruct")),
        ("tuning", f"LoRA, rank {settings.get('r')}" if adapter else "full" if model else None),
        ("learning rate", model.get("lr")),
        ("seed", run.config.get("seed_everything")),
        ("optimizer step", run.step),
        ("last written, seconds ago", round(run.written_s)),
        *((f"loss, {who} (nats per token)", run.last(f"val/{who}/loss")) for who in SUBJECTS),
        ("gain in loss (nats per token)", run.last("graft/gain")),
        ("survival of the update in the exported dtype", run.last("graft/survival")),
        ("norm of the update, relative to the Instruct", run.last("graft/relative_delta")),
        *((f"KL from the Instruct, grafted: {n} (nats per token)", run.last(f"val/grafted/{n}/kl"))
          for n in run.divergences),
        ("share of the time spent grafting", run.last("graft/time_share")),
        ("share of the time spent evaluating", run.last("evaluation/time_share")),
    ]  # fmt: skip
    exported = run.folder / "export" / "model"
    if (exported / MANIFEST_FILE).is_file():
        checked = read_manifest(exported).get("logits_against_validated") or {}
        rows += [("exported", exported), ("same most probable token after reloading", checked.get("top1_agreement"))]
    return Table(("", "value"), rows)


def scores(run: Run) -> Table:
    """Return the last score of every evaluator and model, with the gain of the graft. Example: ``scores(run)``."""
    rows = []
    for name in run.evaluators:
        values = [run.last(f"val/{who}/{name}/score") for who in SUBJECTS]
        rows.append((name, *values, values[1] - values[3], run.last(f"val/grafted/{name}/stderr")))
    return Table(("evaluator", *SUBJECTS, "grafted − instruct", "standard error (grafted)"), rows)


def changes(run: Run, step: int | None = None) -> Table:
    """Return which questions the graft wins and loses against the untouched Instruct, by evaluator, in the last
    validation.

    Equal means can hide that other questions are right than before. See also :func:`answers_folder`.
    Example: ``changes(run)``.
    """
    home = answers_folder(run, step)
    columns = ("evaluator", "right in both", "won", "lost", "wrong in both")
    if home is None:
        return Table(columns, [], _NO_ANSWERS)
    rows = []
    for file in sorted((home / "grafted").glob("*.jsonl")):
        before = {row["index"]: row["score"] for row in read_samples(home.parent / "instruct" / file.name)}
        pairs = [
            (before[row["index"]] > 0.5, row["score"] > 0.5) for row in read_samples(file) if row["index"] in before
        ]
        if pairs:
            counts = [pairs.count(kind) for kind in ((True, True), (False, True), (True, False), (False, False))]
            rows.append((file.stem, *counts))
    caption = f"step {_STEP.fullmatch(home.name)[1]}; right is a score above 0.5"  # type: ignore[index]
    return Table(columns, rows, caption)


def answers(run: Run, evaluators: Iterable[str] | None = None, step: int | None = None, rows: int = 2) -> Markdown:
    """Return the first answers of the four models to the same questions, side by side; see also :func:`answers_folder`.

    Example: ``answers(run, rows=1)``.

    Args:
        run: Run with ``evaluation/step-<step>/``.
        evaluators: Names of evaluators; None for all.
        step: Step of the validation; None for the last one with answers.
        rows: Number of questions of each evaluator.
    """
    home = answers_folder(run, step)
    if home is None:
        return Markdown(_NO_ANSWERS)
    found = {
        (file.parent.name, file.stem): read_samples(file)
        for who in ("grafted", "tuned")
        for file in sorted((home / who).glob("*.jsonl"))
    }
    names = list(evaluators or dict.fromkeys(name for _, name in found))
    text = side_by_side(found, home.parent, names, rows)
    return Markdown(text or f"No evaluator of {run.folder} keeps answers: {', '.join(names)}.")


def answers_folder(run: Run, step: int | None = None) -> Path | None:
    """Return the folder with the answers of one validation; None if the run has none at all, or none yet.

    Raises:
        DataError: There are answers, but none of that step.
    """
    root = Path((run.config.get("evaluation") or {}).get("folder") or run.folder / "evaluation")
    root = root if root.is_dir() else run.folder / "evaluation"
    steps = {int(match[1]): home for home in root.glob("step-*") if (match := _STEP.fullmatch(home.name))}
    # A validation in progress has a folder before it has the grafted answers.
    steps = {number: home for number, home in steps.items() if (home / "grafted").is_dir()}
    if steps and step is not None and step not in steps:
        told = ", ".join(map(str, sorted(steps)))
        raise DataError(f"{root} holds no answers of step {step}; there are those of {told}. Give one of them.")
    return steps[max(steps) if step is None else step] if steps else None
