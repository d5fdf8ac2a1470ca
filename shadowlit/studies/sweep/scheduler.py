"""One worker of a sweep, which claims trials and runs each of them in a process of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

from shadowlit.errors import ShadowlitError, first_line
from shadowlit.files import replace_text
from shadowlit.studies.sweep.definition import Definition
from shadowlit.studies.sweep.study import Claim, SweepStudy
from shadowlit.studies.sweep.table import DEFINITION
from shadowlit.studies.trials.folder import changes
from shadowlit.studies.trials.process import (
    Job,
    Pool,
    Running,
    drop_checkpoints,
    failure,
    is_finished,
    read_live,
    read_result,
    untouched_failed,
)

log = logging.getLogger(__name__)

_POLL_S = 0.2
_ASK_S = 5.0
_PATIENCE_S = 60.0
_T = TypeVar("_T")


def keep_definition(folder: Path, definition: Definition) -> None:
    """Write the definition into the sweep's folder, which belongs to one sweep.

    Raises:
        ShadowlitError: It belongs to another one, or can't be written.
    """
    file = folder / DEFINITION
    identity = definition.identity()
    if file.is_file():
        changed = changes(json.loads(file.read_text(encoding="utf-8"))["identity"], identity)
        if changed:
            raise ShadowlitError(
                f"{folder} holds another sweep; different: {changed}. Give this one another name or folder, or remove "
                "that folder; values, seeds and arms may be added, nothing else may change."
            )
    try:
        kept = {"identity": identity, "definition": json.loads(definition.to_json())}
        replace_text(file, json.dumps(kept, indent=1, ensure_ascii=False))
    except OSError as error:
        raise ShadowlitError(f"the folder {folder} can't be written ({error}). Give another folder.") from error


class Scheduler:
    """Runs trials of a sweep, ``workers`` at a time, until none waits.

    Other workers may share the storage, on this machine or on others. A failed trial does not end the others. See
    :class:`shadowlit.studies.trials.process.Pool` for the folder, ``threads`` and ``gpus``.

    Args:
        limit: Largest number of trials that this worker begins; None for no limit.
        on_end: Called with the name of a trial that has ended, its state, and the reason why it failed.
        on_poll: Called with what runs, a few times per second.
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
        on_end: Callable[[str, str, str], None] = lambda name, state, reason: None,
        on_poll: Callable[[Sequence[Running]], None] = lambda running: None,
    ) -> None:
        self.study, self.folder = study, folder
        self.gpus, self.limit = gpus, limit
        self._on_end, self._on_poll = on_end, on_poll
        self._begun = 0
        self._asked = -_ASK_S
        in_process = not gpus and not study.definition.is_distributed()
        self._pool = Pool(folder, workers, threads=threads, in_process=in_process, gpus=gpus)

    def run(self) -> None:
        """Run until no trial is waiting and none of this worker's is running.

        Raises:
            ShadowlitError: The untouched models can't be measured, or no trial logs the sweep's metric: then all of
                them would fail.
        """
        _patiently(self.study.fill)
        with contextlib.ExitStack() as stack:
            try:
                self._measure_untouched(stack)
                while self._take() or self._pool.running:
                    self._watch()
                    self._on_poll(self._pool.running)
                    time.sleep(_POLL_S)
            finally:
                self._stop()

    def _take(self) -> bool:
        """Fill free slots; return whether there may be more to run."""
        free, runs = self._pool.free, bool(self._pool.running)
        if not free or (runs and time.monotonic() - self._asked < _ASK_S):
            return runs
        for slot in free:
            if self.limit is not None and self._begun >= self.limit:
                return False
            claim = _patiently(self.study.claim)
            if claim is None:
                self._asked = time.monotonic()
                return bool(self._pool.running)
            self._begun += 1
            self._begin(claim, slot)
        return True

    def _begin(self, claim: Claim, slot: int) -> None:
        definition = self.study.definition
        name = definition.name_of(claim.key)
        home = self.folder / name
        if is_finished(home):  # by a worker that was killed before it could report it
            self._keep(name, claim)
            return
        more = {"trainer.devices": len(self.gpus[slot])} if self.gpus else {}
        try:
            self._pool.begin(Job(name, definition.arguments(claim.key, home, more)), slot, claim)
        except ShadowlitError as error:
            self._fail(name, claim, str(error))

    def _watch(self) -> None:
        for each, ok in self._pool.ended():
            self._asked = -_ASK_S  # a slot is free
            self._end(each, ok)
        for each in list(self._pool.running):
            if each.claim is not None and not self._report(each, each.claim):
                self._pool.running.remove(each)
                self._asked = -_ASK_S

    def _report(self, each: Running, claim: Claim) -> bool:
        """Report what a trial has measured; False if it is over: pruned, or taken over by another worker."""
        live = read_live(self.folder / each.name)
        if live:
            with contextlib.suppress(KeyError):  # some evaluators don't run in every validation
                each.value = self.study.definition.judge(live["metrics"], claim.key.source)
                each.step = live["step"]
        try:
            if not _patiently(lambda: self.study.beat(claim)):
                raise UpdateFinishedTrialError("it was taken over by another worker")
            step, value = each.step, each.value
            if step is None or value is None or live is None:
                return True
            if _patiently(lambda: self.study.report(claim, step, value)):
                return True
            each.process.stop()
            drop_checkpoints(self.folder / each.name)
            _patiently(lambda: self.study.finish(claim, live, pruned=True))
            self._on_end(each.name, "pruned", "")
        except UpdateFinishedTrialError as error:
            each.process.stop()
            log.warning("%s was stopped: %s", each.name, error)
        return False

    def _end(self, each: Running, ok: bool) -> None:
        home = self.folder / each.name
        if each.claim is None:
            if not ok:
                raise untouched_failed(home)
            self.study.keep_untouched(read_result(home)["metrics"])
        elif ok:
            self._keep(each.name, each.claim)
        else:
            self._fail(each.name, each.claim, failure(home))

    def _fail(self, name: str, claim: Claim, reason: str) -> None:
        _patiently(lambda: self.study.fail(claim, reason))
        self._on_end(name, "failed", reason)

    def _keep(self, name: str, claim: Claim) -> None:
        result = read_result(self.folder / name)
        try:
            self._on_end(name, _patiently(lambda: self.study.finish(claim, result)), "")
        except UpdateFinishedTrialError:
            log.warning("%s was run by another worker too, which came first", name)
        except ShadowlitError as error:
            self.study.fail(claim, str(error))
            raise

    def _measure_untouched(self, stack: contextlib.ExitStack) -> None:
        """Measure Base and Instruct alongside the first trials, unless another worker is doing or has done so."""
        if self.study.definition.measures_each or self.study.untouched is not None:
            return
        with contextlib.suppress(Timeout):
            stack.enter_context(FileLock(self.folder / ".untouched.lock").acquire(timeout=0))
            self._pool.begin(self.study.definition.recipe.untouched_job(self.folder), 0)

    def _stop(self) -> None:
        """Stop everything that still runs after an interruption or an error, and record it."""
        for each in self._pool.stop():
            if each.claim is not None:
                try:
                    self.study.fail(each.claim, "interrupted")
                except Exception as error:  # the error that ended us must not be hidden by this one
                    log.warning("%s could not be marked as interrupted: %s", each.name, first_line(error))


