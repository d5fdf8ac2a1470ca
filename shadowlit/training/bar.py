"""The progress of a training: one status line, in place of the bars of Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichModelSummary, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from shadowlit.status import EVERY_S, StatusLine
from shadowlit.text import count, duration, number
from shadowlit.training.schedules import step_count

# Titles of the metrics that are shown, and shorter ones for a terminal of 80 columns, the most important first.
_TITLES = {"train/loss": "loss", "val/grafted/loss": "grafted loss", "graft/gain": "gain"}
_SHORT = {"train/loss": "loss", "graft/gain": "gain", "val/grafted/loss": "grafted"}


class ProgressLine(ProgressBar):
    """Shows step, loss, loss and gain of the graft, tokens per second and the time left, in one line.

    On a terminal the line is redrawn in place; otherwise it is logged every ``every_s`` seconds. It replaces the
    progress bar that Lightning adds by itself.

    Args:
        every_s: Seconds between two lines where stderr is not a terminal.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        super().__init__()
        self.enabled = True
        self._line = StatusLine(rank_zero_info, every_s)
        self._values: dict[str, float] = {}
        self._begun, self._first, self._total = 0.0, 0, math.inf
        self._validation_begun, self._validates = 0.0, False
        self._lasted: float | None = None  # seconds of the validation before

    def disable(self) -> None:
        """Show nothing."""
        self.enabled = False

    def enable(self) -> None:
        """Show the line again."""
        self.enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reserve the terminal's last line; ranks other than the first show nothing."""
        super().setup(trainer, pl_module, stage)
        if self.enabled:
            self._values = {}
            self._line.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the terminal's last line."""
        self._line.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the terminal's last line before the error is shown."""
        self._line.stop()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock from which the time left is estimated."""
        if self.enabled:
            self._begun, self._first = time.monotonic(), trainer.global_step
            self._total = step_count(trainer)
            self.show("starting", now=self._line.live)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        self.show()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show that the training steps are over."""
        self.show("finishing", now=self._line.live)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the scores."""
        if self.enabled and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._lasted, self._validates = time.monotonic() - self._validation_begun, False
            self._values |= _read(trainer.callback_metrics)  # until the next line is due Lightning may have reset them
            self.show(now=self._line.live)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the validation."""
        if not trainer.sanity_checking:
            self._validation_begun, self._validates = time.monotonic(), True

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Show the progress of a validation's first pass."""
        limits = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self.show(f"{stage_of(trainer)} of tuned {batch_idx + 1}/{limits[dataloader_idx]}")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Show the progress of a test's first pass."""
        self.show(f"{stage_of(trainer)} of tuned {batch_idx + 1}/{trainer.num_test_batches[dataloader_idx]}")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Show how many batches of prompts have been answered."""
        self.show(f"answers {batch_idx + 1}/{trainer.num_predict_batches[dataloader_idx]}")

    def show(self, doing: str = "", now: bool = False) -> None:
        """Show the line if it is due, or ``now``; metrics are read only then, since reading them waits for the GPU.

        Args:
            doing: Current activity, unless it is a training step.
            now: Show it even if it is not due.
        """
        if self.enabled:
            self._line.show(lambda: self._parts(doing), now)

    def _parts(self, doing: str) -> list[str]:
        trainer, step = self.trainer, self.trainer.global_step
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return [doing]
        self._values |= _read(trainer.callback_metrics)
        values = self._values
        parts = [f"step {step:,}/{self._total:,.0f}" if self._total < math.inf else f"step {step:,}"]
        parts += [doing] if doing else []
        if (left := self._left(step)) is not None:
            parts.append(f"{duration(left)} left")
        if "train/tokens_per_s" in values:
            parts.append(f"{count(values['train/tokens_per_s'])} tokens/s")
        titles, digits = (_SHORT, 3) if self._line.live else (_TITLES, 4)
        for name, title in titles.items():
            if name in values:
                parts.append(f"{title} {number(values[name], name == 'graft/gain', digits)}")
        return parts

    def _left(self, step: int) -> float | None:
        """Seconds until the end, of the last validation once it has begun; None if it can't be estimated yet."""
        now, steps = time.monotonic(), self._total - step
        if steps == 0 and self._validates:
            return None if self._lasted is None else max(0.0, self._lasted - (now - self._validation_begun))
        if 0 < steps < math.inf and step > self._first:
            return (now - self._begun) / (step - self._first) * steps
        return None


def stage_of(trainer: Trainer) -> str:
    """The kind of pass over held-out data that is running, for the progress line."""
    return "check" if trainer.sanity_checking else "test" if trainer.testing else "validation"


def _read(metrics: Mapping[str, Any]) -> dict[str, float]:
    names = (*_TITLES, "train/tokens_per_s")
    return {name: float(metrics[name]) for name in names if name in metrics}


def replace_displays(trainer: Trainer) -> None:
    """Replace the progress bar that Lightning adds by default with a :class:`ProgressLine`, and remove its summary.

    The default summary has one row, the language model as a whole, which is on no device yet. One whose ``max_depth``
    is not the default stays.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [c for c in callbacks if not (type(c) in (ModelSummary, RichModelSummary) and c._max_depth == 1)]
    for i, each in enumerate(callbacks):
        if type(each) is RichProgressBar and each.refresh_rate == 100 and each.theme == RichProgressBarTheme():
            callbacks[i] = ProgressLine()


def show(trainer: Trainer, doing: str) -> None:
    """Show in the progress line, if there is one, what is being measured."""
    if isinstance(bar := trainer.progress_bar_callback, ProgressLine):
        bar.show(doing)
