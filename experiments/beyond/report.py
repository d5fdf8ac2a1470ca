"""The report of the study, from the result files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np

from experiments.beyond.arms import ANCHORS, CHANGED, FITTED, trained_as
from experiments.beyond.level import AtLevel, file_of, read_level
from experiments.real.reading import read_result
from experiments.real.report import (
    EXACT,
    Rows,
    Run,
    Setting,
    advantage,
    interval_text,
    per_token,
    read_run,
    save,
    shown,
)
from shadowlit.errors import counted
from shadowlit.files import replace_text
from shadowlit.studies.report import NONE, REPORT, markdown_table, paragraphs
from shadowlit.studies.statistics import Interval

_HEAD = """\
# Beyond the paper: anchors, fitted scales and transforms against the graft and direct tuning

Made by `python experiments/beyond/study.py` from the result files in `results/`.

**Arms.** B2I trains the Base and adds its update to the Instruct; I2I trains the Instruct. *anchors α* trains one \
update on both, with weight α on the Instruct (`model.anchors`); *anchors late* has α = 0.5 in the last quarter of \
the steps and 0 before; *with KL* adds the divergence from the Instruct on other rows at weight 1 \
(`model.anchors.kl`). The others change the update of B2I (*I2I, scales by ...*: that of I2I) at its rate, and train \
nothing: *one fitted scale*, *scales by layer*, *by kind* and *by tensor* are `graft.fit_scales` on the rows for \
choosing, with the divergence on the first 24 of those other rows at weight 1; *GradFix* keeps the elements whose \
sign is that of a step down the Instruct's own gradient on the rows for choosing, at most 31 (arXiv 2510.09658); \
*TIES* and *magnitude* keep the largest elements of each matrix, and differ for a single update in how many; \
*DARE* keeps random ones, which it scales up; *SVD* cuts each matrix to its largest singular values. Arms without \
results are left out. Every update is scored at several scales, from 0.05 to 1.5 on the embedded pair; on the real one \
at 0.5, 1 and 1.5 (B2I and I2I), or 0.5 and 1.

**Settings.** *embedded* is the embedded pair (0.9M parameters, a synthetic world), which learns a new skill from \
600 rows in 8 epochs, in bare answers or in the Instruct's own style; *loss* is that of the answer's value, with \
which both styles begin. *near* is the real pair of [the study on a real model](../real/REPORT.md), with its rows; \
its results come from several kinds of CPU, whose Instructs differ in their last digits. \
In full tuning all weights are trained, but every arm, I2I too, is scored with the update of the linear layers alone, \
which is all that a graft has by default (`graft.select: linear`). On the eight rows that are validated during a \
training, the rest changed the loss of I2I by 0.014 nats at most.

