"""What commands keep from the terminal: notes of other libraries that the user of a command can do nothing about."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from typing import Any

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
    r"LightningCLI's args parameter is intended",  # of our own call
    r".*`loftq_config` specified but will be ignored",  # jsonargparse spells out every default of LoraConfig
    r"The dirpath has changed from",  # of a checkpoint of another run, whose list of best ones doesn't matter
    r".*Checkpoint directory .* exists and is not empty",  # of a run that resumes; our own message says so
)


def quieten() -> None:
    """Hide other libraries' deprecations and notes, for a command, and show a warning without its line of code.

    ``python -W`` shows the deprecations, and where warnings come from.
    """
    if not sys.warnoptions:
        warnings.formatwarning = _message_alone
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        for message in _MESSAGES:
            warnings.filterwarnings("ignore", message=message)
    # On CPUs with bfloat16 instructions, its import misses an optional package, with models in 4 bits or without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if _is_shown not in handler.filters:
                handler.addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not _NOTES.match(record.getMessage())


def _message_alone(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"
