"""``shadowlit compare``; the docstring is the help text."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.cli.functions import Changes
from shadowlit.errors import ShadowlitError
from shadowlit.files import replace_text
from shadowlit.masking import masked
from shadowlit.progress import make_console
from shadowlit.studies.comparison.plan import plan, rates_of_arms
from shadowlit.studies.comparison.scoring import Measure, read_measures
from shadowlit.studies.trials.recipe import Recipe

if TYPE_CHECKING:
    from shadowlit.lightning_cli import Measured


def compare(
    fit: str,
    arms: list[str] | str = "B2I,I2I",
    seeds: list[int] | str = "0,1,2",
    rates: dict[str, list[float]] | None = None,
    scales: list[float] = [1.0],  # noqa: B006 - read only, and shown by --help
    task_scales: list[float] = [],  # noqa: B006
    gain: list[str] | str | None = None,
    keep: list[str] | str | None = None,
    score: list[str] | str | None = None,
    choose: list[str] | str | None = None,
    line: str = "loss",
    overrides: Changes | None = None,
    title: str | None = None,
    out: str | None = None,
    workers: int = 1,
    threads: int | None = None,
    dry_run: bool = False,
) -> None:
    """Train and measure the arms of a pair, and report which differences the data support.

    An arm is named by the source of its delta and the target of the graft: B2I is Shadow-FT, I2I tunes the Instruct
    directly, B2B and I2B are the controls. Two trainings serve four arms: one of the Base and one of the Instruct, on
    the same data in the same order, with the same recipe. Finished trainings are skipped, so the same command resumes
    after an interruption, and arms, rates and seeds can be added. Arms are scored by evaluators, by metrics of the last
    validation, or by both. One half of each evaluator's rows chooses an arm's learning rate, and the other half is
    reported; metrics need two validation sets for that, one for choose and one for score.

    Args:
        fit: Configuration of fit, with evaluators in its section evaluation unless score is given.
        arms: Arms to compare, e.g. B2I,I2I,B2B,I2B.
        seeds: Seeds of data order, adapter and dropout, e.g. 0,1,2.
        rates: Learning rates of each arm, e.g. '{"B2I": [1e-4, 3e-4], "I2I": [3e-5, 1e-4]}'; an arm that is left out
            has the rates of the other arm of its source. Null for the configuration's own rate.
        scales: Scales λ of the graft at which the validation loss is measured; the first must be 1.0.
        task_scales: Scales, beyond the first, at which the evaluators measure too.
        gain: Evaluators of what is to be learned; null for all that aren't in keep and don't measure the agreement with
            the Instruct, or for none if score is given.
        keep: Evaluators of what is to be kept: they and the divergence from the Instruct are the price.
        score: Metrics of the last validation that say what was learned, each at the arm's own model, e.g.
            sequence_accuracy, or report/loss of the validation set report. A loss or a perplexity is better if it is
            lower, an accuracy if it is higher; of any other metric say so, as in margin:higher.
        choose: Metrics whose mean chooses the learning rates, e.g. choice/loss of the validation set choice; null for
            the scores themselves.
        line: Metric that is drawn along the line from the Instruct to the graft: loss, or <set>/loss.
        overrides: Further changes of the configuration, by dotted key.
        title: Title of the report; null for the configuration's name.
        out: Folder of trainings and report; null for runs/compare/<configuration>.
        workers: Number of trainings that run at a time. All of them see the same GPUs: with GPUs, leave it at 1.
        threads: Threads of torch for each training; null for torch's own choice.
        dry_run: Only list the trainings.
    """
    command = _command(locals())
    console = make_console()
    given = _listed(arms)
    recipe = Recipe(Path(fit), dict(overrides or {}), tuple(scales), tuple(task_scales))
    own = rates or {arm: [_own_rate(recipe)] for arm in given}
    trainings = plan(given, own, _seeds(seeds))
    scored, choosing = read_measures("score", _listed(score or [])), read_measures("choose", _listed(choose or []))
    if len(set(choosing.values())) > 1:
        raise ShadowlitError(
            f"--choose names {', '.join(choosing)}, which have no common mean. Choose by losses, or by accuracies."
        )
    evaluators = _evaluators(recipe, needed=not scored)
    gained, kept = None if gain is None else _listed(gain), _listed(keep or [])
    _require_known("gain", gained or [], evaluators)
    _require_known("keep", kept, evaluators)
    folder = Path(out) if out else Path("runs/compare") / Path(fit).stem
    if recipe.scales[:1] != (1.0,):
        raise ShadowlitError(f"--scales is {list(scales)}; the first must be 1.0, at which arms are compared.")
    for name, value in (("workers", workers), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise ShadowlitError(f"--{name} is {value}; expected at least 1.")
    if dry_run:
        console.print(f"{len(trainings)} trainings in {folder}: " + ", ".join(t.name for t in trainings))
        return
    from shadowlit.lightning_cli import check_measured
    from shadowlit.studies.comparison.collect import collect
    from shadowlit.studies.comparison.records import to_json
    from shadowlit.studies.comparison.report import write
    from shadowlit.studies.comparison.runner import own_folder, run
    from shadowlit.studies.comparison.summary import Description, summarise
    from shadowlit.studies.progress import StudyProgress
    from shadowlit.studies.rows import UNTOUCHED_TRIAL
    from shadowlit.studies.trials.process import last_words, untouched_failed
    from shadowlit.studies.trials.trial import LOG

    of_arms, planned = rates_of_arms(given, own), _seeds(seeds)
    measured = check_measured(list(trainings[0].job(recipe, folder).arguments))
    scored, choosing = _logged("score", scored, measured), _logged("choose", choosing, measured)
    if gained is None:  # an agreement with the Instruct is no sign that something was learned
        able = [name for name, evaluator in measured.evaluators.items() if not evaluator.needs_reference]
        gained = [] if scored else [name for name in able if name not in kept]
    if not scored and all(measured.evaluators[name].needs_reference for name in (*gained, *kept)):
        named = ", ".join((*gained, *kept)) or "each evaluator"
        raise ShadowlitError(
            f"no score says what is learned: {named} measures the agreement with the Instruct. Name another evaluator "
            "under --gain, or metrics of the validation under --score."
        )
    of_metrics = [name.rpartition("/")[0] for name in (*scored, *choosing)]
    agreements = [name for name, evaluator in measured.evaluators.items() if evaluator.needs_reference]
    used = [name for name in measured.evaluators if name in (*gained, *kept, *of_metrics, *agreements)]
    found = [recipe.untouched_job(folder, used)]
    for training in trainings:
        own_arms = [arm for arm, lrs in of_arms.items() if training.lr in lrs]
        found.append(training.job(recipe, folder, own_arms, used))
    with own_folder(folder, recipe):
        metric, in_process = next(iter(scored), "loss"), not recipe.is_distributed()
        with StudyProgress("trainings", len(found), metric) as shown:
            failed = run(
                found, folder, workers=workers, threads=threads, in_process=in_process, metric=metric, shown=shown
            )
        if UNTOUCHED_TRIAL in failed:
            raise untouched_failed(folder / UNTOUCHED_TRIAL)
        rows = collect(recipe, trainings, given, own, folder, line, [*scored])
        replace_text(folder / "records.json", to_json(rows))
        described = Description(title=title or Path(fit).stem, config=fit, command=command)
        summary = summarise(
            rows, described, gain=gained, keep=kept, score=scored, choose=choosing, arms=given, rates=of_arms,
            seeds=planned, agreements=agreements,
        )  # fmt: skip
        report = write(summary, folder / "report")
    console.print(f"report    {report}")
    if failed:
        reasons: dict[str, list[str]] = {}
        for name in failed:
            reasons.setdefault(last_words(folder / name).removesuffix("."), []).append(name)
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        logs = ", ".join(str(folder / name / LOG) for name in failed)
        raise ShadowlitError(
            f"{len(failed)} of {len(found)} jobs failed, and are missing in the report: {told}. Fix the cause, and "
            f"start the same command again. Logs: {logs}"
        )


def _logged(option: str, metrics: Mapping[str, Measure], measured: Measured) -> dict[str, Measure]:
    """The metrics by the names under which they are logged: of a single set without its name.

    Raises:
        ShadowlitError: A metric is not logged by any validation, or measures the agreement with the Instruct.
    """
    sets, known = measured.sets, [*sorted(measured.metrics)]
    if len(sets) > 1:
        known += [f"{name}/{what}" for name in sets for what in sorted(measured.metrics)]
    known += [f"{name}/{what}" for name, each in measured.evaluators.items() for what in each.metric_names]
    found = {}
    for given, measure in metrics.items():
        of, _, what = given.rpartition("/")
        evaluator = None if of in sets and what in measured.metrics else measured.evaluators.get(of)
        if evaluator is not None and evaluator.needs_reference:
            raise ShadowlitError(
                f"--{option} names {given}: {of} measures the agreement with the Instruct, and not what is learned. "
                f"Leave it out, or name {of} under --keep."
            )
        name = what if sets == [of] else given
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? Known" if near else "known"
            raise ShadowlitError(f"--{option} names {given}, which no validation logs; {hint} are {', '.join(known)}.")
        found[name] = measure
    return found


def _listed(value: list[Any] | str) -> list[Any]:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)


def _seeds(value: list[int] | str) -> list[int]:
    try:
        return [int(seed) for seed in _listed(value)]
    except ValueError:
        raise ShadowlitError(f"--seeds is {value!r}; expected whole numbers, e.g. 0,1,2.") from None


def _own_rate(recipe: Recipe) -> float:
    rate = recipe.get("model.lr")
    if rate is None:
        raise ShadowlitError(f"{recipe.config} has no model.lr, and no --rates are given. Give one of them.")
    return float(rate)


def _evaluators(recipe: Recipe, needed: bool) -> list[str]:
    found = recipe.get("evaluation.evaluators")
    if not found and needed:
        raise ShadowlitError(
            f"{recipe.config} has no evaluation.evaluators to compare the arms by, and --score is not given. Add "
            "evaluators (docs/reference/evaluation.md), or score by metrics of the validation, e.g. --score loss."
        )
    return list(found or ())


def _require_known(option: str, names: list[str], evaluators: list[str]) -> None:
    unknown = [name for name in names if name not in evaluators]
    if unknown:
        raise ShadowlitError(
            f"--{option} names {', '.join(unknown)}; the configuration's evaluators are "
            f"{', '.join(evaluators) or 'none'}."
        )


def _command(options: Mapping[str, Any]) -> str:
    """The command line with everything in it that isn't the default, and the arms and seeds; secrets are masked."""
    words = ["shadowlit", "compare", str(options["fit"])]
    for name, parameter in inspect.signature(compare).parameters.items():
        value = options[name]
        if name in ("fit", "workers", "threads", "dry_run"):  # which change nothing in the report
            continue
        if value != parameter.default or name in ("arms", "seeds"):
            if isinstance(value, list) and not any(isinstance(each, float) for each in value):
                value = ",".join(map(str, value))
            text = value if isinstance(value, str) else json.dumps(masked(value))
            words += [f"--{name}", text]
    return shlex.join(words)
