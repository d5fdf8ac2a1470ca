"""The report of the study, from the result files alone: tables, the plot of learned against forgotten, predictors."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.real.premise import AS_IS
from experiments.real.reading import read_result
from experiments.real.rows import NUM_EARLY
from shadowlit.errors import DataError
from shadowlit.files import replace_text
from shadowlit.studies.report import NONE, REPORT, markdown_table, mean_text, paragraphs
from shadowlit.studies.statistics import Interval, average, paired_bootstrap, spearman

_HEAD = """\
# Shadow-FT on a real language model

Made by `python experiments/real/study.py --shared ../shared` from the result files in `results/`.

**Models.** The Base is Gemma 3 270M, pre-trained, dequantised from 4 bits, with its vocabulary cut to the 48,962 \
tokens of the data (132M parameters left). Its published Instruct is not used: both Instructs are made here from \
this Base by full tuning on 535 short Alpaca and identity rows with Gemma's turns. *near* has 2 epochs (learning \
rate 5e-5); *far* continues it with 2 more at 1e-4, and then one of DPO on 39 preference pairs at 1e-5. Such \
Instructs are far less trained than a published one.

**Tasks.** Tool calls (glaive, 40 training rows of at most 1,000 characters, no call or request twice) in 3 epochs; \
GSM8K solutions (128 training rows of at most 400 characters) in 1 epoch; the same solutions behind the phrase "The \
solution is as follows:". Its first word is the one that the near Instruct begins with most often: 30 of its greedy \
answers to the first 64 training questions do, and none with the phrase; the most frequent first three words, "The \
total number", begin 7. 8 rows per step, LoRA of rank 16 on all linear layers. In full tuning all weights are trained, \
but both arms are scored with the update of the linear layers alone, which is all that a graft has by default \
(`graft.select: linear`). On the four rows that are validated during a training, the rest changed the loss of direct \
tuning by 0.005 nats at most, at its chosen rate.

The rows of a task are in one part only, but some resemble each other: a reported tool call may differ from a \
trained one in a few words, or call the same tool.

**Arms.** B2I trains the Base and adds scale × Δ to the Instruct; I2I trains the Instruct, and its own update is \
scaled in the same way. Each arm's learning rate is the one with the lowest loss on rows for choosing (first seed, \
scale 1); the scores in the tables of the settings are from other rows. Further seeds are run at the chosen rates. \
Some of the kept runs are at rates that were chosen before larger ones were tried, or that are no longer tried (2e-4 \
on GSM8K); they count in what predicts the winner. A setting names the digests of its recipe (configuration and rows) \
and of the weights of its models: an Instruct that is made again on another kind of CPU differs in its last digits.

**Scores.** Losses are nats per supervised token of the model as exported, rounded to bfloat16; it is trained and \
scored in float32. *first token* is the loss of an answer's first token, *rest* \
that of all others, *exact* the share of rows whose every token is the most probable one. *KL* is KL(model ‖ \
untouched Instruct) per token of 24 held-out Alpaca answers, and *Alpaca loss* and *identity loss* are the losses on \
held-out rows of what the Instruct was tuned on (two of the 16 identity answers are in its training rows under other \
questions). *learned* is the untouched Instruct's loss minus the model's, on the reported rows.