**Scores.** Losses are nats per supervised token on the reported rows, which nothing was chosen or fitted on (60 on \
the embedded pair, 25 tool calls or 40 solutions on the real one). \
*KL* is the divergence from the untouched Instruct on rows of what it could do before. *Equal KL* is the smaller of \
the divergences of B2I and I2I at scale 1 (first seed, each at the rate with the lowest loss on the rows for \
choosing). Every arm is scaled until it first diverges so far, and scored there; the scale is found to a thousandth. \
An arm of which a seed doesn't diverge so far at 4 times its update is not compared. Arms that are trained have the \
rate whose loss at equal KL is the lowest on the rows for choosing (of three; on the real pair, anchors have those of \
B2I and I2I to choose from), and a changed update that of the arm that it is from. \
For the choice of rates (unless an arm was measured at equal KL at all of its rates), and where an arm is marked with \
\\*, losses are interpolated between the scales that were scored, linearly in the square root of the divergence: a \
little too high where they are convex. \
Below, each setting has both: loss and divergence of the updates as they are (scale 1), and the loss at equal KL. \
Values are means ± standard errors over seeds; intervals are of 95 %, by a bootstrap over rows, widened by the spread \
between seeds, and not corrected for their number.
"""
_DECIDES = """\
How much lower an arm's loss is than that of B2I or I2I at equal KL, in nats per token; below zero, it is worse. \
*Best anchors* is the arm with anchors and without KL that has the lowest loss at equal KL on the rows for choosing; \
its α is in brackets.
"""
_BY_KIND = """\
KL on each kind of question that the Instruct could answer before, of the updates as they were trained: *old* ones, \
whose answers the Instruct ends in its own style, *format* ones, which ask for one, and *refusal* ones, about names \
that it doesn't know. The training rows have old questions too. In the settings with bare answers these contradict \
what *old* measures, so a model that learns them can't be near the Instruct there.
"""
_AT_EQUAL_RATES = """\
Arms without and with the divergence from the Instruct on other rows, at each learning rate, with the first seed and \
as they are (scale 1). In all other tables each arm has a rate of its own. Intervals are over rows alone.
"""
_GAINS = """\
How much lower the loss on the reported rows is than that of the same update (of B2I, or of I2I) at scale 1, and than \
that of B2I's with one fitted scale, which is found by the same objective on the same rows: first with all updates as \
they were fitted, whose divergences differ, and then at equal KL, where one fitted scale is the update itself. \
*Scales* are the smallest and the largest over all groups and seeds, and *passes* those of the fits (at most 60, or 15 \
on the real pair).
"""
KINDS = ("old", "format", "refusal")
"""What the Instruct of the embedded pair could do before, in the order of the rows by which divergence is measured."""
BY_KIND = ("B", "I", "A0.5", "B_kl", "A0.5_kl", "I_kl")
"""Arms of which the divergence is measured by kind."""
NAMES = {
    "B": "B2I", "I": "I2I", **{arm: f"anchors {arm.removeprefix('A')}" for arm in ANCHORS},
    "B_kl": "B2I with KL", "A0.5_kl": "anchors 0.5 with KL", "I_kl": "I2I with KL", "fitted_all": "one fitted scale",
    "fitted_layer": "scales by layer", "fitted_kind": "scales by kind", "fitted_tensor": "scales by tensor",
    "I_fitted_kind": "I2I, scales by kind", "I_fitted_tensor": "I2I, scales by tensor",
    "gradfix": "GradFix", "ties": "TIES (20 %)",
    "dare": "DARE (20 %)", "magnitude": "magnitude (10 %)", "svd8": "SVD (rank 8)",
}  # fmt: skip
assert set(NAMES) == {"B", "I", *ANCHORS, *CHANGED}


class Compared(Setting):
    """A setting with the scores at equal KL that have been measured."""

    def __init__(self, results: Path, others: Path, pair: str, task: str, method: str) -> None:
        """Read a setting, and the arms of a real pair that another study has trained."""
        is_alone = (results / pair / f"{task}_untouched.json").exists()
        super().__init__(results if is_alone else others, pair, task, method)
        if not is_alone:
            files = sorted((results / pair / f"{task}_{method}").glob("*_seed*.json"))
            self.runs += [read_run(file, self.instruct) for file in files]
        self._results = results
        self._measured: dict[Path, AtLevel | None] = {}

    def measured(self, run: Run) -> AtLevel | None:
        """What was measured of a run at equal KL; None if nothing was, or at another divergence."""
        file = file_of(self._results, self.name, run)
        if file not in self._measured:
            found = read_level(file, run)
            at_level = found and math.isclose(found.kl, level(self), rel_tol=1e-6)
            self._measured[file] = found if at_level else None
        return self._measured[file]

    def at_level(self, run: Run, name: str = "report") -> Rows | None:
        """Scores of a set at equal KL, measured or else interpolated; None if the update doesn't diverge so far."""
        found = self.measured(run)
        if found is None:
            return run.at_divergence(level(self), name)
        return found.scores.get(name)


def level(setting: Setting) -> float:
    """The smaller of the divergences of B2I and I2I with the first seed, at scale 1 and the rates of their own."""
    chosen = setting.chosen
    both = [run for run in setting.runs if run.source in "BI" and run.seed == 0 and run.lr == chosen[run.source]]
    return min(run.divergence(1.0) for run in both)


def rates_at_level(setting: Compared) -> dict[str, float]:
    """The rate of each arm whose loss at the level is the lowest on the rows for choosing, with the first seed.

    It is measured if it has been at all rates of the arm, and else interpolated at all of them. An arm that never
    diverges so far has the rate with the lowest loss there at scale 1.
    """
    firsts = [run for run in setting.runs if run.seed == 0]
    partly = {run.source for run in firsts if setting.measured(run) is None}
    best: dict[str, tuple[bool, float, float]] = {}
    kl = level(setting)
    for run in firsts:
        there = run.at_divergence(kl, "choice") if run.source in partly else setting.at_level(run, "choice")
        loss = per_token(run.path[1.0]["choice"] if there is None else there)
        found = (there is None, loss, run.lr)
        best[run.source] = min(best.get(run.source, found), found)
    return {source: lr for source, (_, _, lr) in best.items()}


def runs_of(setting: Compared, source: str) -> list[Run]:
    """The runs of an arm at its rate, by seed; none of an arm that was not run.

    A changed update has the rate of the arm that it is from.
    """
    lr = rates_at_level(setting).get(trained_as(source))
    return sorted((r for r in setting.runs if r.source == source and r.lr == lr), key=lambda run: run.seed)


