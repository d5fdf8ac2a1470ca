"""Where a command ends that was sent a signal: at a boundary that the ranks agree on, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.progress import _BatchProgress
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from shadowlit.callbacks.folder import run_folder
from shadowlit.errors import Interrupted
from shadowlit.files import unused
from shadowlit.signals import StopSignals, running
from shadowlit.training.checkpoints import is_below, wait_for

log = logging.getLogger(__name__)

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # in the state of a ModelCheckpoint


class Boundaries(_SignalConnector):
    """Ends a command at a boundary, in place of Lightning's signal handlers.

    Those save a checkpoint and make collective calls wherever a rank happens to be, and end a command with status 0.
    Lightning asks ``received_sigterm`` when a batch and the validation after it are finished, at the end of an epoch,
    and between the batches of a validation; other callbacks ask :func:`reach_boundary`. There the ranks take the
    highest signal that one of them has received. In a training a checkpoint is written first, unless gradients of a
    part of a step are pending; then Interrupted is raised. Other parts of a command are interrupted at once.
    """

    def __init__(self, trainer: Trainer, signals: StopSignals) -> None:
        super().__init__(trainer)
        self._signals = signals

    @property
    def received_sigterm(self) -> bool:
        """False: if there was a signal, this raises."""
        self.reach()
        return False

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        """Lightning sets it to false."""

    def register_signal_handlers(self) -> None:
        """Let signals wait for a boundary from here on, if this is a training; see :meth:`leave`."""
        # Lightning broadcasts rank zero's signal before every batch; the ranks agree after it.
        self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if environment := self._requeues():
            self._signals.catch([environment.requeue_signal or signal.SIGUSR1])
        self._signals.waits = self.trainer.state.fn == TrainerFn.FITTING

    def teardown(self) -> None:
        """Interrupt what follows at once."""
        self._signals.waits = False

    def leave(self) -> None:
        """The last boundary of a command; called on all ranks."""
        self.reach()
        self._signals.waits = False
        self._signals.end()

    def reach(self) -> None:
        """Raise Interrupted on all ranks if one of them was sent a signal; a collective."""
        trainer, signals = self.trainer, self._signals
        signals.reached_boundary()
        trains = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if trains and trainer.fit_loop.epoch_loop._should_accumulate():
            return
        number = signals.number or 0
        if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
            flag = torch.tensor(number, device=trainer.strategy.root_device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag)
        if not number:
            return
        signals.number = number
        if trains and trainer.global_step:
            self._save(number)
        raise Interrupted(0 if signals.is_part else 128 + number)

    def _save(self, number: int) -> None:
        """Write the checkpoint from which the training resumes; ask SLURM to requeue the job if that is wanted."""
        trainer, name = self.trainer, signal.Signals(number).name
        owner = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if owner is None:
            rank_zero_warn(
                f"{name}: the training stops at step {trainer.global_step} without a checkpoint, since "
                "trainer.enable_checkpointing is false."
            )
            return
        own = run_folder(trainer) / "checkpoints"
        path = Path(owner.dirpath or own) / "last.ckpt"
        if path.parent.resolve() != own.resolve() and str(path) != owner.last_model_path:
            path = unused(path)  # one of another run stays
        path = Path(trainer.strategy.broadcast(str(path)))
        if owner.save_last:
            owner.last_model_path = str(path)
        with _resumable(trainer):
            trainer.save_checkpoint(path)
            wait_for(trainer)
        again = "the same command" if getattr(trainer.logger, "is_named", False) else f"--ckpt_path={path}"
        rank_zero_info(
            f"{name}: the training stops at step {trainer.global_step}; nothing is exported. It resumes with {again}"
        )
        environment = self._requeues()
        if environment and number == environment.requeue_signal and trainer.is_global_zero:
            _requeue()

    def _requeues(self) -> SLURMEnvironment | None:
        """The SLURM plugin, if it requeues jobs."""
        environment = self.trainer._accelerator_connector.cluster_environment
        return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


class OwnCheckpoints(_CheckpointConnector):
    """Lets a run that resumes in its own folder keep the best score, and remove the checkpoints that it has written.

    Lightning forgets both if the folder was moved or its path is written in another way, and never removes the
    checkpoint that it has resumed from. It would remove whatever a loaded state names, ``checkpoints/../../x`` too.
    Under SLURM it would load any ``hpc_ckpt_*.ckpt`` in the working folder.
    """

    _hpc_resume_path = None

    def restore_callbacks(self) -> None:
        """Restore their states; those of ModelCheckpoint get the folder's path as it is written now.

        A state that names a path outside that folder loses its paths and scores.
        """
        owners = self._owners()
        for callback in self._savers():
            if not (state := self._loaded_checkpoint.get("callbacks", {}).get(callback.state_key)):
                continue
            if callback in owners:
                old, new = str(state["dirpath"]), str(callback.dirpath)
                for key in (*_PATHS, "dirpath"):
                    state[key] = state[key].replace(old, new, 1)
                state["best_k_models"] = {path.replace(old, new, 1): v for path, v in state["best_k_models"].items()}
            paths = [*(state.get(key) for key in _PATHS), *state.get("best_k_models", {})]
            if not all(is_below(path, callback.dirpath) for path in paths if path):
                state |= {**dict.fromkeys(_PATHS, ""), "best_k_models": {}, "best_model_score": None}
        super().restore_callbacks()

    def resume_end(self) -> None:
        """Forget which checkpoint a training has resumed from, if it is one of its own."""
        super().resume_end()
        if self.trainer.state.fn == TrainerFn.FITTING and self._owners():
            self._ckpt_path = None

    def _owners(self) -> list[ModelCheckpoint]:
        """The callbacks in whose folder the loaded checkpoint is."""
        return [each for each in self._savers() if is_below(self._ckpt_path or "/", each.dirpath)]

    def _savers(self) -> list[ModelCheckpoint]:
        return [each for each in self.trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]


def take_over(trainer: Trainer) -> None:
    """Let the signals of the running command end a trainer's work at its boundaries; to be called before its work."""
    trainer._checkpoint_connector = OwnCheckpoints(trainer)
    if signals := running():
        trainer._signal_connector = Boundaries(trainer, signals)


