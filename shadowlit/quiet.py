"""Hides notes of other libraries that the user can't act on."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from typing import Any

from shadowlit.text import fitted

# Notes of Lightning's, by their beginnings. Errors, and warnings that name a setting, are shown.
_NOTES = re.compile(
    r"\W*(?:\[rank: \d+\] )?(Tip: |GPU available: |TPU available: |HPU available: |Initializing distributed: "
    r"|-{20,}\s*distributed_backend"
    r"|`Trainer\.fit` stopped: |`Trainer\(\w+=[\d.]+\)` was configured so "
    r"|LOCAL_RANK: |Seed set to |Loading `train_dataloader` to estimate"
    r"|Restored all states from |Restoring states from |Loaded model weights from )"
)
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
_MESSAGES = (
    r".*does not have many workers",
    r"Starting from v1\.9\.0, `tensorboardX`",  # metrics.csv is what is wanted
    r"Total length of `list` across ranks is zero",  # no validation sets
    r"LightningCLI's args parameter is intended",  # of our own call
    r".*`loftq_config` specified but will be ignored",  # jsonargparse spells out every default of LoraConfig
    r"The dirpath has changed from",  # of a checkpoint of another run, whose list of best ones doesn't matter
    r".*Checkpoint directory .* exists and is not empty",  # of a run that resumes; our own message says so
)


def quieten() -> None:
    """Hide other libraries' deprecations and notes, and show a warning without its line of code.

    Every command calls it. In your own program, call it once before you create a Trainer, which logs its first notes
    before any callback runs. Importing shadowlit alone changes neither warnings nor logging. ``python -W`` shows the
    deprecations, and where warnings come from.

    Example::

        from lightning.pytorch import Trainer
        from shadowlit import quieten

        quieten()
        trainer = Trainer(max_epochs=1)
    """
    if not sys.warnoptions:
        warnings.formatwarning = _message_alone
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        for message in _MESSAGES:
            warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if _is_shown not in handler.filters:
                handler.addFilter(_is_shown)
                handler.setFormatter(_Fitted(handler))
    if logging.lastResort is not None:  # of loggers without a handler, such as ours
        logging.lastResort.setFormatter(_Fitted(logging.lastResort))


class _Fitted(logging.Formatter):
    """Formats the message alone; on a terminal its lines are broken between words."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler

    def format(self, record: logging.LogRecord) -> str:
        """Return the message's lines."""
        return fitted(super().format(record), getattr(self._handler, "stream", sys.stderr))


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not _NOTES.match(record.getMessage())


def _message_alone(message: Warning | str, *_: Any, **__: Any) -> str:
    return fitted(f"warning: {message}", sys.stderr) + "\n"
