"""The report over several settings: an overview, what holds over all of them, and a section for each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from shadowlit.errors import DataError
from shadowlit.studies.arms import ARMS
from shadowlit.studies.comparison.plots import plot_predicting
from shadowlit.studies.comparison.report import (
    CORRELATED,
    CORRELATION,
    correlation_row,
    counted,
    interval_text,
    origin,
    render,
    score_text,
    write,
)
from shadowlit.studies.comparison.summary import COMPARED, FACTS, Description, Report, correlate, in_words
from shadowlit.studies.report import NONE, bullets, markdown_table, paragraphs, write_files
from shadowlit.studies.rows import LR


def write_combined(reports: Mapping[str, Report], description: Description, folder: Path) -> Path:
    """Write the reports of several settings as one: a folder of plots for each setting, and one text.

    Args:
        reports: Reports by name of the setting.
        description: Subject of the whole.
        folder: Folder for ``REPORT.md``, ``table.csv`` of all settings (which has the axis ``setting``) and the plot
            ``predicting``.

    Returns:
        Path of ``REPORT.md``.
    """
    text = combine(reports, description)
    for name, report in reports.items():
        write(report, folder / name)
    figure = plot_predicting({name: report.predictions for name, report in reports.items()})
    rows = [
        replace(row, setting={"setting": name, **row.setting})
        for name, report in reports.items()
        for row in report.rows
    ]
    return write_files(folder, text, rows, ("setting", LR), {"predicting": figure})


def combine(reports: Mapping[str, Report], description: Description) -> str:
    """The reports of several settings as one in Markdown: an overview, sentences over all, a section for each.

    Args:
        reports: Reports by name of the setting, which is also the folder of its plots.
        description: Subject of the whole.

    Raises:
        DataError: There are none.
    """
    if not reports:
        raise DataError("there are no reports to combine. Give at least one setting.")
    parts = [
        f"# {description.title}",
        origin(description),
        "Mean score over a setting's evaluators in % on the reported half of their rows, each arm at the rate that "
        "was best on the other half; mean ± standard error over seeds. Differences in points with their 95 % interval, "
        "by a bootstrap where none is called exact.",
        f"## Overview\n\n{_overview(reports)}",
        "## Over all settings\n\n" + bullets([_over_all(reports, i) for i in range(len(COMPARED))]),
        f"## What might predict the gain, over all settings\n\n{_pooled(reports)}\n\n![predictors](predicting.png)",
    ]
    parts += [render(report, level=2, plots=f"{quote(name)}/") for name, report in reports.items()]
    return paragraphs([part.strip() for part in parts])


def _pooled(reports: Mapping[str, Report]) -> str:
    pooled = correlate([prediction for report in reports.values() for prediction in report.predictions])
    rows = []
    for fact in FACTS:
        within = [report.correlations[fact].rho for report in reports.values()]
        within = [rho for rho in within if math.isfinite(rho)]
        median = f"{statistics.median(within):+.2f} ({len(within)})" if within else NONE
        rows.append([*correlation_row(pooled, fact), median])
    return (
        f"{CORRELATED} Runs of one setting share pair, rows and rates: there are fewer independent cases than runs, "
        "and what differs between settings is the task before all else. Next to it, the median of the correlations "
        f"within the settings, and of how many.\n\n{markdown_table([*CORRELATION, 'median ρ within settings'], rows)}"
    )


def _overview(reports: Mapping[str, Report]) -> str:
    rows = []
    for name, report in reports.items():
        means = {standing.arm: score_text(standing["reported/mean"]) for standing in report.table}
        differences = [interval_text(comparison.intervals.get("mean")) for comparison in report.comparisons]
        rows.append([name, *(means[arm] for arm in ARMS), *differences])
    return markdown_table(["setting", *ARMS, *(f"{a} − {b}" for a, b in COMPARED)], rows)


def _over_all(reports: Mapping[str, Report], index: int) -> str:
    """In how many settings the one arm is better, in how many the other."""
    a, b = map(in_words, COMPARED[index])
    intervals = {name: report.comparisons[index].intervals.get("mean") for name, report in reports.items()}
    compared = {name: interval for name, interval in intervals.items() if interval is not None}
    groups = {sign: [name for name, interval in compared.items() if interval.sign == sign] for sign in (1, -1, 0)}
    absent = [name for name in reports if name not in compared]

    def told(names: Sequence[str]) -> str:
        return f" ({', '.join(names)})" if names else ""

    text = (
        f"{a} is better than {b} in {len(groups[1])} of {counted(len(compared), 'setting')}{told(groups[1])}, worse in "
        f"{len(groups[-1])}{told(groups[-1])}; no difference could be shown in {len(groups[0])}{told(groups[0])}."
    )
    if absent:
        text += f" Not comparable in {len(absent)}{told(absent)}."
    return text + (
        f" By chance alone, about {0.05 * len(compared):.1f} of {len(compared)} intervals of 95 % would leave out zero."
        if len(compared) > 1
        else ""
    )