def leave(trainer: Trainer) -> None:
    """The last boundary of a command, before what is not a part of its loops; to be called on all ranks alike."""
    if isinstance(trainer._signal_connector, Boundaries):
        trainer._signal_connector.leave()


def reach_boundary(trainer: Trainer) -> None:
    """Let a command of the command line that was sent a signal end here; to be called on all ranks alike."""
    if isinstance(trainer._signal_connector, Boundaries):
        trainer._signal_connector.reach()


@contextmanager
def _resumable(trainer: Trainer) -> Iterator[None]:
    """Let the loops' progress be as in the hooks in which Lightning's own callbacks save, which it resumes exactly.

    In a validation it is that of the validation's first batch: a resumed run repeats the validation from its start.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs, validation = fit.epoch_progress, loop.val_loop.batch_progress
    # At an epoch's end Lightning's callbacks save before it counts the epoch, and after a validation before the step.
    trains, fetcher = not trainer.validating, fit._data_fetcher
    epoch = int(trains and 0 < epochs.current.ready == epochs.current.completed)
    step = int(trains and fetcher is not None and loop._should_check_val_fx(fetcher))
    if epoch and not fit._iteration_based_training():
        step = 0  # it resumes with the next epoch
    if trainer.validating:
        loop.val_loop.batch_progress = begun = _BatchProgress()
        begun.increment_ready()
        begun.increment_started()
    for progress in (epochs.total, epochs.current):
        progress.completed -= epoch
    loop._batches_that_stepped -= step
    try:
        yield
    finally:
        loop.val_loop.batch_progress = validation
        for progress in (epochs.total, epochs.current):
            progress.completed += epoch
        loop._batches_that_stepped += step


def _job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "unknown")


def _requeue() -> None:
    try:
        status = subprocess.run(["scontrol", "requeue", _job()], check=False).returncode
    except OSError as error:
        log.warning("the job could not be requeued: %s", error)
        return
    log.log(logging.WARNING if status else logging.INFO, "scontrol requeue %s ended with status %s", _job(), status)
