"""The learning rate over the steps: schedules of ours, of transformers by name, or of any class."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchReduceLROnPlateau
from transformers import get_scheduler

from shadowlit.errors import ShadowlitError, counted, first_line

# transformers' schedules that need no metric.
ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
_SHARES = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")
Shape = Literal["cosine", "linear", "constant"]


def make_schedule(
    optimizer: Optimizer,
    choice: ScheduleName | LRSchedulerCallable | None,
    options: dict[str, Any] | None,
    shape: Shape,
    warmup: int,
    total: int,
) -> LRSchedulerConfigType:
    """Lightning's configuration of a schedule.

    Args:
        optimizer: Optimizer whose rates it sets.
        choice: A name of ``transformers.get_scheduler``, a function of the optimizer, or ``None`` for ``shape``.
        options: Options of a schedule of transformers.
        shape: Shape of the rate after warm-up.
        warmup: Optimizer steps of the warm-up.
        total: Optimizer steps of the whole training.

    Raises:
        ShadowlitError: The options don't fit, or the schedule needs a metric and can't name one.
    """
    scheduler: Any
    if options and (not isinstance(choice, str) or choice.startswith("constant")):
        raise ShadowlitError(
            f"model.lr_scheduler_kwargs is {options}, but model.lr_scheduler is {choice!r}, which takes none. Remove "
            "them, or name a schedule of transformers that takes them, e.g. cosine_with_min_lr."
        )
    _require_numbers(options or {})
    try:
        if isinstance(choice, str):
            scheduler = get_scheduler(choice, optimizer, warmup, total, options)
        elif choice is None:
            scheduler = LambdaLR(optimizer, partial(rate, total=total, warmup=warmup, schedule=shape))
        else:
            scheduler = choice(optimizer)
    except Exception as error:
        raise ShadowlitError(
            f"model.lr_scheduler{'_kwargs' if isinstance(choice, str) else ''} can't make a schedule "
            f"({first_line(error)}). Correct its options."
        ) from error
    if choice == "warmup_stable_decay" and warmup + (options or {})["num_decay_steps"] > total:
        raise ShadowlitError(
            f"model.lr_scheduler_kwargs has num_decay_steps={(options or {})['num_decay_steps']}, which with "
            f"{counted(warmup, 'step')} of warm-up is more than the {counted(total, 'step')} of the training. Set it "
            "to fewer steps."
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "epoch", "monitor": scheduler.monitor}
    if isinstance(scheduler, TorchReduceLROnPlateau):
        raise ShadowlitError(
            "model.lr_scheduler is torch's ReduceLROnPlateau, which can't name a metric. Use class_path "
            "lightning.pytorch.cli.ReduceLROnPlateau with monitor, e.g. val/grafted/loss."
        )
    return {"scheduler": scheduler, "interval": "step"}


def _require_numbers(options: dict[str, Any]) -> None:
    """Raise for an option of transformers' schedules that is out of its range and would fail in a later step."""
    for name, value in options.items():
        if value is None or name in ("decay_type", "warmup_type", "last_epoch"):
            continue
        most = 1 if name in _SHARES else math.inf
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            expected = "a share between 0 and 1" if name in _SHARES else "a number of at least 0"
            raise ShadowlitError(
                f"model.lr_scheduler_kwargs has {name}={value!r}; expected {expected}. Correct it, without quotes."
            )


def step_count(trainer: Trainer) -> float:
    """Return how many optimizer steps a training has in all; infinity if that is unknown.

    Lightning returns -1, its value of ``max_steps``, for training data without a length.
    """
    found = trainer.estimated_stepping_batches
    return math.inf if found < 0 else found


def require_no_end(trainer: Trainer, choice: Any, shape: Shape, warmup_ratio: float) -> None:
    """Raise if a schedule depends on the number of steps, which is unknown."""
    if callable(choice) or (choice is None and shape == "constant" and not warmup_ratio):
        return
    endless = "" if trainer.max_epochs == -1 else ", and the training data have no length"
    raise ShadowlitError(
        f"trainer.max_epochs is {trainer.max_epochs} and trainer.max_steps is {trainer.max_steps}{endless}, so the "
        f"number of steps is unknown, over which the rate follows the schedule {choice or shape!r} with "
        f"model.warmup_ratio={warmup_ratio:g}. Set trainer.max_steps, or model.schedule=constant and "
        "model.warmup_ratio=0; trainer.max_time ends either."
    )


def rate(step: int, *, total: int, warmup: int, schedule: Shape) -> float:
    """Return the learning rate of ``step`` as a share of its peak."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
