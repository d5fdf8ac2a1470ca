"""Runs the trainings of a comparison, each in its own process, several at a time; finished ones are skipped."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from shadowlit.errors import DataError
from shadowlit.files import replace_text
from shadowlit.studies.progress import SKIPPED, StudyProgress
from shadowlit.studies.rows import UNTOUCHED_TRIAL
from shadowlit.studies.trials.folder import LOCK, changes
from shadowlit.studies.trials.process import (
    Job,
    Pool,
    Running,
    discard,
    failure,
    is_finished,
    is_measured,
    read_live,
)
from shadowlit.studies.trials.recipe import Recipe

_IDENTITY = "comparison.json"
_POLL_S = 0.1
log = logging.getLogger(__name__)


@contextlib.contextmanager
def own_folder(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Lock the folder of a comparison, and require that everything in it was made by one recipe.

    While no training is finished the recipe may change; what there is besides is then removed.

    Raises:
        DataError: Another process holds it, or what is there was made by another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = {**recipe.identity(), "pair": recipe.fingerprints()}
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise DataError(f"another comparison is running in {folder}. Wait for it, or give another --out.") from None
    with lock:
        file = folder / _IDENTITY
        if file.is_file():
            changed = changes(json.loads(file.read_text(encoding="utf-8")), identity)
            homes = [path.parent for path in folder.glob(f"*/{LOCK}")]
            if changed and any(is_finished(home) for home in homes if home.name != UNTOUCHED_TRIAL):
                raise DataError(
                    f"{folder} holds trainings of another recipe; changed since: {changed}. Give another "
                    "--out, or remove the folder; arms, rates and seeds may be added, nothing else may change."
                )
            if changed:
                log.warning(
                    "no training in %s is finished, so it starts again with the changed recipe: %s", folder, changed
                )
                for home in homes:
                    discard(home)
                replace_text(file, json.dumps(identity, indent=1))
        else:
            replace_text(file, json.dumps(identity, indent=1))
        yield


def run(
    found: Sequence[Job],
    folder: Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    in_process: bool = True,
    metric: str = "loss",
    shown: StudyProgress | None = None,
) -> list[str]:
    """Run jobs in the folder of a comparison, ``workers`` at a time and in order; finished ones are not run again.

    After an interruption the running ones are stopped. A failed job does not end the others; the names of those are
    returned. ``shown`` displays what runs, with the ``metric`` of one of its arms, and what has ended.
    """
    shown = shown or StudyProgress("trainings", len(found), metric)
    judged = {job.name: [prefix + metric for prefix in (*job.measures, "val/grafted/")] for job in found}
    for job in found:
        if is_finished(folder / job.name) and not is_measured(job, folder / job.name):
            log.warning(
                "%s runs again, since an arm or an evaluator that is requested now was not measured then", job.name
            )
            discard(folder / job.name)
    waiting = [job for job in found if not is_finished(folder / job.name)]
    for job in found:
        if job not in waiting:
            shown.end(job.name, SKIPPED)
    failed: list[str] = []
    pool = Pool(folder, workers, threads=threads, in_process=in_process)
    try:
        while waiting or pool.running:
            for slot in pool.free[: len(waiting)]:
                pool.begin(waiting.pop(0), slot)
            for each, ok in pool.ended():
                failed += [] if ok else [each.name]
                shown.end(each.name, "complete" if ok else "failed", "" if ok else failure(folder / each.name))
            shown.poll(pool.running, lambda each: _refresh(each, folder / each.name, judged[each.name]))
            time.sleep(_POLL_S)
    finally:
        pool.stop()
    return failed


def _refresh(each: Running, folder: Path, metrics: Sequence[str]) -> None:
    """Read what a training's last validation reported; the value is that of the first metric that it has."""
    if live := read_live(folder):
        each.step = live["step"]
        each.value = next((live["metrics"][name] for name in metrics if name in live["metrics"]), None)
