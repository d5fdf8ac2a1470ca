"""Runs the trainings of a comparison: a process each, several at a time, what is finished is skipped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowlit.errors import DataError
from shadowlit.studies.comparison.plan import Recipe, Training
from shadowlit.studies.trials.identity import changes
from shadowlit.studies.trials.process import Job, TrialProcess, is_finished, start, succeeded

UNTOUCHED = "untouched"
_IDENTITY = "comparison.json"
_POLL_S = 0.1


def jobs(recipe: Recipe, trainings: Sequence[Training], folder: Path) -> list[Job]:
    """The untouched models first, then the trainings in their order."""
    first = Job(UNTOUCHED, ("validate", *recipe.untouched_arguments(folder / UNTOUCHED)))
    return [first, *(Job(t.name, ("fit", *recipe.fit_arguments(t, folder / t.name))) for t in trainings)]


@contextlib.contextmanager
def own_folder(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Hold a comparison's folder: no other process works in it, and all that is in it has one recipe.

    Raises:
        DataError: Another process holds it, or what lies there was made by another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(recipe)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another comparison is running in {folder}. Wait for it, or give another --out."
            ) from error
        file = folder / _IDENTITY
        if file.is_file():
            changed = changes(json.loads(file.read_text(encoding="utf-8")), identity)
            if changed:
                raise DataError(
                    f"{folder} holds trainings of another recipe: {changed} changed since. Give another "
                    "--out, or remove the folder; arms, rates and seeds may grow, nothing else."
                )
        else:
            file.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        yield


def run(
    found: Sequence[Job],
    folder: Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    in_process: bool = True,
    done: Callable[[str, bool], None] = lambda name, ok: None,
) -> list[str]:
    """Run what isn't finished yet; a failure costs its own training alone.

    A training that was killed goes on from its last checkpoint where its configuration keeps one, else it begins anew.

    Args:
        found: What to run, in this order.
        folder: Of the comparison; each job gets a folder of its own in it.
        workers: How many at a time.
        threads: Of torch, for each; None for its own choice.
        in_process: Fork each from a process that has imported everything, which saves ten seconds each; not possible
            where Lightning starts further processes for a training.
        done: Told the name of every job that ended, and whether it succeeded.

    Returns:
        The names of those that failed.
    """
    waiting = []
    for job in found:
        if is_finished(folder / job.name):
            done(job.name, True)
        else:
            waiting.append(job)
    failed: list[str] = []
    running: dict[str, TrialProcess] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[job.name] = start(job, folder / job.name, threads=threads, in_process=in_process)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                ok = succeeded(code, folder / name)
                if not ok:
                    failed.append(name)
                done(name, ok)
            time.sleep(_POLL_S)
    finally:
        for process in running.values():
            process.stop()
    return failed


def _identity(recipe: Recipe) -> Mapping[str, Any]:
    """What must not change between the trainings of one comparison."""
    from shadowlit.pair.pair import ModelPair

    return {
        "config": hashlib.sha256(recipe.config.read_bytes()).hexdigest(),
        "overrides": json.loads(json.dumps(dict(recipe.overrides))),
        "scales": list(recipe.scales),
        "task_scales": list(recipe.task_scales),
        "pair": ModelPair(**recipe.pair()).fingerprints(),
    }
