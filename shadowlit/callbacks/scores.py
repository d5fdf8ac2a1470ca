"""The scores that a fit ends with: the four models by validation set and evaluator, and the gain with its error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from shadowlit.evaluation.sums import standard_error
from shadowlit.progress import make_table
from shadowlit.text import number

SUBJECTS = {"base": "Base", "instruct": "Instruct", "tuned": "tuned Base", "grafted": "grafted Instruct"}
"""Titles of the four models, by the names of their metrics."""

_OPENS_OTHERWISE = 1.0  # nats


def error_of_gain(instruct: Tensor, grafted: Tensor) -> float:
    """Return the standard error of the difference of two models' losses per token, over the samples of one set.

    The samples are paired, and a loss per token is a ratio of sums, so this is the error of the mean of
    ``d_i - gain * n_i`` divided by the mean of ``n_i``, where ``d_i`` is the difference of a sample's losses and
    ``n_i`` its number of tokens (the linearised error of a ratio; Cochran, Sampling Techniques, 3rd ed., 6.3).

    Args:
        instruct: Summed loss and number of supervised tokens of each sample under the Instruct, ``[N, 2]``.
        grafted: The same of the grafted model.

    Returns:
        The error in nats per token; NaN for fewer than two samples, or if these are not the same samples.
    """
    if instruct.shape != grafted.shape or not instruct[:, 1].equal(grafted[:, 1]):
        return math.nan
    taken = instruct[:, 1] > 0
    difference, tokens = (instruct - grafted)[taken, 0].double(), instruct[taken, 1].double()
    residual = difference - difference.sum() / tokens.sum() * tokens
    error = standard_error(residual.sum().item(), residual.square().sum().item(), len(tokens))
    return error / tokens.mean().item()


def error_of_paired(first: Iterable[Mapping[str, float]], second: Iterable[Mapping[str, float]]) -> float:
    """Return the standard error of the mean difference of two models' scores, paired by ``index``; NaN where there are
    too few.
    """
    scores = {sample["index"]: sample["score"] for sample in first}
    pairs = [sample["score"] - scores[sample["index"]] for sample in second if sample["index"] in scores]
    return standard_error(sum(pairs), sum(x * x for x in pairs), len(pairs))


def survival_line(metrics: Mapping[str, float]) -> str:
    """Return how much of the update the exported weights hold, and what the rest is worth where that was measured."""
    norm, survival = metrics.get("graft/delta_norm", math.nan), metrics.get("graft/survival", math.nan)
    if norm == 0:
        return "survival: the update is zero"
    if math.isnan(survival):
        return "survival: not measured"
    line = f"survival: {survival:.1%} of the update is left after rounding to the export's dtype"
    if "graft/gain_unrounded" in metrics:
        line += (
            f"; the gain is {number(metrics['graft/gain'], signed=True)}, and without rounding "
            f"{number(metrics['graft/gain_unrounded'], signed=True)}"
        )
    return line


def opening_line(metrics: Mapping[str, float]) -> str | None:
    """Return a warning where the graft opens its answers otherwise than the tuned Base, or None.

    The update can carry the content of a task and not its format: the tuned Base opens an answer as the data do, and
    the graft does not; how it opens them instead, the losses don't say. The threshold is one nat, a first token that is
    2.7 times less probable.
    """
    who = ("tuned", "grafted", "instruct")
    tuned, grafted, instruct = (metrics.get(f"val/{each}/first_token_loss", math.nan) for each in who)
    if not grafted - tuned > _OPENS_OTHERWISE:
        return None
    untouched = "" if math.isnan(instruct) else f" ({number(instruct)} under the untouched Instruct)"
    return (
        f"openings: the first token of an answer has a loss of {number(grafted)} under the graft and of "
        f"{number(tuned)} under the tuned Base{untouched}: the graft is less likely to open its answers as the data "
        "do. Compare it with direct tuning (shadowlit compare), or try a larger scale (graft.scales)."
    )


def subject_headings() -> list[str]:
    """Return the titles of the four models as headings of columns, in two lines where they have two words."""
    return [title.replace(" ", "\n") for title in SUBJECTS.values()]


def score_table(
    metrics: Mapping[str, float], errors: Mapping[str, float], step: int | None = None, stage: str = "val"
) -> Table:
    """Return the scores of the four models, one row per set and evaluator.

    Args:
        metrics: Metrics of a validation by name.
        errors: Standard errors of gains by the name of what is compared, such as ``loss``, ``<set>/loss`` and
            ``<evaluator>/score``.
        step: Optimizer step at which they were measured, for the title.
        stage: Prefix of the metrics: val or test.
    """
    title = "Scores" if step is None else f"Scores at step {step:,}"
    headings = ("", *subject_headings(), "gain ±\nstandard error")
    drawn = make_table(*headings, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    prefix = f"{stage}/grafted/"
    names = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    for name in (name for what in ("loss", "score") for name in names if name.rpartition("/")[2] == what):
        values = {who: metrics.get(f"{stage}/{who}/{name}", math.nan) for who in SUBJECTS}
        gain = values["grafted"] - values["instruct"]
        if name.endswith("loss"):
            gain = -gain
        error = errors.get(name, math.nan)
        shown = "–" if math.isnan(gain) else number(gain, signed=True)
        if not math.isnan(gain + error):
            shown += f" ± {number(error, digits=3)}"
        place, _, what = name.rpartition("/")
        drawn.add_row(
            f"{place}: {what}" if place else what,
            *("–" if math.isnan(v) else number(v) for v in values.values()),
            shown,
        )
    return drawn
