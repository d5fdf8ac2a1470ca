"""PredictionWriter: writes the answers of ``predict`` to one file, in the order of the prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from shadowlit.callbacks.folder import run_folder
from shadowlit.checkpoint.folder import require_replaceable
from shadowlit.distributed import of_all_ranks, on_first_rank
from shadowlit.errors import ExportError, counted
from shadowlit.files import replace_text, require_writable


class PredictionWriter(BasePredictionWriter):
    """Gathers the answers of all ranks and writes ``predictions.jsonl`` into the run's folder.

    One line ``{"index": row of the prompts' file, "prompt": text, "answer": text, "reference": text or null}`` per
    prompt, sorted by row. The prompt is the rendered one, with special tokens; the reference is the row's own answer.

    Args:
        file: The target; null for ``predictions.jsonl`` in the run's own folder.
    """

    def __init__(self, file: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.file = file

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before the first answer where the file can't be written, or is the prompts' or a model's."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            target = self._target(trainer)
            prompts = getattr(getattr(trainer, "datamodule", None), "predict_source", None)
            on_first_rank(lambda: _require_target(target, [prompts.path] if prompts is not None else []))

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the file atomically."""
        answers = of_all_ranks(list(_answers(predictions)))
        target = self._target(trainer)
        if not trainer.is_global_zero:
            return
        lines = (json.dumps(answer, ensure_ascii=False) for answer in sorted(answers, key=lambda a: a["index"]))
        replace_text(target, "".join(f"{line}\n" for line in lines))
        rank_zero_info(f"predict: wrote {counted(len(answers), 'answer')} of the grafted Instruct to {target}")

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.file) if self.file else run_folder(trainer) / "predictions.jsonl"


def _require_target(target: Path, inputs: list[str]) -> None:
    require_replaceable(target, "predictions.file", inputs)
    problem: OSError | str = "it is a folder" if target.is_dir() else ""
    try:
        require_writable(target.parent)
    except OSError as error:
        problem = error
    if problem:
        raise ExportError(f"predictions.file={target} can't be written: {problem}. Choose another file.")


def _answers(predictions: Any) -> Iterator[dict[str, Any]]:
    """The answers in lists of batches: Lightning gives one such list, or one per loader."""
    for one in predictions:
        yield from [one] if isinstance(one, dict) else _answers(one)
