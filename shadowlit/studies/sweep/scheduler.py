"""One worker of a sweep: claims trials, runs each in a process of its own, and watches them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

from shadowlit.errors import ShadowlitError
from shadowlit.files import replace_text
from shadowlit.studies.sweep.definition import Definition
from shadowlit.studies.sweep.study import Claim, SweepStudy
from shadowlit.studies.sweep.table import DEFINITION
from shadowlit.studies.trials.identity import changes
from shadowlit.studies.trials.process import (
    Job,
    TrialProcess,
    drop_checkpoints,
    is_finished,
    last_words,
    start,
    succeeded,
)
from shadowlit.studies.trials.trial import LIVE, RESULT

log = logging.getLogger(__name__)

UNTOUCHED = "untouched"
_POLL_S = 0.2
_ASK_S = 5.0
_PATIENCE_S = 60.0
_T = TypeVar("_T")


@dataclass
class Running:
    """A trial that runs, or the measurement of the untouched models.

    Attributes:
        name: Of its folder.
        process: Its process.
        claim: The trial; None for the untouched models.
        slot: Which of the worker's places it has, and with it which GPUs.
        begun: By the monotonic clock.
        step: Optimizer steps at the last validation.
        value: What it is judged by, there.
    """

    name: str
    process: TrialProcess
    claim: Claim | None
    slot: int
    begun: float = field(default_factory=time.monotonic)
    step: int | None = None
    value: float | None = None


@dataclass
class Outcome:
    """What became of a trial: complete, pruned, diverged, failed; and why, where it failed."""

    name: str
    state: str
    reason: str = ""


def keep_definition(folder: Path, definition: Definition) -> None:
    """Keep the definition in the sweep's folder, which has one sweep.

    Raises:
        ShadowlitError: It has another one, or can't be written.
    """
    file = folder / DEFINITION
    identity = definition.identity()
    if file.is_file():
        changed = changes(json.loads(file.read_text(encoding="utf-8"))["identity"], identity)
        if changed:
            raise ShadowlitError(
                f"{folder} holds another sweep: {changed} differ. Give this one another name or folder, or remove that "
                "folder; values, seeds and arms may be added, nothing else changed."
            )
    try:
        kept = {"identity": identity, "definition": json.loads(definition.to_json())}
        replace_text(file, json.dumps(kept, indent=1, ensure_ascii=False))
    except OSError as error:
        raise ShadowlitError(f"the folder {folder} can't be written ({error}). Give another folder.") from error


class Scheduler:
    """Runs trials of a sweep, ``workers`` at a time, until none waits.

    Others may do the same on the same storage, on this machine or others. A failing trial costs itself alone.

    Args:
        study: The trials.
        folder: Of the sweep; each trial has a folder of its own in it.
        workers: Trials at a time.
        threads: Of torch, for each; None for its own choice.
        gpus: The GPUs of each place, as ``CUDA_VISIBLE_DEVICES`` names them; empty without GPUs.
        limit: Trials that this worker begins at most; None for no limit.
        on_outcome: Told what became of each trial.
        on_poll: Told what runs, a few times per second.
    """

    def __init__(
        self,
        study: SweepStudy,
        folder: Path,
        *,
        workers: int = 1,
        threads: int | None = None,
        gpus: Sequence[Sequence[str]] = (),
        limit: int | None = None,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        on_poll: Callable[[Sequence[Running]], None] = lambda running: None,
    ) -> None:
        self.study, self.folder = study, folder
        self.workers, self.threads, self.gpus, self.limit = workers, threads, gpus, limit
        self._on_outcome, self._on_poll = on_outcome, on_poll
        self._running: list[Running] = []
        self._begun = 0
        self._asked = -_ASK_S
        self._in_process = not gpus and not study.definition.is_distributed()

    def run(self) -> None:
        """Run until nothing waits and nothing of ours runs.

        Raises:
            ShadowlitError: The untouched models can't be measured, or no trial logs the sweep's metric: then all of
                them would fail.
        """
        _patiently(self.study.fill)
        with contextlib.ExitStack() as stack:
            try:
                self._measure_untouched(stack)
                while self._take() or self._running:
                    self._watch()
                    self._on_poll(self._running)
                    time.sleep(_POLL_S)
            finally:
                self._stop()

    def _take(self) -> bool:
        """Fill free places; whether there may be more to take."""
        free = [slot for slot in range(self.workers) if all(each.slot != slot for each in self._running)]
        if not free or (self._running and time.monotonic() - self._asked < _ASK_S):
            return bool(self._running)
        for slot in free:
            if self.limit is not None and self._begun >= self.limit:
                return False
            claim = _patiently(self.study.claim)
            if claim is None:
                self._asked = time.monotonic()
                return bool(self._running)
            self._begun += 1
            self._begin(claim, slot)
        return True

    def _begin(self, claim: Claim, slot: int) -> None:
        definition = self.study.definition
        name = definition.name_of(claim.key)
        home = self.folder / name
        if is_finished(home):  # by a worker that was killed before it could say so
            self._keep(name, claim)
            return
        more = {"trainer.devices": len(self.gpus[slot])} if self.gpus else {}
        job = Job(name, definition.arguments(claim.key, home, more))
        self._running.append(Running(name, self._start(job, home, slot), claim, slot))

    def _start(self, job: Job, home: Path, slot: int) -> TrialProcess:
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[slot])} if self.gpus else None
        return start(job, home, threads=self.threads, in_process=self._in_process, environment=environment)

    def _watch(self) -> None:
        for each in list(self._running):
            code = each.process.poll()
            if code is not None:
                self._running.remove(each)
                self._asked = -_ASK_S  # a place is free
                self._end(each, code)
            elif each.claim is not None and not self._look(each, each.claim):
                self._running.remove(each)
                self._asked = -_ASK_S

    def _look(self, each: Running, claim: Claim) -> bool:
        """Report what a trial has measured; False if it is over: pruned, or another worker's."""
        live = _read(self.folder / each.name / LIVE)
        if live:
            with contextlib.suppress(KeyError):  # some evaluators run in some validations alone
                each.value = self.study.definition.judge(live["metrics"], claim.key.source)
                each.step = live["step"]
        try:
            if not _patiently(lambda: self.study.beat(claim)):
                raise UpdateFinishedTrialError("it was taken up by another worker")
            step, value = each.step, each.value
            if step is None or value is None or live is None:
                return True
            if _patiently(lambda: self.study.report(claim, step, value)):
                return True
            each.process.stop()
            drop_checkpoints(self.folder / each.name)
            _patiently(lambda: self.study.finish(claim, live, pruned=True))
            self._on_outcome(Outcome(each.name, "pruned"))
        except UpdateFinishedTrialError as error:
            each.process.stop()
            log.warning("%s is left alone: %s", each.name, error)
        return False

    def _end(self, each: Running, code: int) -> None:
        home = self.folder / each.name
        ok = succeeded(code, home)
        if each.claim is None:
            if not ok:
                raise ShadowlitError(
                    f"the untouched models could not be measured: {last_words(home)}. Mend the cause, and start the "
                    f"same command again; the log is {home / 'log.txt'}."
                )
            self.study.keep_untouched(json.loads((home / RESULT).read_text(encoding="utf-8"))["metrics"])
        elif ok:
            self._keep(each.name, each.claim)
        else:
            claim, reason = each.claim, last_words(home)
            _patiently(lambda: self.study.fail(claim, reason))
            self._on_outcome(Outcome(each.name, "failed", reason))

    def _keep(self, name: str, claim: Claim) -> None:
        result = json.loads((self.folder / name / RESULT).read_text(encoding="utf-8"))
        try:
            state = _patiently(lambda: self.study.finish(claim, result))
            self._on_outcome(Outcome(name, state))
        except UpdateFinishedTrialError:
            log.warning("%s was run by another worker too, which came first", name)
        except ShadowlitError as error:
            self.study.fail(claim, str(error))
            raise

    def _measure_untouched(self, stack: contextlib.ExitStack) -> None:
        """Measure Base and Instruct beside the first trials, unless another worker does or has done it."""
        if self.study.definition.measures_each or self.study.untouched is not None:
            return
        lock = stack.enter_context((self.folder / ".untouched.lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another worker does
            return
        home = self.folder / UNTOUCHED
        job = Job(UNTOUCHED, self.study.definition.untouched_arguments(home))
        self._running.append(Running(UNTOUCHED, self._start(job, home, 0), None, 0))

    def _stop(self) -> None:
        """End what still runs, after an interruption or an error, and say so."""
        for each in self._running:
            each.process.stop()
            if each.claim is not None:
                with contextlib.suppress(Exception):  # what ended us is to be told, and not this
                    self.study.fail(each.claim, "interrupted")
        self._running.clear()


def gpus_of_places(visible: Sequence[str], per_trial: int, workers: int | None) -> list[list[str]]:
    """Share out GPUs: as many places as they allow, or ``workers`` of them.

    Args:
        visible: The GPUs, by number or UUID.
        per_trial: GPUs for each trial.
        workers: Places; None for as many as there are GPUs for.

    Raises:
        ShadowlitError: There are too few.
    """
    if per_trial < 1:
        raise ShadowlitError(f"gpus_per_trial is {per_trial}; expected at least 1.")
    places = len(visible) // per_trial if workers is None else workers
    if places < 1 or places * per_trial > len(visible):
        raise ShadowlitError(
            f"{places or 1} trials at a time with {per_trial} GPUs each need {(places or 1) * per_trial} GPUs, and "
            f"{len(visible)} are visible. Lower workers or gpus_per_trial."
        )
    return [list(visible[place * per_trial : (place + 1) * per_trial]) for place in range(places)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [each.strip() for each in told.split(",") if each.strip() and each.strip() != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _patiently(act: Callable[[], _T]) -> _T:
    """Do something with the storage; a database that is away for a moment costs no trial."""
    from sqlalchemy.exc import OperationalError

    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return act()
        except (StorageInternalError, OperationalError) as error:
            if time.monotonic() > deadline:
                raise ShadowlitError(
                    f"the storage was away for {_PATIENCE_S:.0f} s ({error}). Start the same command again when it is "
                    "back; what runs then goes on, and what is finished stays."
                ) from error
            time.sleep(2)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
