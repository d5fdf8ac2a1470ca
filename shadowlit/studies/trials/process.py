"""Starting, watching and ending the processes of trainings."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shadowlit.studies.trials.trial import LOG, RESULT, run_logged

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A training, or a measurement of models that aren't trained.

    Attributes:
        name: Of its folder.
        arguments: The command line after ``python -m shadowlit``.
    """

    name: str
    arguments: tuple[str, ...]


class TrialProcess(Protocol):
    """A running job, however it was started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """End it."""


def start(
    job: Job,
    folder: Path,
    *,
    threads: int | None = None,
    in_process: bool = True,
    environment: Mapping[str, str] | None = None,
) -> TrialProcess:
    """Start a job; it goes on from its last checkpoint, where an interrupted one has left it, else it begins anew.

    Args:
        job: What to run.
        folder: Of this job alone; what else an interrupted one has left there is removed.
        threads: Of torch; None for its own choice.
        in_process: Fork it from a process that has imported everything, which saves ten seconds; not possible where
            Lightning starts further processes, or where ``environment`` must be known to what is imported.
        environment: Variables that it gets beside our own, e.g. which GPUs it sees; not with ``in_process``.
    """
    assert not (in_process and environment), "a forked process has imported everything already"
    job = _resumed(job, folder)
    return _fork(job, folder, threads) if in_process else _spawn(job, folder, threads, environment or {})


def is_finished(folder: Path) -> bool:
    """Whether a job has left its result."""
    return (folder / RESULT).is_file()


def succeeded(code: int, folder: Path) -> bool:
    """Whether a job that ended with ``code`` has left its result; its checkpoints are needed no more then."""
    if code != 0 or not is_finished(folder):
        return False
    drop_checkpoints(folder)
    return True


def drop_checkpoints(folder: Path) -> None:
    """Remove what only a resumption would need."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


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


def _fork(job: Job, folder: Path, threads: int | None) -> TrialProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shadowlit.studies.trials.preload"])
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


def _spawn(job: Job, folder: Path, threads: int | None, environment: Mapping[str, str]) -> TrialProcess:
    command = [sys.executable, "-m", "shadowlit.studies.trials.trial", str(folder), *job.arguments]
    # By the environment, which further processes of the training inherit.
    own = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}), **environment}
    with (folder / LOG).open("wb") as out:
        return _Spawned(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=own))
