"""Starts, watches and stops the processes of trainings."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shadowlit.errors import ShadowlitError
from shadowlit.studies.trials.folder import LOCK, vacated
from shadowlit.studies.trials.trial import LIVE, LOG, RESULT, run_logged

_PATIENCE_S = 10.0
_RESUMED = ("checkpoints", "metrics.csv", "config.yaml")
_NO_ERROR = ("tip:", "Usage:", "usage:")
_ERROR = re.compile(r"error: |[\w.]*(Error|Exception|Interrupt)\b")  # of a parser, or at the end of a traceback


@dataclass(frozen=True)
class Job:
    """A training, or a measurement of untrained models: its folder's name, and the command line of ``shadowlit``.

    Its result has metrics whose names begin with each of ``measures``.
    """

    name: str
    arguments: tuple[str, ...]
    measures: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialProcess:
    """A running job, however it was started: the first process of a group of its own.

    ``poll`` returns its exit code, or None while it runs. It is killed if this object is collected as garbage, or when
    this process ends.
    """

    process: Any
    poll: Callable[[], int | None]
    wait: Callable[[float], Any]

    def stop(self) -> None:
        """Terminate the job, and kill it if that takes more than ten seconds."""
        stop_all([self])

    def kill(self) -> None:
        """Kill the job and the processes that it has started."""
        self.process.kill()
        with contextlib.suppress(OSError):  # no other process is left, or it hasn't made its group yet
            os.killpg(self.process.pid, signal.SIGKILL)


def stop_all(processes: Sequence[TrialProcess]) -> None:
    """Terminate jobs; kill what is left of them when all have ended, or after ten seconds."""
    for each in processes:
        each.process.terminate()
    deadline = time.monotonic() + _PATIENCE_S
    for each in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.wait(max(0.0, deadline - time.monotonic()))
        each.kill()


@dataclass
class Running:
    """A job that runs, and what its last validation reported: the optimizer step, and the metric it is judged by.

    A sweep knows a trial by its claim; the job that measures the untouched models has none.
    """

    name: str
    process: TrialProcess
    slot: int
    claim: Any = None
    begun: float = field(default_factory=time.monotonic)
    step: int | None = None
    value: float | None = None


class Pool:
    """The running jobs of a study, at most one in each slot; each has a folder of its own in that of the study.

    With GPUs, each slot has some of its own, as ``CUDA_VISIBLE_DEVICES`` names them. See also :func:`start`.
    """

    def __init__(
        self,
        folder: Path,
        slots: int = 1,
        *,
        threads: int | None = None,
        in_process: bool = True,
        gpus: Sequence[Sequence[str]] = (),
    ) -> None:
        self.running: list[Running] = []
        self._folder, self._slots, self._gpus = folder, slots, gpus
        self._threads, self._in_process = threads, in_process

    @property
    def free(self) -> list[int]:
        """Slots in which nothing runs."""
        return [slot for slot in range(self._slots) if all(each.slot != slot for each in self.running)]

    def begin(self, job: Job, slot: int, claim: Any = None) -> None:
        """Start a job."""
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[slot])} if self._gpus else None
        process = start(
            job, self._folder / job.name, threads=self._threads, in_process=self._in_process, environment=environment
        )
        self.running.append(Running(job.name, process, slot, claim))

    def ended(self) -> Iterator[tuple[Running, bool]]:
        """Remove the jobs that have ended; yield each with whether it succeeded: then its checkpoints go."""
        for each in list(self.running):
            if (code := each.process.poll()) is not None:
                self.running.remove(each)
                each.process.kill()  # ranks and data workers of one that was killed
                succeeded = code == 0 and is_finished(self._folder / each.name)
                if succeeded:
                    drop_checkpoints(self._folder / each.name)
                yield each, succeeded

    def stop(self) -> list[Running]:
        """Stop everything that still runs, and return it."""
        stopped, self.running = self.running, []
        stop_all([each.process for each in stopped])
        return stopped


def start(
    job: Job,
    folder: Path,
    *,
    threads: int | None = None,
    in_process: bool = True,
    environment: Mapping[str, str] | None = None,
) -> TrialProcess:
    """Start a job in a folder of its own, where ``fit`` resumes an interrupted one; what else that has left is removed.

    With ``in_process`` it is forked from a process that has already imported everything, which saves ten seconds. That
    is not possible where Lightning starts further processes, or where ``environment`` must be known to what is
    imported; systems that cannot fork start a new process. ``threads`` are torch's, None for its own choice.

    Raises:
        ShadowlitError: Another process has not left the folder within a minute.
    """
    assert not (in_process and environment), "a forked process has imported everything already"
    with vacated(folder):
        _clear(job, folder)
    forked = in_process and hasattr(os, "fork")
    return _fork(job, folder, threads) if forked else _spawn(job, folder, threads, environment or {})


def is_finished(folder: Path) -> bool:
    """Return whether a job has left its result."""
    return (folder / RESULT).is_file()


def is_measured(job: Job, folder: Path) -> bool:
    """Return whether a finished job has measured everything that is asked of it; one of fewer arms has not."""
    logged = read_result(folder)["metrics"]
    return all(any(name.startswith(prefix) for name in logged) for prefix in job.measures)


def discard(folder: Path) -> None:
    """Remove what a job has left, so that it runs again from its beginning.

    Raises:
        ShadowlitError: Another process has not left the folder within a minute.
    """
    with vacated(folder):
        for path in folder.iterdir():
            if not path.name.startswith(LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_result(folder: Path) -> dict[str, Any]:
    """Return what a finished job has left: its ``metrics`` by name, ``step``, and what it cost."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def read_live(folder: Path) -> dict[str, Any] | None:
    """Return what the last validation of a running job has measured: ``step`` and ``metrics``; None before
    the first.
    """
    file = folder / LIVE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def drop_checkpoints(folder: Path) -> None:
    """Remove the files that only a resumed job would need."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def last_words(folder: Path) -> str:
    """Return the last message of a failed job's log that names an error, as one line; its last line if none does."""
    text = (folder / LOG).read_text(encoding="utf-8", errors="replace") if (folder / LOG).is_file() else ""
    lines = [line.strip() for line in text.splitlines()]
    begun = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    if not begun:
        return ([line for line in lines if line] or ["it left no log"])[-1]
    # A message that lists several problems has several lines; it ends at an empty one, or where something else begins.
    message = itertools.takewhile(lambda line: line and not line.startswith(_NO_ERROR), lines[begun[-1] :])
    return " ".join(message)


