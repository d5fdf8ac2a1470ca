"""The losses of a training, watched for one that is not finite without making a GPU wait in every step."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from shadowlit.errors import ShadowlitError


class LossWatch:
    """Finds the first step whose loss is not finite.

    Losses stay on their device until :meth:`check` reads all of them at once. They must be equal on all ranks, so that
    all ranks find the same step.

    Args:
        on_nan: Whether a loss that is not finite is an error in every later check, or a warning in the first one.

    Attributes:
        problem: What was found, in words; None while every loss that was read is finite.
    """

    def __init__(self, on_nan: Literal["stop", "warn"]) -> None:
        self.on_nan = on_nan
        self.problem: str | None = None
        self._unread: list[tuple[int, Any, Tensor]] = []
        self._before = "no earlier loss of this run was finite, so check the weights that it starts from, and the data"

    def add(self, step: int, lr: Any, loss: Tensor) -> None:
        """Keep the loss of an optimizer step, counted from 1, whose learning rate is ``lr``."""
        self._unread.append((step, lr, loss))

    def check(self) -> None:
        """Read the losses that were added since the last check.

        Raises:
            ShadowlitError: One of this run's losses is not finite, and ``on_nan`` is ``stop``.
        """
        unread, self._unread = self._unread, []
        values = torch.stack([loss for _, _, loss in unread]).tolist() if unread else []
        for (step, lr, _), value in zip(unread, values, strict=True):
            if self.problem is None and not math.isfinite(value):
                self.problem = f"the training loss is {value} at step {step}, at lr {float(lr):.3g}; {self._before}"
                if self.on_nan == "warn":
                    rank_zero_warn(f"{self.problem}. The training continues (model.on_nan=warn), but exports nothing.")
            self._before = f"the last finite loss was {value:.4g}, at step {step}"
        if self.problem and self.on_nan == "stop":
            raise ShadowlitError(
                f"{self.problem}. Lower model.lr, raise model.warmup_ratio or set trainer.gradient_clip_val, and start "
                "again or resume from an earlier checkpoint (ckpt_path); none was written after this step. With "
                "model.on_nan=warn the training continues."
            )
