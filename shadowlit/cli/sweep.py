"""``shadowlit sweep``; the docstrings are the help texts."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from shadowlit.cli.functions import Changes, Values
from shadowlit.errors import ShadowlitError, counted
from shadowlit.progress import make_console
from shadowlit.studies.sweep.definition import Definition, TrialKey

_HOME = Path("runs/sweeps")


def run(
    name: str,
    fit: str,
    grid: dict[str, Values] = {},  # noqa: B006 - read only, and shown by --help
    variants: dict[str, dict[str, Changes]] = {},  # noqa: B006
    ranges: dict[str, dict[str, Any]] = {},  # noqa: B006
    drop: list[Changes] = [],  # noqa: B006
    overrides: Changes = {},  # noqa: B006
    arms: list[str] = ["B2I"],  # noqa: B006
    seeds: list[int] = [0],  # noqa: B006
    scales: list[float] = [1.0],  # noqa: B006
    task_scales: list[float] = [],  # noqa: B006
    metric: str | list[str] = "loss",
    direction: Literal["minimize", "maximize"] = "minimize",
    sampler: Literal["grid", "random", "tpe"] = "grid",
    sampler_options: dict[str, Any] = {},  # noqa: B006
    trials: int | None = None,
    pruner: Literal["none", "median", "percentile", "hyperband", "successive_halving", "threshold"] = "none",
    pruner_options: dict[str, Any] = {},  # noqa: B006
    show: list[str] = [],  # noqa: B006
    max_trials: int = 1000,
    storage: str | None = None,
    out: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    gpus_per_trial: int = 1,
    limit: int | None = None,
    dry_run: bool = False,
) -> None:
    """Run fit over a grid, or over settings that are drawn; each trial in a process of its own.

    Give it a file: shadowlit sweep --config experiments/rank.yaml; every key of the file can be given on the
    command line too. The same command resumes after an interruption, adds values and seeds, and joins in on another
    machine that shares the storage: no trial runs twice, and the trials of a killed worker are taken over. Failed
    trials are tried again at the next start.

    Args:
        name: Name of the sweep; together with the name of fit, it names the study and its folder.
        fit: Configuration of fit that all trials share; for another pair or model, give another file.
        grid: Values of any keys, by dotted key, e.g. {model.lr: [1e-4, 3e-4]}; all combinations are run.
        variants: Keys that vary together: labels that set several keys each, by name.
        ranges: Ranges from which random and tpe draw: {model.lr: {low: 1e-5, high: 1e-2, log: true}}; integer: true
            for whole numbers.
        drop: Combinations to leave out: those in which every named axis has one of the values.
        overrides: Further changes of the configuration for all trials, by dotted key.
        arms: Arms to measure, named by the source of the delta and the target of the graft: B2I is Shadow-FT, I2I
            tunes the Instruct directly; the Base, the Instruct or both are trained for them.
        seeds: Seeds; each setting is trained with each of them.
        scales: Scales λ of the graft that every trial measures, at no further training; the first is the arm's own.
        task_scales: Scales, beyond the first, at which the evaluators measure too.
        metric: Metric that a trial is judged by, as logged for its arm after val/grafted/ or val/tuned/: loss,
            new/score …; several are averaged.
        direction: Whether to minimize or to maximize it.
        sampler: grid runs all combinations; random and tpe draw as many settings as trials says.
        sampler_options: Arguments of Optuna's sampler, e.g. {seed: 1}.
        trials: Number of settings that random or tpe draws; each is run with all seeds.
        pruner: Name of Optuna's pruner that ends hopeless trials by their metric after each validation.
        pruner_options: Arguments of the pruner, e.g. {n_startup_trials: 5} for median.
        show: Further metrics of the report.
        max_trials: Largest number of trials; more are an error.
        storage: null for a file in the sweep's folder; another .journal file; or a database that several machines
            share, e.g. postgresql://user:password@host/name.
        out: Folder of trials and report; null for runs/sweeps/<name>-<fit>.
        workers: Number of trials that run at a time; null for as many as the GPUs allow, or one without GPUs.
        threads: Threads of torch for each trial; null for an equal share of the cores, on the CPU.
        gpus_per_trial: Number of GPUs that each trial gets for itself, where there are any.
        limit: Largest number of trials that this worker begins, e.g. 1 in a SLURM array; null for no limit.
        dry_run: Only check everything, and list the trials.
    """
    console = make_console()
    definition = Definition(
        name, fit, overrides, grid, variants, ranges, drop, arms, seeds, scales, task_scales, metric, direction,
        sampler, sampler_options, trials, pruner, pruner_options, show, max_trials,
    )  # fmt: skip
    folder = Path(out) if out else _HOME / definition.study
    for option, value in (("workers", workers), ("threads", threads), ("limit", limit)):
        if value is not None and value < 1:
            raise ShadowlitError(f"{option} is {value}; expected at least 1.")
    _check(definition, folder, read=not dry_run)
    planned = definition.planned()
    if dry_run:
        for key in planned:
            console.print(definition.name_of(key))
        drawn = f"{counted(definition.num_planned, 'trial')} with settings to be drawn" if definition.draws else ""
        console.print(f"{drawn or counted(len(planned), 'trial')} in {folder}")
        return
    from shadowlit.studies.progress import StudyProgress
    from shadowlit.studies.sweep.report import write_report
    from shadowlit.studies.sweep.scheduler import Scheduler, gpus_of_slots, keep_definition, visible_gpus
    from shadowlit.studies.sweep.storage import open_storage
    from shadowlit.studies.sweep.study import SweepStudy, state_of

    visible = [] if definition.recipe.get("trainer.accelerator") == "cpu" else visible_gpus()
    gpus = gpus_of_slots(visible, gpus_per_trial, workers) if visible else []
    slots = len(gpus) or workers or 1
    share = threads if threads is not None or gpus else max(1, (os.cpu_count() or 1) // slots)
    study = SweepStudy(definition, open_storage(storage, folder))
    keep_definition(folder, definition)
    total = len(planned) or definition.num_planned
    done = sum(state_of(trial) in ("complete", "pruned", "diverged") for trial in study.trials)
    with StudyProgress("trials", total, definition.judged, done) as shown:
        scheduler = Scheduler(
            study, folder, workers=slots, threads=share, gpus=gpus, limit=limit, on_end=shown.end, on_poll=shown.poll
        )
        try:
            scheduler.run()
        finally:
            report_file = write_report(study, folder)
    counts = Counter(map(state_of, study.trials))
    console.print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    console.print(f"report    {report_file}")
    if counts["failed"]:
        raise ShadowlitError(
            f"{counted(counts['failed'], 'trial')} failed; {report_file} has the reasons. Fix the cause, and start the "
            "same command again: it repeats what failed."
        )


def report(folder: str | None = None, storage: str | None = None, name: str | None = None) -> None:
    """Write the tables and plots of a sweep, finished or not, from what its storage holds at this moment.

    Args:
        folder: Folder of the sweep, where the report goes; null for runs/sweeps/<name>.
        storage: Storage of the sweep; null for the file in its folder.
        name: Name of the study, e.g. rank-demo_lora; needed where the storage holds several.
    """
    from shadowlit.studies.sweep.report import write_report
    from shadowlit.studies.sweep.scheduler import keep_definition
    from shadowlit.studies.sweep.storage import FILE, open_storage
    from shadowlit.studies.sweep.study import SweepStudy, stored_definition

    if folder is None and name is None:
        raise ShadowlitError("no folder and no name is given. Give the folder, e.g. runs/sweeps/rank-demo_lora.")
    home = Path(folder) if folder else _HOME / str(name)
    if storage is None and not (home / FILE).is_file():
        raise ShadowlitError(
            f"there is no {home / FILE}. Give the folder of a sweep, and its storage where it isn't a file there."
        )
    found = open_storage(storage, home)
    definition = stored_definition(found, name)
    keep_definition(home, definition)
    make_console().print(f"report    {write_report(SweepStudy(definition, found), home)}")


COMMANDS = {"run": run, "report": report}
DEFAULT = "run"


def _check(definition: Definition, folder: Path, read: bool) -> None:
    """Let the parser of fit check every value that is varied, a few at a time; it names the key of what is wrong.

    With ``read``, the first trial's data and evaluators are read too, and everyone's if these are varied.
    """
    from shadowlit.lightning_cli import check, check_measured

    if not Path(definition.fit).is_file():
        raise ShadowlitError(f"fit is {definition.fit!r}, which is not a file; expected a configuration of fit.")
    levels = [
        [limits["low"], limits["high"]] if (limits := axis.range) is not None else list(axis.levels)
        for axis in definition.axes
    ]
    for number in range(max(map(len, levels))):
        chosen = [each[number % len(each)] for each in levels]
        setting = tuple((axis.name, label) for axis, label in zip(definition.axes, chosen, strict=True))
        for source in definition.sources[:: 1 if number == 0 else 2]:
            look = check_measured if read and (number == 0 or definition.measures_each) else check
            look(list(definition.arguments(TrialKey(setting, source, definition.seeds[0]), folder / "check")))