def failure(folder: Path) -> str:
    """Return why a job has failed, and where its log is."""
    return f"{last_words(folder).removesuffix('.')}; the log is {folder / LOG}"


def untouched_failed(home: Path) -> ShadowlitError:
    """Return the error that ends a study without reference models, which the job in the folder ``home`` should have
    left.
    """
    return ShadowlitError(
        f"the untouched models could not be measured, so there is nothing to compare with: "
        f"{last_words(home).removesuffix('.')}. Fix the cause, and start the same command again; the log is "
        f"{home / LOG}."
    )


def _clear(job: Job, folder: Path) -> None:
    """Remove from the folder of a job what a run that resumes doesn't need."""
    if folder.is_dir():
        found = sorted(path.name for path in folder.iterdir())
        if found and "checkpoints" not in found and not any(name.startswith(LOCK) for name in found):
            raise ShadowlitError(
                f"{folder} is where {job.name} would be trained, but it holds files of something else "
                f"({', '.join(found[:3])}), which would be removed. Give another folder as out."
            )
        for path in folder.iterdir():
            if path.name not in _RESUMED and not path.name.startswith(LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _fork(job: Job, folder: Path, threads: int | None) -> TrialProcess:
    context = multiprocessing.get_context("forkserver")
    # Nothing that computes when it is imported may be listed: threads don't survive a fork.
    context.set_forkserver_preload(["shadowlit.lightning_cli", "shadowlit.studies.trials.trial"])
    process = context.Process(target=run_logged, args=(folder, list(job.arguments), threads))
    process.start()
    return TrialProcess(process, lambda: process.exitcode, process.join)


def _spawn(job: Job, folder: Path, threads: int | None, environment: Mapping[str, str]) -> TrialProcess:
    command = [sys.executable, "-m", "shadowlit.studies.trials.trial", str(folder), *job.arguments]
    # Set in the environment, which further processes of the training inherit.
    number = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    own = {**os.environ, **number, **environment}
    with (folder / LOG).open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=own, process_group=0
        )
    return TrialProcess(process, process.poll, process.wait)
