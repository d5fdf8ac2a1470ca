"""What a training saves, when it validates and what it takes from a checkpoint, so that it resumes exactly from each.

Lightning resumes exactly from a checkpoint that was written in a validation, at the end of an epoch, or after a step
that neither ends the epoch nor is followed by a validation. From others it skips the validation, counts the epochs
wrong, or loses the gradients of the part of a step that was computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _BatchProgress, _ProcessedTracker
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from shadowlit.checkpoint.headers import some_of
from shadowlit.errors import CheckpointError


class StepLoop(_TrainingEpochLoop):
    """Lightning's loop over an epoch, which validates and stops after whole optimizer steps.

    A validation or a stop that is due after a part of the micro-batches of a step follows the step. Checkpoints hold no
    gradients, and those of the part would be lost.
    """

    @property
    def done(self) -> bool:
        """Whether the epoch is over, or was stopped (``max_time``, EarlyStopping)."""
        return super().done and not self._should_accumulate()

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train a micro-batch, or leave it to the validation that is repeated; the last step is the last."""
        if self._is_training_done and not self._should_check_val_fx(data_fetcher):
            raise StopIteration
        super().advance(data_fetcher)

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        trainer, every = self.trainer, self.trainer.val_check_batch
        if self._should_accumulate():
            return False
        if trainer.should_stop or not self._should_check_val_epoch() or every in (None, math.inf):
            return super()._should_check_val_fx(data_fetcher)
        ready, micro = self.batch_progress.current.ready, trainer.accumulate_grad_batches
        own = ready % micro or micro  # micro-batches of this step
        done = 1 + (self.total_batch_idx if trainer.check_val_every_n_epoch is None else self.batch_idx)
        return done // every > (done - own) // every


class TrainingLoop(_FitLoop):
    """Lightning's loop over the epochs, which repeats a validation that was interrupted after the last step."""

    leaves = False  # whether an epoch's last hooks are called

    def on_advance_end(self) -> None:
        """Leave an epoch."""
        self.leaves = True
        try:
            super().on_advance_end()
        finally:
            self.leaves = False

    @property
    def done(self) -> bool:
        """Whether all is trained and validated."""
        total = self.epoch_loop.val_loop.batch_progress.total
        assert isinstance(total, _ProcessedTracker)
        interrupted = total.started == total.ready == total.processed + 1 and total.completed == total.processed
        if self.restarting and interrupted and self.trainer.enable_validation and self.max_batches:
            return False
        return super().done


def take_over(trainer: Trainer) -> None:
    """Let a trainer validate and write checkpoints after whole steps; a loop that the user has set is kept.

    ModelCheckpoint would write one after the first micro-batch of a resumed run, or by the clock at any time.
    """
    loop = trainer.fit_loop.epoch_loop
    if type(loop) is _TrainingEpochLoop:
        loop.__class__ = StepLoop
        trainer.fit_loop.__class__ = TrainingLoop
    for each in trainer.checkpoint_callbacks:
        if "on_train_batch_end" not in vars(each):
            vars(each)["on_train_batch_end"] = partial(_after_step, each.on_train_batch_end)