Values are means ± standard errors over seeds. Intervals are of 95 %, by a bootstrap over rows, widened by the \
spread between seeds; with one seed they are over rows alone.
"""
_OVERVIEW = """\
*B2I better by* is how much lower B2I's loss is, in nats per token; below zero, direct tuning is better. The \
comparison at equal KL takes the smaller of both arms' divergences at scale 1, and scales the other arm's update \
down until it diverges as much. Between the measured scales, and between the untouched Instruct and the smallest one, \
losses are linear in the square root of the divergence. This makes the loss of the scaled arm too high where it is \
convex, most of all below its smallest scale, where a value is marked with *. Intervals are not corrected for their \
number.
"""
_PREMISE = """\
The paper reports that the Base starts with a loss 22.6 % lower and a gradient 3.25 times smaller than the \
Instruct's. Here: loss per token, and norm of its gradient by all weights, on the first 16 training rows.
"""
_PREDICTORS = """\
Spearman's rank correlation of what is known of a training with B2I's advantage in loss at equal KL over the I2I of \
the same rate and seed, over the runs of this study that have such a partner, and over those together with the runs of \
the embedded pair in [another study](../beyond/REPORT.md), whose loss is that of an answer's value. What the untouched \
models do is known before training, the gain at the first validation after 12 to 25 % of it, ‖Δ‖ at its end, and the \
cosine only once the Instruct has been trained too. How much of the update survives rounding was kept of the later \
runs only. Runs of one setting share rows and models, so there are far fewer independent cases than runs.

The last two columns predict which arm is better, by one threshold (or none, if that fits as well) that was fitted on \
the other settings, or on the other tasks: LoRA and full tuning of one task start from the same losses and gradients, \
so that a task is predicted from itself unless both are left out.
"""
_COPIES = """\
Losses of GSM8K's solutions under the untouched models (arXiv 2601.13244: Bases beat their Instructs on some tasks, \
and Instructs lose more on perturbed questions), in turns or as plain text, with and without two solved examples, \
on the first 24 reported rows and on their copies with other names, other numbers (and the solution recomputed), \
numbers in words, or a sentence that does not matter. A copy costs what its mean loss per token is above that of its \
original.
"""
_GENERATED = """\
Greedy answers with the first seed, scale 1: right on the first 24 reported rows (the same JSON; the same last \
number), ended before the limit, and forms on request (16 prompts such as "answer with yes or no only", checked by a \
pattern).
"""
_ANSWERS = "Greedy, cut after 64 tokens; prompts are held-out Alpaca rows."
Rows = np.ndarray  # [N, 5]: summed loss, tokens, first token's loss, exact, summed divergence from the Instruct
LOSS, TOKENS, FIRST, EXACT, KL = range(5)
TASKS = {
    "tools": "tool calls",
    "gsm8k": "GSM8K solutions",
    "gsm8k_opened": "GSM8K solutions that open with one phrase",
}
ARMS = {"B": "B2I", "I": "I2I"}
COLOURS = {"B": "tab:blue", "I": "tab:orange"}
SCALES = (0.5, 1.0, 1.5)


def rows(values: Sequence[Sequence[float]]) -> Rows:
    """Scores of a set as an array; without a divergence it is zero, as the Instruct's own is."""
    return np.array([[*row, 0.0][:5] for row in values])


def per_token(found: Rows, column: int = LOSS) -> float:
    """A sum over all rows divided by their tokens."""
    return float(found[:, column].sum() / found[:, TOKENS].sum())


def rest(found: Rows) -> float:
    """Loss per token without the first one of every answer."""
    return float((found[:, LOSS] - found[:, FIRST]).sum() / (found[:, TOKENS] - 1).sum())


@dataclass(frozen=True)
class Run:
    """A training and its scores."""

    raw: Mapping[str, Any]
    instruct: Mapping[str, Rows]

    @property
    def source(self) -> str:
        """B or I."""
        return str(self.raw["source"])

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return float(self.raw["lr"])

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return int(self.raw["seed"])

    @cached_property
    def path(self) -> dict[float, dict[str, Rows]]:
        """Scores by scale of the update, from the untouched Instruct at 0."""
        scores = {float(scale): sets for scale, sets in self.raw["scores"].items() if scale != "B2B"}
        measured = {scale: {name: rows(v) for name, v in scores[scale].items()} for scale in sorted(scores)}
        return {0.0: dict(self.instruct), **measured}

    def learned(self, scale: float) -> float:
        """Decrease of the loss on the reported rows, in nats per token."""
        return per_token(self.instruct["report"]) - per_token(self.path[scale]["report"])

    def divergence(self, scale: float) -> float:
        """Divergence from the Instruct on Alpaca's held-out answers, in nats per token."""
        return per_token(self.path[scale]["general"], KL)

    def at_divergence(self, kl: float, name: str = "report") -> Rows | None:
        """Scores of a set where the path first diverges so far; None if it never does.

        Linear in the square root of the divergence between the measured scales: near the Instruct a divergence grows
        with the square of the scale.
        """
        for low, high in itertools.pairwise(sorted(self.path)):
            a, b = (math.sqrt(max(0.0, self.divergence(scale))) for scale in (low, high))
            if a <= math.sqrt(kl) <= b:
                share = (math.sqrt(kl) - a) / (b - a) if b > a else 0.0
                return (1 - share) * self.path[low][name] + share * self.path[high][name]
        return None


