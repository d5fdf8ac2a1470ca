"""The report of the study, from the result files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from experiments.beyond.arms import ANCHORS, CHANGED
from experiments.real.report import EXACT, Rows, Run, Setting, advantage, interval_text, per_token, shown
from shadowlit.files import replace_text
from shadowlit.studies.report import NONE, REPORT, markdown_table, paragraphs
from shadowlit.studies.statistics import Interval

_HEAD = """\
# Beyond the paper: anchors, fitted scales and GradFix against the graft and direct tuning

Made by `python experiments/beyond/study.py` from the result files in `results/`.

**Arms.** B2I trains the Base and adds its update to the Instruct; I2I trains the Instruct. *anchors α* trains one \
update on both, with weight α on the Instruct (`model.anchors`); *anchors late* has α = 0.5 in the last quarter of the \
steps and 0 before. The others change the update of B2I, and train nothing: *scales by layer* and *by kind* are \
`graft.fit_scales` on the rows for choosing, with the divergence from the Instruct on other rows at weight 1; \
*GradFix* keeps the elements whose sign is that of a step down the Instruct's own gradient on the rows for choosing \
(arXiv 2510.09658). Every update is scored at scales 0.5, 1 and 1.5.

**Settings.** *embedded* is the embedded pair (0.9M parameters, a synthetic world), which learns a new skill from 600 \
rows in 8 epochs, in bare answers or in the Instruct's own style; *loss* is that of the answer's value, with which \
both styles begin. *near* is the real pair of [the study on a real model](../real/REPORT.md), with its rows.