def better_by(setting: Compared, source: str, than: str, *, as_it_is: bool = False) -> Interval | None:
    """How much lower the loss of an arm is than that of another, over the seeds of both.

    Both are scaled to equal KL; or ``as_it_is``, at scale 1. None if a seed of one never diverges so far: those that
    do would be a selection.
    """

    def rows_of(run: Run) -> Rows | None:
        return run.path[1.0]["report"] if as_it_is else setting.at_level(run)

    others = {run.seed: rows_of(run) for run in runs_of(setting, than)}
    pairs = [(rows_of(run), others[run.seed]) for run in runs_of(setting, source) if run.seed in others]
    found = [(one, two) for one, two in pairs if one is not None and two is not None]
    return advantage(found) if found and len(found) == len(pairs) else None


def best_anchors(setting: Compared) -> str | None:
    """The arm with anchors and without KL whose loss at equal KL is the lowest on the rows for choosing.

    Of those that have been run with all seeds of B2I.
    """
    losses, seeds = {}, [run.seed for run in runs_of(setting, "B")]
    for source in (arm for arm, options in ANCHORS.items() if "kl" not in options):
        runs = runs_of(setting, source)
        known = [per_token(one) for run in runs if (one := setting.at_level(run, "choice")) is not None]
        if len(known) == len(runs) and [run.seed for run in runs] == seeds:
            losses[source] = fmean(known)
    return min(losses, key=losses.__getitem__) if losses else None


def _scores(setting: Compared) -> str:
    lines = [["Instruct", NONE, f"{per_token(setting.instruct['report']):.3f}", NONE, "0", *[NONE] * 5]]
    for source, name in NAMES.items():
        runs = runs_of(setting, source)
        if not runs:
            continue
        if len(runs) < (seeds := len(runs_of(setting, "B"))):
            name = f"{name} ({counted(len(runs), 'seed')} of {seeds})"
        at_one = [run.path[1.0] for run in runs]
        equal = [rows for rows in map(setting.at_level, runs) if rows is not None]
        is_measured = all(map(setting.measured, runs))
        lines.append(
            [
                name, f"{runs[0].lr:g}", shown([per_token(one["report"]) for one in at_one]),
                shown([100 * fmean(one["report"][:, EXACT]) for one in at_one], 1),
                shown([run.divergence(1.0) for run in runs]),
                *_lower(setting, source, as_it_is=True),
                shown([per_token(r) for r in equal]) + ("" if is_measured else "\\*")
                if len(equal) == len(runs) else "not reached",
                *_lower(setting, source, as_it_is=False),
            ]
        )  # fmt: skip
    lower = ("lower than B2I by", "lower than I2I by")
    return markdown_table(("model", "rate", "loss", "exact, %", "KL", *lower, "loss at equal KL", *lower), lines)


def _lower(setting: Compared, source: str, *, as_it_is: bool) -> list[str]:
    """How much lower an arm's loss is than those of B2I and I2I."""
    return [NONE if other == source else _text(better_by(setting, source, other, as_it_is=as_it_is)) for other in "BI"]


def _overview(settings: Sequence[Compared], than: str) -> str:
    """How much better than B2I or I2I the best anchors, and all other arms, are in each setting."""
    best = [(setting, best_anchors(setting)) for setting in settings]
    lines = [
        ["best anchors"]
        + [
            f"{_text(better_by(setting, arm, than))} [{NAMES[arm].removeprefix('anchors ')}]" if arm else NONE
            for setting, arm in best
        ]
    ]
    for source, name in NAMES.items():
        if source != than and (source not in ANCHORS or "kl" in ANCHORS[source]):
            lines.append([name, *(_text(better_by(setting, source, than)) for setting in settings)])
    known = [line for line in lines if set(line[1:]) != {NONE}]
    return markdown_table(("arm", *(setting.name for setting in settings)), known)


def _gains(settings: Sequence[Compared]) -> str:
    """What fitted scales gain over scale 1, and those by group over a single one."""
    lines = []
    for setting in settings:
        for source in (arm for arm in FITTED if runs_of(setting, arm)):
            scales = [scale for run in runs_of(setting, source) for scale in run.raw["scales"].values()]
            own = trained_as(source)
            gains = [
                _text(better_by(setting, source, than, as_it_is=as_it_is)) if than not in (source, None) else NONE
                for as_it_is in (True, False)
                for than in (own, "fitted_all" if own == "B" else None)
            ]
            passes = [len(run.raw["history"]) for run in runs_of(setting, source)]
            spans = f"{min(scales):.3f} to {max(scales):.3f}", f"{min(passes)} to {max(passes)}"
            lines.append([setting.name, NAMES[source], *spans, *gains])
    headings = (
        "setting", "arm", "scales", "passes", "lower than at scale 1 by", "than one fitted scale by",
        "at equal KL: than the update itself by", "than one fitted scale by",
    )  # fmt: skip
    return markdown_table(headings, lines)


