"""Runs the trainings of a comparison: a process each, several at a time, what is finished is skipped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shadowlit.comparison.plan import Recipe, Training
from shadowlit.comparison.trial import LOG, RESULT, run_logged
from shadowlit.errors import DataError

log = logging.getLogger(__name__)

UNTOUCHED = "untouched"
_IDENTITY = "comparison.json"
_POLL_S = 0.1


@dataclass(frozen=True)
class Job:
    """A training, or the measurement of the untouched models.

    Attributes:
        name: Of its folder.
        arguments: The command line after ``python -m shadowlit``.
    """

    name: str
    arguments: tuple[str, ...]


class _Process(Protocol):
    """What a running job is, however it was started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """End it."""


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
            found = json.loads(file.read_text(encoding="utf-8"))
            changed = sorted(key for key in identity.keys() | found.keys() if identity.get(key) != found.get(key))
            if changed:
                raise DataError(
                    f"{folder} holds trainings of another recipe: {', '.join(changed)} changed since. Give another "
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
        if (folder / job.name / RESULT).is_file():
            done(job.name, True)
        else:
            waiting.append(job)
    failed: list[str] = []
    running: dict[str, _Process] = {}
    start = _fork if in_process else _spawn
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[job.name] = start(_resumed(job, folder / job.name), folder / job.name, threads)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                ok = code == 0 and (folder / name / RESULT).is_file()
                if ok:
                    shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
                else:
                    failed.append(name)
                done(name, ok)
            time.sleep(_POLL_S)
    finally:
        for process in running.values():
            process.stop()
    return failed


def last_words(folder: Path, lines: int = 3) -> str:
    """The end of a failed job's log."""
    text = (folder / LOG).read_text(encoding="utf-8", errors="replace") if (folder / LOG).is_file() else ""
    return " / ".join(line.strip() for line in text.strip().splitlines()[-lines:]) or "it left no log"


def _resumed(job: Job, folder: Path) -> Job:
    """Make room for a job, and let it go on from its last checkpoint."""
    last = folder / "checkpoints" / "last.ckpt"
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name != "checkpoints":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if job.arguments[0] == "fit" and last.exists():
        log.info("%s goes on from %s", job.name, last)
        return Job(job.name, (*job.arguments, f"--ckpt_path={last}"))
    return job


class _Forked:
    def __init__(self, process: Any) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(10)
        self._process.kill()


def _fork(job: Job, folder: Path, threads: int | None) -> _Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shadowlit.comparison.preload"])
    process = context.Process(target=run_logged, args=(folder, list(job.arguments), threads))
    process.start()
    return _Forked(process)


class _Spawned:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()


def _spawn(job: Job, folder: Path, threads: int | None) -> _Process:
    command = [sys.executable, "-m", "shadowlit.comparison.trial", str(folder), *job.arguments]
    # By the environment, which further processes of the training inherit.
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    with (folder / LOG).open("wb") as out:
        return _Spawned(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))


def _identity(recipe: Recipe) -> Mapping[str, Any]:
    """What must not change between the trainings of one comparison."""
    from shadowlit.pair import ModelPair

    return {
        "config": hashlib.sha256(recipe.config.read_bytes()).hexdigest(),
        "overrides": json.loads(json.dumps(dict(recipe.overrides))),
        "scales": list(recipe.scales),
        "task_scales": list(recipe.task_scales),
        "pair": ModelPair(**recipe.pair()).fingerprints(),
    }