def read_run(file: Path, instruct: Mapping[str, Rows]) -> Run:
    """The run in a result file; a DataError that names the file if it is damaged."""

    def checked(raw: Any) -> Run:
        run = Run({**raw, "norm": float(raw["norm"]), "live": dict(raw["live"])}, instruct)
        scores = [float(each.sum()) for sets in run.path.values() for each in sets.values()]
        numbers = [run.lr, run.seed, *scores, *map(run.learned, run.path), *map(run.divergence, run.path)]
        if not run.source or not all(np.isfinite(numbers)):
            raise ValueError("its source, rate, seed or scores are not such")
        return run

    return read_result(file, checked)


def _untouched(raw: Mapping[str, Any]) -> dict[str, Rows]:
    """The scores of an untouched model by set."""
    found = {name: rows(values) for name, values in raw.items() if name != "initial"}
    if not np.isfinite(per_token(found["report"])):
        raise ValueError("its scores are not finite")
    return found


class Setting:
    """All results of one pair, task and method."""

    def __init__(self, results: Path, pair: str, task: str, method: str) -> None:
        self.pair, self.task, self.method = pair, task, method
        file = results / pair / f"{task}_untouched.json"
        self.untouched, self.instruct, self.base = read_result(
            file, lambda raw: (raw, _untouched(raw["instruct"]), _untouched(raw["base"]))
        )
        cosines = results / pair / f"{task}_{method}_cosines.json"
        self.cosines: dict[str, float] = read_result(cosines, dict) if cosines.exists() else {}
        files = sorted((results / pair / f"{task}_{method}").glob("*_seed*.json"))
        self.runs = [read_run(file, self.instruct) for file in files]
        for source in sorted({run.source for run in self.runs}):
            if len({run.raw.get("recipe") for run in self.runs if run.source == source}) > 1:
                raise DataError(
                    f"the results of {source} in {results / self.pair}/{task}_{method} are from trainings by different "
                    "recipes, so they can't be compared. Run the study of this setting, which makes them again."
                )

    @property
    def name(self) -> str:
        """Pair, task and method."""
        return f"{self.pair}/{self.task}_{self.method}"

    @cached_property
    def chosen(self) -> dict[str, float]:
        """The rate of each arm with the lowest loss on the rows for choosing, at scale 1, with the first seed."""
        best: dict[str, tuple[float, float]] = {}
        for run in self.runs:
            if run.seed == 0:
                found = (per_token(run.path[1.0]["choice"]), run.lr)
                best[run.source] = min(best.get(run.source, found), found)
        return {source: lr for source, (_, lr) in best.items()}

    def of(self, source: str) -> list[Run]:
        """The runs of an arm at its chosen rate, by seed."""
        return sorted(
            (r for r in self.runs if r.source == source and r.lr == self.chosen[source]), key=lambda r: r.seed
        )

    def matched(self) -> Iterator[tuple[Run, Run]]:
        """Both arms' runs at their chosen rates with equal seeds."""
        others = {run.seed: run for run in self.of("I")}
        for run in self.of("B"):
            if run.seed in others:
                yield run, others[run.seed]


def choose_rates(results: Path, pair: str, task: str, method: str) -> dict[str, float]:
    """The chosen rate of each arm."""
    return Setting(results, pair, task, method).chosen


