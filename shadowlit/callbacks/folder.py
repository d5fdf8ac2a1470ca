"""The folder of a run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: Trainer) -> Path:
    """Return the run's own folder, which also holds its checkpoints; must be called on all ranks.

    Loggers such as WandbLogger share their ``save_dir``, by default the working folder, between runs: with these it is
    ``<save_dir>/<name>/<version>``, as for Lightning's ModelCheckpoint.
    """
    folder, logger = Path(trainer.default_root_dir), trainer.logger
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        folder = Path(logger.log_dir)
    elif logger is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or folder, str(logger.name), version)
    return Path(trainer.strategy.broadcast(str(folder)))  # other ranks may know neither name nor version
