"""What Lightning's loops save and when they validate, so that a training resumes exactly from each of its checkpoints.

Lightning resumes exactly from a checkpoint that was written in a validation, at the end of an epoch, or after a step
that neither ends the epoch nor is followed by a validation. From others it skips the validation, counts the epochs
wrong, or loses the gradients of the part of a step that was computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _BatchProgress, _ProcessedTracker
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class StepLoop(_TrainingEpochLoop):
    """Lightning's loop over an epoch, which validates after whole optimizer steps.

    A validation that is due after a part of the micro-batches of a step follows the step. Checkpoints of validations
    hold no gradients, and those of the part would be lost.
    """

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train a micro-batch, or leave it to the validation that is repeated; the last step is the last."""
        if self._is_training_done and not self._should_check_val_fx(data_fetcher):
            raise StopIteration
        super().advance(data_fetcher)

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        trainer, every = self.trainer, self.trainer.val_check_batch
        if trainer.should_stop or not self._should_check_val_epoch() or every in (None, math.inf):
            return super()._should_check_val_fx(data_fetcher) and (trainer.should_stop or not self._should_accumulate())
        if self._should_accumulate():
            return False
        ready, micro = self.batch_progress.current.ready, trainer.accumulate_grad_batches
        own = ready % micro or micro  # micro-batches of this step
        done = 1 + (self.total_batch_idx if trainer.check_val_every_n_epoch is None else self.batch_idx)
        return done // every > (done - own) // every


class TrainingLoop(_FitLoop):
    """Lightning's loop over the epochs, which repeats a validation that was interrupted after the last step."""

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
    that of the epoch's end.

    Args:
        trainer: The trainer, in ``on_train_batch_end``; at other times nothing is changed.
        loops: The checkpoint's ``loops``.
    """
    loop, state = trainer.fit_loop.epoch_loop, loops["fit_loop"]
    batches, fetcher = loop.batch_progress, trainer.fit_loop._data_fetcher
    if not trainer.training or fetcher is None:
        return
    assert isinstance(batches.total, _ProcessedTracker)
    if batches.total.completed != batches.total.processed - 1:
        return
    validates, ends = loop._should_check_val_fx(fetcher), loop._num_ready_batches_reached()
    if not (validates or ends):
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


def _count(progress: dict[str, Any], name: str) -> None:
    for span in ("total", "current"):
        progress[span] = {**progress[span], name: progress[span][name] + 1}
