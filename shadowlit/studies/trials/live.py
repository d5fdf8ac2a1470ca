"""The metrics of a training so far, for the process that watches it."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from shadowlit.files import replace_text


class LiveMetrics(Callback):
    """Writes the metrics of each validation to a file, atomically, on the first rank.

    Args:
        file: File for ``{"step": optimizer steps so far, "metrics": {name: number}}``.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was logged last; sanity checking does not count."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        replace_text(self.file, json.dumps({"step": trainer.global_step, "metrics": metrics}))
