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
    """Writes checkpoints while the training goes on, if that is wanted.

    At a step's end weights, moments and everything else are copied to the CPU's memory; a thread writes them. As
    without it, a checkpoint appears whole or not at all, and the one that it replaces is removed afterwards. The next
    save, a load, a signal and the end of the training wait for it. An error is raised after the next batch, on all
    ranks. The numbers of the training stay the same.

    Example::

        Trainer(callbacks=[ModelCheckpoint(), CheckpointCallback(asynchronous=True)])

    Args:
        asynchronous: Write in a thread. Needs as much of the CPU's memory as a checkpoint takes on the disk.
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
        io = strategy.checkpoint_io
        known = (SingleDeviceStrategy, ReplicatedStrategy, ShardedStrategy)
        if not isinstance(io, Checkpoints) or type(strategy) not in known:
            raise ShadowlitError(
                f"checkpoint.asynchronous is true, but {type(strategy).__name__} with {type(io).__name__} writes the "
                "checkpoints. Use one device, DDP or FSDP2 as Lightning has them, without a plugin for checkpoints."
            )
        if any(getattr(each, "save_last", None) == "link" for each in savers):
            raise ShadowlitError(
                "checkpoint.asynchronous is true, but save_last of ModelCheckpoint is 'link': the link would be there "
                "before what it leads to. Set save_last to true."
            )
        io.background = self._background = Background()
        for each in savers:
            if isinstance(each, ModelCheckpoint):  # which chooses names by what is there
                each.file_exists = partial(_will_exist, self._background, each)  # type: ignore[method-assign]

    def on_train_batch_end(self, *_: Any) -> None:
        """Raise an error of the thread on all ranks."""
        if self._background is not None:
            self._background.look()

    def on_train_end(self, *_: Any) -> None:
        """Wait until all checkpoints are written."""
        if self._background is not None:
            self._background.wait()

    def on_fit_end(self, *_: Any) -> None:
        """Wait for one that another callback has saved at the training's end."""
        if self._background is not None:
            self._background.wait()


def _will_exist(background: Background, saver: ModelCheckpoint, path: Any, trainer: Trainer) -> bool:
    """What ModelCheckpoint.file_exists would find if nothing were in the queue."""
    own = trainer.is_global_zero and (
        found if (found := background.exists(path)) is not None else saver._fs.exists(path)
    )
    return trainer.strategy.reduce_boolean_decision(own, all=False)