def _after_step(hook: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    if not trainer.fit_loop.epoch_loop._should_accumulate():
        hook(trainer, *args, **kwargs)


def amend(trainer: Trainer, loops: dict[str, Any]) -> None:
    """Change the loops' progress of a checkpoint that is written after a step, so that a run resumes exactly from it.

    If a validation follows the step, it becomes that of the validation's beginning; otherwise, at the end of an epoch,
    that of the epoch's end. Where an epoch was left before its end, it becomes that of the last step.

    Args:
        trainer: The trainer, in ``on_train_batch_end`` or ``on_train_epoch_end``; at other times nothing is changed.
        loops: The checkpoint's ``loops``.
    """
    loop, state = trainer.fit_loop.epoch_loop, loops["fit_loop"]
    batches, fetcher = loop.batch_progress, trainer.fit_loop._data_fetcher
    if not trainer.training or fetcher is None:
        return
    assert isinstance(batches.total, _ProcessedTracker)
    validates, ends = loop._should_check_val_fx(fetcher), loop._num_ready_batches_reached()
    if getattr(trainer.fit_loop, "leaves", False) and not ends:  # max_time, max_steps or EarlyStopping
        for span, progress in state["epoch_progress"].items():
            epochs = progress["ready"] - 1  # by hand, since a run that resumed at an epoch's end counts one more
            state["epoch_progress"][span] = {**progress, "processed": epochs, "completed": epochs}
        _count(state["epoch_loop.batch_progress"], "completed", -1)
        state["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        return
    if batches.total.completed != batches.total.processed - 1 or not (validates or ends):
        return
    _count(state["epoch_loop.batch_progress"], "completed")
    if validates:
        begun = _BatchProgress()
        begun.increment_ready()
        begun.increment_started()
        state["epoch_loop.val_loop.batch_progress"] = begun.state_dict()
    else:
        _count(state["epoch_progress"], "processed")
        state["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def is_within_step(trainer: Trainer) -> bool:
    """Return whether a training has computed micro-batches, or begins one, of a step that isn't complete."""
    loop = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress.current
    assert isinstance(batches, _ProcessedTracker)
    return trainer.training and (batches.ready != batches.processed or loop._should_accumulate())


def _count(progress: dict[str, Any], name: str, by: int = 1) -> None:
    for span in ("total", "current"):
        progress[span] = {**progress[span], name: progress[span][name] + by}


def require_states(trainer: Trainer) -> None:
    """Raise unless a checkpoint that is about to be restored has a state for each optimizer and schedule.

    Lightning restores as many as there are, and starts the others from scratch.

    Raises:
        CheckpointError: It lacks one, or was written with another optimizer.
    """
    content, path = trainer._checkpoint_connector._loaded_checkpoint, trainer.ckpt_path
    if not content:
        return
    cure = "Give another checkpoint as ckpt_path, or start a new run (no ckpt_path, another run.name)."
    for key, own in (("optimizer_states", trainer.optimizers), ("lr_schedulers", trainer.lr_scheduler_configs)):
        if len(found := content[key]) != len(own):
            raise CheckpointError(
                f"{path} holds {len(found)} {key}, but the run has {len(own)}, so it can't resume exactly. {cure}"
            )
    for state, optimizer in zip(content["optimizer_states"], trainer.optimizers, strict=True):
        saved = {key for group in state["param_groups"] for key in group} - {"params", "param_names", "initial_lr"}
        keys = {key for group in optimizer.param_groups for key in group} - {"params", "param_names", "initial_lr"}
        if (added := saved - keys) and (missing := keys - saved):
            raise CheckpointError(
                f"model.optimizer is {type(optimizer).__name__}, but {path} was written with another optimizer: it has "
                f"{some_of(sorted(added))} and lacks {some_of(sorted(missing))}. Resume with the optimizer of its run, "
                "or start a new run (no ckpt_path, another run.name)."
            )
        moments = any("betas" in group or group.get("momentum") for group in state["param_groups"])
        if moments and content["global_step"] and not state["state"]:
            raise CheckpointError(f"{path} holds no moments of its optimizer, so the run can't resume exactly. {cure}")


class Settings:
    """The settings of an optimizer and of its schedule, which are the configuration's when a training resumes.

    Torch restores those of the checkpoint with the states, whatever is configured. Settings are the arguments of the
    classes; everything else, such as moments and counts of steps, is state and comes from the checkpoint.

    Args:
        optimizer: The optimizer, before anything is restored.
        schedule: Its schedule.
    """

    def __init__(self, optimizer: Optimizer, schedule: Any) -> None:
        parts = getattr(optimizer, "parts", [optimizer])  # of several in one
        names = {name for part in parts for name in _arguments(part, Optimizer)} - {"params"}
        self._optimizer = optimizer
        self._groups = [
            {name: value for name, value in group.items() if name in {*names, "initial_lr"}}
            for group in optimizer.param_groups
        ]
        self._schedules = [
            (each, {name: value for name, value in vars(each).items() if name in _SCHEDULE | _arguments(each, object)})
            for each in _flat(schedule)
        ]

    def put_back(self) -> None:
        """Replace the settings that were restored; a rate that a schedule has set is scaled by its new peak."""
        groups = self._optimizer.param_groups
        for group, own in zip(groups, self._groups, strict=True):
            before, peak, rate = group.get("initial_lr"), own.get("initial_lr"), group["lr"]
            group.update(own)
            if before and peak is not None:
                group["lr"] = rate if before == peak else rate * (peak / before)
        for schedule, own in self._schedules:
            vars(schedule).update(own)
            if isinstance(schedule, LambdaLR):
                for group, peak, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                    group["lr"] = peak * factor(schedule.last_epoch)


_SCHEDULE = frozenset({"base_lrs", "lr_lambdas", "_milestones"})


def _flat(schedule: Any) -> Iterator[Any]:
    """A schedule and those that it consists of."""
    yield schedule
    for each in getattr(schedule, "_schedulers", ()):
        yield from _flat(each)


def _arguments(of: Any, root: type) -> set[str]:
    """Names of the arguments of an object's class and of those that it derives from, up to ``root``."""
    classes = type(of).__mro__[: type(of).__mro__.index(root)]
    names = {name for each in classes for name in inspect.signature(each.__init__).parameters}  # type: ignore[misc]
    return names - {"self", "args", "kwargs", "optimizer", "last_epoch", "verbose"}