def gpus_of_slots(visible: Sequence[str], per_trial: int, workers: int | None) -> list[list[str]]:
    """Divide the visible GPUs, by number or UUID, among as many workers as they allow, or among ``workers``.

    Raises:
        ShadowlitError: There are too few.
    """
    if per_trial < 1:
        raise ShadowlitError(f"gpus_per_trial is {per_trial}; expected at least 1.")
    slots = len(visible) // per_trial if workers is None else workers
    if slots < 1 or slots * per_trial > len(visible):
        raise ShadowlitError(
            f"{slots or 1} trials at a time with {per_trial} GPUs each need {(slots or 1) * per_trial} GPUs, and "
            f"{len(visible)} are visible. Lower workers or gpus_per_trial."
        )
    return [list(visible[slot * per_trial : (slot + 1) * per_trial]) for slot in range(slots)]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip() and each.strip() != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _patiently(act: Callable[[], _T]) -> _T:
    """Call a function that uses the storage; retry while a database is temporarily unavailable."""
    from sqlalchemy.exc import OperationalError

    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return act()
        except (StorageInternalError, OperationalError) as error:
            if time.monotonic() > deadline:
                raise ShadowlitError(
                    f"the storage was unavailable for {_PATIENCE_S:.0f} s ({error}). Start the same command again when "
                    "it is back: trials resume from their checkpoints, and finished ones are kept."
                ) from error
            time.sleep(2)
