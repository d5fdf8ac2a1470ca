"""Lightning's progress bar where the number of epochs is not limited."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class UnlimitedProgressBar(RichProgressBar):
    """Lightning's progress bar without ``/-2`` after the epoch."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "   ")


def unlimited_bars(trainer: Trainer) -> list[Callback]:
    """A progress bar in place of Lightning's own if the number of epochs is not limited; else nothing."""
    bar = trainer.progress_bar_callback
    if type(bar) is not RichProgressBar or trainer.max_epochs != -1:
        return []
    return [UnlimitedProgressBar(int(bar.refresh_rate), theme=bar.theme)]
