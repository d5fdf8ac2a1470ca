"""CheckpointCallback: how checkpoints are written; when, and which are kept, is ModelCheckpoint's."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from shadowlit.arguments import takes_plain_values
from shadowlit.errors import ShadowlitError
from shadowlit.training.background import Background
from shadowlit.training.checkpoints import Checkpoints, ReplicatedStrategy, ShardedStrategy


@takes_plain_values("checkpoint")
class CheckpointCallback(Callback):
    """Writes checkpoints while training continues, if asked to.

    Everything is copied to the CPU's memory, and a thread writes it. A checkpoint is still written atomically,
    and the one that it replaces is removed afterwards. The next save, a load, a signal and the end of the training wait
    for it. An error is raised after the next batch, on all ranks. The training computes the same numbers.

    Example::

        Trainer(callbacks=[ModelCheckpoint(), CheckpointCallback(asynchronous=True)])

    Args:
        asynchronous: Whether checkpoints are written in a thread. Needs as much of the CPU's memory as
            a checkpoint takes on the disk.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._background: Background | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the thread.

        Raises:
            ShadowlitError: The trainer's strategy, one of its plugins or ``save_last='link'`` doesn't allow it.
        """
        self._background = None
        if not self.asynchronous:
            return
        strategy, savers = trainer.strategy, trainer.checkpoint_callbacks
        known = type(strategy) in (SingleDeviceStrategy, ReplicatedStrategy, ShardedStrategy)
        if not known or not isinstance(strategy.checkpoint_io, Checkpoints):
            raise ShadowlitError(
                f"checkpoint.asynchronous is true, but checkpoints are written by {type(strategy).__name__} with "
                f"{type(strategy.checkpoint_io).__name__}. Use one device, DDP or FSDP2, and no plugin for checkpoints."
            )
        if any(getattr(each, "save_last", None) == "link" for each in savers):
            raise ShadowlitError(
                "checkpoint.asynchronous is true, but save_last of ModelCheckpoint is 'link', and the link would be "
                "there before the checkpoint. Set save_last to true."
            )
        strategy.checkpoint_io.background = self._background = Background()
        for each in savers:
            if isinstance(each, ModelCheckpoint):  # which chooses names by what is there
                each.file_exists = partial(_will_exist, self._background, each)  # type: ignore[method-assign]

    def on_train_batch_end(self, *_: Any) -> None:
        """Raise an error of the thread on all ranks."""
        if self._background is not None:
            self._background.look()

    def on_fit_end(self, *_: Any) -> None:
        """Wait until all is written, and raise an error of the thread on all ranks."""
        if self._background is not None:
            self._background.wait()


def _will_exist(background: Background, saver: ModelCheckpoint, path: Any, trainer: Trainer) -> bool:
    """As ModelCheckpoint.file_exists when the queue is empty."""
    own = trainer.is_global_zero and background.exists.get(str(path), saver._fs.exists(path))
    return trainer.strategy.reduce_boolean_decision(own, all=False)