**Scores.** Losses are nats per supervised token on 60 or 32 reported rows, which nothing was chosen or fitted on. The \
learning rate of each arm is the one of three with the lowest loss on the rows for choosing (first seed, scale 1). \
*KL* is the divergence from the untouched Instruct on rows of what it could do before. *Equal KL* is the smaller of \
the divergences of B2I and I2I at scale 1, for each seed; every arm is scaled to it, linear between the measured \
scales. Values are means ± standard errors over seeds; intervals are of 95 %, by a bootstrap over rows, widened by the \
spread between seeds, and not corrected for their number.
"""
_DECIDES = """\
How much lower an arm's loss is than that of B2I and I2I at equal KL, in nats per token; below zero, it is worse. \
*Best anchors* is the arm with anchors that has the lowest loss at equal KL on the rows for choosing.
"""
NAMES = {
    "B": "B2I", "I": "I2I", **{arm: f"anchors {arm.removeprefix('A')}" for arm in ANCHORS},
    "fitted_layer": "scales by layer", "fitted_kind": "scales by kind", "gradfix": "GradFix",
}  # fmt: skip
assert set(NAMES) == {"B", "I", *ANCHORS, *CHANGED}


def level(setting: Setting, seed: int) -> float | None:
    """The smaller of the divergences of B2I and I2I with a seed, at scale 1 and their chosen rates."""
    both = [run for source in "BI" for run in setting.of(source) if run.seed == seed]
    return min(run.divergence(1.0) for run in both) if len(both) == 2 else None


def at_level(setting: Setting, run: Run, name: str = "report") -> Rows | None:
    """Scores of a set where a run diverges as much as the level of its seed; None if it never does."""
    kl = level(setting, run.seed)
    return None if kl is None else run.at_divergence(kl, name)


def better_by(setting: Setting, source: str, than: str) -> Interval | None:
    """How much lower the loss of an arm is than that of another at equal KL, over the seeds of both."""
    others = {run.seed: at_level(setting, run) for run in setting.of(than)}
    pairs = [(at_level(setting, run), others.get(run.seed)) for run in setting.of(source)]
    found = [(one, two) for one, two in pairs if one is not None and two is not None]
    return advantage(found) if found else None


def best_anchors(setting: Setting) -> str | None:
    """The arm with anchors whose loss at equal KL is the lowest on the rows for choosing."""
    losses = {}
    for source in ANCHORS:
        scores = [at_level(setting, run, "choice") for run in setting.of(source)]
        known = [per_token(one) for one in scores if one is not None]
        if known and len(known) == len(scores):
            losses[source] = fmean(known)
    return min(losses, key=losses.__getitem__) if losses else None


def _scores(setting: Setting) -> str:
    lines = [["Instruct", NONE, f"{per_token(setting.instruct['report']):.3f}", NONE, "0", NONE, NONE, NONE]]
    for source, name in NAMES.items():
        runs = setting.of(source) if source in setting.chosen else []
        if not runs:
            continue
        at_one = [run.path[1.0] for run in runs]
        equal = [rows for rows in (at_level(setting, run) for run in runs) if rows is not None]
        both = [better_by(setting, source, other) for other in "BI"]
        lines.append(
            [
                name, f"{runs[0].lr:g}", shown([per_token(one["report"]) for one in at_one]),
                shown([100 * fmean(one["report"][:, EXACT]) for one in at_one], 1),
                shown([run.divergence(1.0) for run in runs]),
                shown([per_token(rows) for rows in equal]) if len(equal) == len(runs) else "not reached",
                *(interval_text(found) if found and other != source else NONE
                  for found, other in zip(both, "BI", strict=True)),
            ]
        )  # fmt: skip
    headings = ("model", "rate", "loss", "exact, %", "KL", "loss at equal KL", "lower than B2I by", "lower than I2I by")
    return markdown_table(headings, lines)


def _overview(settings: Sequence[Setting]) -> str:
    lines = []
    for setting in settings:
        anchors = best_anchors(setting)
        columns = {"anchors": anchors, **{arm: arm for arm in CHANGED}}
        cells = [setting.name, _text(better_by(setting, "I", "B"))]
        for source in columns.values():
            for other in "BI":
                known = source is not None and source in setting.chosen
                cells.append(_text(better_by(setting, source, other) if known and source else None))
        cells.insert(2, NAMES[anchors] if anchors else NONE)
        lines.append(cells)
    headings = ["setting", "I2I against B2I", "best anchors"]
    for name in ("best anchors", *(NAMES[arm] for arm in CHANGED)):
        headings += [f"{name} against B2I", "against I2I"]
    return markdown_table(headings, lines)


def _text(found: Interval | None) -> str:
    return interval_text(found) if found else NONE


def plot(settings: Sequence[Setting], target: Path) -> None:
    """Learned against forgotten: the mean over seeds of every arm at its chosen rate, through its scales."""
    columns = min(2, len(settings))
    count = -(-len(settings) // columns)
    figure, axes = plt.subplots(count, columns, figsize=(5.6 * columns, 4.2 * count), squeeze=False)
    for axis, setting in zip(axes.flat, settings, strict=False):
        for number, (source, name) in enumerate(NAMES.items()):
            runs = setting.of(source) if source in setting.chosen else []
            if runs:
                scales = sorted(runs[0].path)
                axis.plot(
                    [fmean(run.divergence(s) for run in runs) for s in scales],
                    [fmean(run.learned(s) for run in runs) for s in scales],
                    color=plt.get_cmap("tab10")(number), marker="o", markersize=3,
                    linestyle="-" if source in ("B", "I") else "--" if source in ANCHORS else ":", label=name,
                )  # fmt: skip
        axis.set_title(setting.name, fontsize=9)
        axis.set_xlabel("KL from the Instruct (nats per token)", fontsize=8)
        axis.set_ylabel("learned (nats per token)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    for axis in axes.flat[len(settings) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def finished(results: Path, others: Path) -> list[Setting]:
    """The settings that have results, with the arms that another study has trained."""
    found = []
    for folder in sorted(results.glob("*/*_*/")):
        task, method = folder.name.rsplit("_", 1)
        pair = folder.parent.name
        home = results if (results / pair / f"{task}_untouched.json").exists() else others
        setting = Setting(home, pair, task, method)
        if home != results:
            files = sorted(folder.glob("*_seed*.json"))
            setting.runs += [Run(json.loads(file.read_text()), setting.instruct) for file in files]
        if {"B", "I"} <= set(setting.chosen):
            found.append(setting)
    return found


def write_report(results: Path, home: Path, others: Path) -> None:
    """Write ``REPORT.md`` and its plot into ``home``."""
    settings = finished(results, others)
    if not settings:
        return
    plot(settings, home / "learned_against_kl.png")
    parts = [_HEAD, "## What decides", _DECIDES, _overview(settings), "![learned against KL](learned_against_kl.png)"]
    for setting in settings:
        parts += [f"## {setting.name}", _scores(setting)]
    replace_text(home / REPORT, paragraphs([part.strip() for part in parts]))