def advantage(pairs: Iterable[tuple[Rows, Rows]]) -> Interval:
    """How much lower the first rows' loss per token is than the second's, over seeds, with its interval."""
    found = list(pairs)
    tokens = found[0][0][:, TOKENS]
    differences = np.stack([(b[:, LOSS] - a[:, LOSS]) / tokens for a, b in found])
    return paired_bootstrap({"loss": differences}, [["loss"]], weights={"loss": tokens})[0]


def common_divergence(one: Run, other: Run) -> float:
    """The smaller of two runs' divergences at scale 1, to which both are scaled."""
    return min(one.divergence(1.0), other.divergence(1.0))


def at_equal_divergence(setting: Setting) -> tuple[list[float], list[tuple[Rows, Rows]]]:
    """For every seed the smaller of the arms' divergences at scale 1, and both arms' reported rows there."""
    levels, pairs = [], []
    for graft, direct in setting.matched():
        kl = common_divergence(graft, direct)
        one, other = graft.at_divergence(kl), direct.at_divergence(kl)
        if one is not None and other is not None:
            levels.append(kl)
            pairs.append((one, other))
    return levels, pairs


def is_extrapolated(setting: Setting) -> bool:
    """Whether equal divergence lies below an arm's smallest measured scale for some seed."""
    return any(
        common_divergence(*arms) < max(run.divergence(min(SCALES)) for run in arms) for arms in setting.matched()
    )


def shown(values: Sequence[float], digits: int = 3) -> str:
    return mean_text(average(values), lambda value: f"{value:.{digits}f}")


def _line(name: str, sets: Sequence[Mapping[str, Rows]]) -> list[str]:
    report, general = [s["report"] for s in sets], [s["general"] for s in sets]
    who = [s["identity"] for s in sets if "identity" in s]
    return [
        name,
        shown([per_token(r) for r in report]),
        shown([fmean(r[:, FIRST]) for r in report]),
        shown([rest(r) for r in report]),
        shown([100 * fmean(r[:, EXACT]) for r in report], 1),
        shown([per_token(r, KL) for r in general]),
        shown([per_token(r) for r in general]),
        shown([per_token(r) for r in who]) if who else "–",
    ]


def _scores(setting: Setting) -> str:
    lines = [_line("Base", [setting.base]), _line("Instruct", [setting.instruct])]
    if setting.of("B"):
        tuned = [{name: rows(v) for name, v in run.raw["scores"]["B2B"].items()} for run in setting.of("B")]
        lines.append(_line("B2B", tuned))
    for source, arm in ARMS.items():
        for scale in SCALES:
            lines.append(_line(f"{arm}, scale {scale:g}", [run.path[scale] for run in setting.of(source)]))
    headings = ("model", "loss", "first token", "rest", "exact, %", "KL", "Alpaca loss", "identity loss")
    return markdown_table(headings, lines)


def _rates(setting: Setting) -> str:
    """The chosen rates, and whether a better one may lie beyond those that were tried."""
    said = []
    for source, lr in setting.chosen.items():
        tried = sorted({run.lr for run in setting.runs if run.source == source and run.seed == 0})
        edge = {tried[0]: "the smallest", tried[-1]: "the largest"}.get(lr)
        edge = "the only one" if len(tried) == 1 else edge
        said.append(f"{ARMS[source]} {lr:g}" + (f" ({edge} tried: a better one may lie beyond)" if edge else ""))
    recipes = dict.fromkeys(str(run.raw.get("recipe")) for run in setting.runs)
    models = Counter(str(run.raw.get("models", "not recorded")) for run in setting.runs)
    made = ", ".join(f"{name} ({count} of {models.total()} runs)" for name, count in models.items())
    return f"Chosen rates: {', '.join(said)}. Recipe: {', '.join(recipes)}. Models: {made}."


