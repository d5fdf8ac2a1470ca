"""Peak memory of rank 0 in the export at the end of a fit: on one process, or on two that share the model (FSDP2).

Prints what the process has resident when the export begins, and the most until it has ended::

    python benchmarks/export_memory.py BASE INSTRUCT full
    torchrun --standalone --nproc_per_node=2 benchmarks/export_memory.py BASE INSTRUCT lora

The pair may be two copies of one model: memory depends on shapes alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from torch.utils.data import DataLoader

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule

LENGTH = 512


class Rows(LightningDataModule):
    """Random tokens."""

    def train_dataloader(self) -> DataLoader:
        """Four batches of two rows."""
        ids = torch.randint(0, 1000, (8, LENGTH), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
        return DataLoader(rows, batch_size=4)

    val_dataloader = train_dataloader


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


class Watch(Callback):
    """Begins to watch before the export, after which its own hook runs too."""

    def on_train_end(self, *_: object) -> None:
        """Forget the peak of the training."""
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.start = _status("VmRSS"), time.perf_counter()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the peak of the export."""
        if trainer.is_global_zero:
            peak, took = _status("VmHWM"), time.perf_counter() - self.start
            print(f"resident {self.before:.0f} MB, peak of the export {peak:.0f} MB, {took:.1f} s")


def main(base: str, instruct: str, kind: str) -> None:
    """Train one step and export."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    module = ShadowModule(ModelPair(base, instruct), LoraConfig(r=8) if kind == "lora" else None, lr=1e-4)
    strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) if world_size == 1 else Path(tempfile.gettempdir(), f"export-{os.getppid()}")
        export = ExportCallback(folder=str(shared / "export"))
        Trainer(
            accelerator="cpu", devices=world_size, strategy="auto" if world_size == 1 else strategy, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, inference_mode=False,
            use_distributed_sampler=False, max_steps=1, limit_val_batches=1, num_sanity_val_steps=0,
            callbacks=[GraftCallback(), export, Watch()], default_root_dir=folder,
        ).fit(module, Rows())  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