def kinds_of(results: Path, setting: str) -> Path:
    """File of the divergences by kind of a setting."""
    return results / f"{setting}_kinds.json"


def _by_kind(results: Path, settings: Sequence[Compared]) -> str:
    """The divergence of trained updates at scale 1 on each kind of row."""
    lines = []
    for setting in settings:
        file = kinds_of(results, setting.name)
        known = read_result(file, dict) if file.exists() else {}
        for source in BY_KIND:
            runs = runs_of(setting, source)
            found = [known.get(f"{setting.name}/{run.source}_lr{run.lr:g}_seed{run.seed}") for run in runs]
            if runs and all(
                one and one["recipe"] == run.raw.get("recipe") for one, run in zip(found, runs, strict=True)
            ):
                loss = shown([per_token(run.path[1.0]["report"]) for run in runs])
                lines.append(
                    [setting.name, NAMES[source], loss, *(shown([one[kind] for one in found]) for kind in KINDS)]
                )
    return markdown_table(("setting", "arm", "loss", *KINDS), lines) if lines else ""


def _at_equal_rates(settings: Sequence[Compared]) -> str:
    """Arms with and without a divergence term at each rate, with the first seed."""
    lines = []
    for setting in settings:
        known = {(run.source, run.lr): run for run in setting.runs if run.seed == 0}
        for source in (arm for arm in NAMES if f"{arm}_kl" in NAMES):
            for lr in sorted(lr for arm, lr in known if arm == source and (f"{arm}_kl", lr) in known):
                both = known[source, lr], known[f"{source}_kl", lr]
                without, with_kl = (run.path[1.0]["report"] for run in both)
                lines.append(
                    [
                        setting.name, NAMES[source], f"{lr:g}",
                        f"{per_token(without):.3f}", f"{per_token(with_kl):.3f}",
                        _text(advantage([(with_kl, without)])), *(f"{run.divergence(1.0):.4f}" for run in both),
                    ]
                )  # fmt: skip
    headings = ("setting", "arm", "rate", "loss without", "loss with", "lower with it by", "KL without", "KL with")
    return markdown_table(headings, lines) if lines else ""


def _text(found: Interval | None) -> str:
    return interval_text(found) if found else NONE


def plot(settings: Sequence[Compared], target: Path) -> None:
    """Learned against forgotten: the mean over seeds of every arm at its chosen rate, through its scales."""
    columns = min(2, len(settings))
    count = -(-len(settings) // columns)
    figure, axes = plt.subplots(count, columns, figsize=(5.6 * columns, 4.2 * count), squeeze=False)
    for axis, setting in zip(axes.flat, settings, strict=False):
        for number, (source, name) in enumerate(NAMES.items()):
            runs = runs_of(setting, source)
            if runs:
                scales = sorted(runs[0].path)
                axis.plot(
                    [fmean(run.divergence(s) for run in runs) for s in scales],
                    [fmean(run.learned(s) for run in runs) for s in scales],
                    color=plt.get_cmap("tab20")(number), marker="o", markersize=3,
                    linestyle="-" if source in ("B", "I") else "--" if source in ANCHORS else ":", label=name,
                )  # fmt: skip
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        axis.set_xlim(left=0.0)  # what diverges little would lie outside
    save(figure, settings, target, "KL from the Instruct (nats per token, square-root axis)")


def finished(results: Path, others: Path) -> list[Compared]:
    """The settings that have results of the two arms that all others are compared with."""
    names = [(folder.parent.name, *folder.name.rsplit("_", 1)) for folder in sorted(results.glob("*/*_*/"))]
    found = [Compared(results, others, *name) for name in names]
    return [setting for setting in found if {"B", "I"} <= set(setting.chosen)]


def write_report(results: Path, home: Path, others: Path) -> None:
    """Write ``REPORT.md`` and its plot into ``home``."""
    settings = finished(results, others)
    if not settings:
        return
    plot(settings, home / "learned_against_kl.png")
    parts = [_HEAD, "## Loss at equal KL", _DECIDES]
    for than in "BI":
        parts += [f"### Against {NAMES[than]}", _overview(settings, than)]
    parts += [
        "![learned against KL](learned_against_kl.png)",
        "## Scales by group",
        _GAINS,
        _gains(settings),
    ]
    if by_kind := _by_kind(results, settings):
        parts += ["## Divergence by kind of question", _BY_KIND, by_kind]
    if at_equal_rates := _at_equal_rates(settings):
        parts += ["## The divergence term at equal rates", _AT_EQUAL_RATES, at_equal_rates]
    for setting in settings:
        parts += [f"## {setting.name}", _scores(setting)]
    replace_text(home / REPORT, paragraphs([part.strip() for part in parts]))