def interval_text(found: Interval) -> str:
    """A difference with its interval, or that rows and seeds have no spread to make one of."""
    if found.is_degenerate:
        return f"{found.difference:+.3f} (no interval: no spread)"
    return f"{found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _verdict(found: Interval) -> str:
    return {1: "B2I", -1: "I2I", 0: "no difference shown"}[found.sign]


def _overview(settings: Sequence[Setting]) -> str:
    lines = []
    for setting in settings:
        pairs = list(setting.matched())
        full = advantage((a.path[1.0]["report"], b.path[1.0]["report"]) for a, b in pairs)
        levels, equal = at_equal_divergence(setting)
        same = advantage(equal) if equal else None
        lines.append(
            [
                setting.name,
                f"{setting.chosen['B']:g}, {setting.chosen['I']:g}",
                str(len(pairs)),
                f"{shown([a.learned(1.0) for a, _ in pairs])}",
                f"{shown([b.learned(1.0) for _, b in pairs])}",
                f"{fmean(a.divergence(1.0) for a, _ in pairs):.3f}, {fmean(b.divergence(1.0) for _, b in pairs):.3f}",
                interval_text(full),
                f"{fmean(levels):.3f}" if levels else "–",
                interval_text(same) + ("*" if is_extrapolated(setting) else "") if same else "–",
                _verdict(same) if same else "–",
            ]
        )
    headings = (
        "setting", "rates", "seeds", "B2I learned", "I2I learned", "KL of both", "B2I better by, at scale 1",
        "equal KL", "B2I better by, there", "better there",
    )  # fmt: skip
    return markdown_table(headings, lines)


def plot(settings: Sequence[Setting], target: Path) -> None:
    """Learned against forgotten: a line per training through its scales, thick at the chosen rate."""
    columns = min(3, len(settings))
    count = -(-len(settings) // columns)
    figure, axes = plt.subplots(count, columns, figsize=(4.6 * columns, 3.8 * count), squeeze=False)
    for axis, setting in zip(axes.flat, settings, strict=False):
        for run in setting.runs:
            scales = sorted(run.path)
            best = run.lr == setting.chosen[run.source]
            axis.plot(
                [run.divergence(s) for s in scales], [run.learned(s) for s in scales],
                color=COLOURS[run.source], marker="o", markersize=3.5 if best else 2, linewidth=1.8 if best else 0.8,
                alpha=1.0 if best else 0.45,
                label=ARMS[run.source] if best and run.seed == 0 else None,
            )  # fmt: skip
        tuned = per_token(setting.instruct["report"]) - per_token(setting.base["report"])
        limits = axis.get_ylim()
        axis.axhline(tuned, color="grey", linestyle=":", label=f"untouched Base ({tuned:+.2f})")
        if tuned < limits[0]:  # far below, where it would press the lines together
            axis.set_ylim(limits)
    save(figure, settings, target, "KL from the Instruct, Alpaca (nats per token)")


def save(figure: Figure, settings: Sequence[Setting], target: Path, xlabel: str) -> None:
    """Label the axes of a figure that has one for each setting, hide the others, and save it."""
    for number, axis in enumerate(figure.axes):
        axis.set_visible(number < len(settings))
        if number < len(settings):
            axis.set_title(settings[number].name, fontsize=9)
            axis.set_xlabel(xlabel, fontsize=8)
            axis.set_ylabel("learned (nats per token)", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def predictors(setting: Setting, run: Run) -> dict[str, float]:
    """What is known of a training of the Base before its end."""
    live = run.raw["live"]
    early = {who: live[f"val/{who}/loss"][0][1] for who in ("tuned", "grafted") if f"val/{who}/loss" in live}
    base = setting.base["choice"]
    start, untouched = setting.instruct["choice"], setting.untouched
    first_rows = setting.instruct.get("early", start[:NUM_EARLY])
    (base_loss, base_norm), (instruct_loss, instruct_norm) = (untouched[who]["initial"] for who in ("base", "instruct"))
    known = {
        "σ of the pair": untouched["offset"]["sigma"],
        "cos(Δ_B, Δ_I)": setting.cosines.get(f"lr{run.lr:g}_seed{run.seed}", np.nan),
        "‖Δ‖ / ‖offset‖": run.raw["norm"] / untouched["offset"]["offset"],
        "first-token loss of the Instruct": fmean(start[:, FIRST]),
        "first-token loss, Instruct − Base": fmean(start[:, FIRST] - base[:, FIRST]),
        "initial loss, Base / Instruct": base_loss / instruct_loss,
        "initial gradient, Base / Instruct": base_norm / instruct_norm,
    }  # fmt: skip
    if "graft/survival" in live:
        known["survival of the update at its end"] = live["graft/survival"][-1][1]
    if len(early) == 2:
        known["gain of the graft at the first validation"] = per_token(first_rows) - early["grafted"]
    return known


@dataclass(frozen=True)
class Case:
    """A B2I run that has an I2I run of its rate and seed, and what it gains over it at equal KL, in nats per token."""

    setting: str
    task: str
    known: Mapping[str, float]
    gain: float
    gains_at_whole: bool


def cases_of(settings: Sequence[Setting]) -> list[Case]:
    """The cases of all settings, where both arms can be scaled to the same divergence."""
    cases = []
    for setting in settings:
        direct = {(run.lr, run.seed): run for run in setting.runs if run.source == "I"}
        for run in setting.runs:
            other = direct.get((run.lr, run.seed))
            if run.source != "B" or other is None:
                continue
            kl = common_divergence(run, other)
            one, two = run.at_divergence(kl), other.at_divergence(kl)
            if one is not None and two is not None:
                cases.append(
                    Case(
                        setting.name, f"{setting.pair}/{setting.task}", predictors(setting, run),
                        per_token(two) - per_token(one), run.learned(1.0) > other.learned(1.0),
                    )
                )  # fmt: skip
    return cases


def _prediction(settings: Sequence[Setting], others: Sequence[Setting]) -> str:
    """Rank correlations with B2I's advantage at equal KL over the I2I of the same rate and seed, and a rule.

    The correlations are over the runs of ``settings``, and over those and the ones of ``others``.
    """
    cases = cases_of([*settings, *others])
    here = {setting.name for setting in settings}
    if len({case.setting for case in cases}) < 2:
        return "This takes two settings with both arms at one rate."
    lines = []
    for name in sorted({name for case in cases for name in case.known}):
        own = [case for case in cases if not math.isnan(case.known.get(name, math.nan))]
        values, gains = (np.array(of) for of in ([case.known[name] for case in own], [case.gain for case in own]))
        groups = [case.setting for case in own], [case.task for case in own]
        if len(set(values)) < 2 or len(set(groups[1])) < 2:
            why = "the same in all runs" if len(set(values)) < 2 else "of one task only"
            lines.append([name, "–", "–", str(len(own)), why, "–", "–"])
            continue
        inside = np.array([case.setting in here for case in own])
        rhos = [_rho(values[chosen], gains[chosen]) for chosen in (inside, np.full_like(inside, True))]
        span = f"{values.min():.3g} to {values.max():.3g}"
        mixed = len(set(gains > 0)) == 2
        hits = [f"{leave_one_out(names, values, gains > 0):.0%}" if mixed else "–" for names in groups]
        lines.append([name, *rhos, str(len(own)), span, *hits])
    headings = (
        "known", "ρ in this study", "ρ over all", "n of all", "values", "hits of a threshold, leave one setting out",
        "leave one task out",
    )  # fmt: skip
    text = markdown_table(headings, lines)
    num_better = sum(case.gain > 0 for case in cases)
    said = (
        f"B2I has the lower loss at equal KL in {num_better} of {len(cases)} cases (at scale 1, whatever "
        f"the KL, in {sum(case.gains_at_whole for case in cases)})"
    )
    if num_better in (0, len(cases)):
        return f"{text}\n\n{said}: with one outcome alone, no rule that predicts it can be tested."
    majority = max(num_better, len(cases) - num_better) / len(cases)
    right_of = {case.setting: [0, 0] for case in cases}
    for case in cases:
        right_of[case.setting][0] += (case.known["initial loss, Base / Instruct"] < 1) == (case.gain > 0)
        right_of[case.setting][1] += 1
    told = ", ".join(f"{name} {right} of {count}" for name, (right, count) in right_of.items())
    return (
        f"{text}\n\n{said}, so always naming the more frequent outcome hits {majority:.0%}. The method's premise as a "
        "rule, with nothing fitted (B2I where the Base's loss on the first 16 training rows is below the Instruct's), "
        f"is right in {sum(right for right, _ in right_of.values())} of {len(cases)}: {told}."
    )


def _rho(values: np.ndarray, gains: np.ndarray) -> str:
    """Spearman's rank correlation, where the values differ."""
    return f"{spearman(values.tolist(), gains.tolist()).rho:+.2f}" if len(set(values)) > 1 else NONE


def leave_one_out(names: Sequence[str], values: np.ndarray, better: np.ndarray) -> float:
    """Share of right predictions of ``better`` by a threshold on ``values`` that was fitted on the other groups.

    Where no threshold fits better than the more frequent outcome of the other groups, that is predicted.
    """
    groups = np.array(names)
    hits = 0
    for name in dict.fromkeys(names):
        inside = groups == name
        known, truth = values[~inside], better[~inside]
        distinct = np.unique(known)
        rules = [(math.inf, 1), (-math.inf, 1), *((t, s) for t in (distinct[:-1] + distinct[1:]) / 2 for s in (1, -1))]
        threshold, sign = max(rules, key=lambda ts: ((ts[1] * (known - ts[0]) > 0) == truth).mean())
        hits += int(((sign * (values[inside] - threshold) > 0) == better[inside]).sum())
    return hits / len(names)


def _premise(settings: Sequence[Setting]) -> str:
    lines = []
    for setting in {(s.pair, s.task): s for s in settings}.values():
        base, instruct = setting.untouched["base"]["initial"], setting.untouched["instruct"]["initial"]
        offset = setting.untouched["offset"]
        lines.append(
            [
                f"{setting.pair}/{setting.task}", f"{offset['sigma']:.4f}",
                f"{base[0]:.3f}, {instruct[0]:.3f}", f"{base[0] / instruct[0] - 1:+.1%}",
                f"{base[1]:.2f}, {instruct[1]:.2f}", f"{instruct[1] / base[1]:.2f}",
                f"{fmean(setting.base['report'][:, FIRST]):.2f}, {fmean(setting.instruct['report'][:, FIRST]):.2f}",
            ]
        )  # fmt: skip
    headings = (
        "pair and task", "σ", "initial loss of Base, Instruct", "Base against Instruct",
        "gradient norm of Base, Instruct",
        "Instruct's / Base's", "first-token loss of Base, Instruct",
    )  # fmt: skip
    return markdown_table(headings, lines)


def _premise_on_copies(results: Path, pair: str) -> str:
    """Losses of the untouched models on rows and their copies, and how much a copy costs each of them."""
    raw = read_result(results / pair / "premise.json", dict)
    lines = []
    for key in raw["base"]:
        form, shots, copy = key.split("/")
        plain = f"{form}/{shots}/{AS_IS}"
        cells = [f"{'turns' if form == 'chat' else 'plain text'}, {shots} examples", copy, str(len(raw["base"][key]))]
        costs = []
        for who in ("base", "instruct"):
            scores = {int(number): row for number, *row in raw[who][key]}
            before = {int(number): row for number, *row in raw[who][plain]}
            new, old = rows(list(scores.values())), rows([before[number] for number in scores])
            cells.append(f"{per_token(new):.3f}")
            costs.append((old, new))
        if copy == AS_IS:
            (_, base), (_, instruct) = costs
            cells += [interval_text(advantage([(base, instruct)])), NONE, NONE]
        else:
            cells += [NONE, *(interval_text(_more(old, new)) for old, new in costs)]
        lines.append(cells)
    headings = (
        "asked in", "rows", "n", "Base", "Instruct", "Base lower by", "the copy costs the Base", "the Instruct",
    )  # fmt: skip
    return markdown_table(headings, lines)


def _more(old: Rows, new: Rows) -> Interval:
    """How much higher the mean loss per token of copies is, over rows; a copy may have other numbers of tokens."""
    difference = new[:, LOSS] / new[:, TOKENS] - old[:, LOSS] / old[:, TOKENS]
    return paired_bootstrap({"loss": difference[None]}, [["loss"]])[0]


def _answers(raw: Mapping[str, Any]) -> str:
    lines = []
    for name, given in raw["answers"].items():
        task, forms, general = (given[part] for part in ("task", "forms", "general"))
        lines.append(
            [
                name, f"{sum(right for _, right, _ in task)} of {len(task)}",
                f"{sum(ended for _, _, ended in task)} of {len(task)}",
                f"{sum(right for _, right, _ in forms)} of {len(forms)}",
                f"{sum(ended for _, _, ended in general)} of {len(general)}",
            ]
        )  # fmt: skip
    return markdown_table(("model", "right", "ended", "forms as asked", "general answers ended"), lines)


def _read(raw: Mapping[str, Any], name: str) -> str:
    """The general answers of a model, to be read."""
    pairs = zip(raw["prompts"], raw["answers"][name]["general"], strict=True)
    flat = lambda text: " ".join(text.split()).replace("|", "\\|")  # noqa: E731
    return markdown_table(("asked", "answer"), [[flat(asked), flat(answer)] for asked, (answer, *_) in pairs])


def finished(results: Path) -> list[Setting]:
    """The settings that have a training of both arms."""
    found = []
    for folder in sorted(results.glob("*/*_*/")):
        task, method = folder.name.rsplit("_", 1)
        setting = Setting(results, folder.parent.name, task, method)
        if set(setting.chosen) == {"B", "I"}:
            found.append(setting)
    order = list(TASKS)
    return sorted(found, key=lambda s: (s.pair != "near", s.method != "lora", order.index(s.task)))


def embedded(results: Path) -> list[Setting]:
    """The settings of the embedded pair, from the results of the study of methods beyond the paper."""
    folders = [folder.name.rsplit("_", 1) for folder in sorted(results.glob("embedded/*_*/"))]
    found = [Setting(results, "embedded", task, method) for task, method in folders]
    return [setting for setting in found if {"B", "I"} <= set(setting.chosen)]


def write_report(results: Path, home: Path) -> None:
    """Write ``REPORT.md`` and its plot into ``home``."""
    settings = finished(results)
    if not settings:
        return
    plot(settings, home / "learned_against_kl.png")
    parts = [_HEAD, "## Overview", _OVERVIEW, _overview(settings), "![learned against KL](learned_against_kl.png)"]
    parts += ["## The premise", _PREMISE, _premise(settings)]
    for pair in dict.fromkeys(setting.pair for setting in settings):
        if (results / pair / "premise.json").exists():
            parts += [f"### Other wordings: {pair}", _COPIES, _premise_on_copies(results, pair)]
    parts += [
        "## What predicts it",
        _PREDICTORS,
        _prediction(settings, embedded(home.parent / "beyond" / "results")),
    ]
    answered: dict[str, Any] = {}
    for setting in settings:
        parts += [f"## {setting.name}: {TASKS[setting.task]}", _rates(setting), _scores(setting)]
        file = results / setting.pair / f"{setting.task}_{setting.method}_answers.json"
        if file.exists():
            raw = read_result(file, dict)
            answered.setdefault(setting.pair, raw)
            parts += [_GENERATED, _answers(raw)]
    for pair, raw in answered.items():
        parts += [f"## Answers of the untouched Instruct: {pair}", _ANSWERS, _read(raw, "Instruct")]
    replace_text(home / REPORT, paragraphs([part.strip() for part in parts]))
