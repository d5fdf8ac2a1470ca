"""How long a training waits for its checkpoints, synchronous and asynchronous, with a real model.

    python benchmarks/checkpoints.py MODEL [--repetitions 3] [--ranks 1 2] [--out FOLDER]

Trains all weights of MODEL, a folder, for one step, and then writes checkpoints (weights and AdamW's moments in
float32) by turns with and without ``checkpoint.asynchronous``: one process writes one file, two under FSDP2 (gloo)
write shards. Prints a Markdown table of medians, smallest and largest: the time for which the training is blocked,
that until the checkpoint is on the disk, and the CPU time of rank 0 that it takes: on a CPU, from the training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(model: str, out: str, world_size: int, repetitions: int) -> None:
    """Train in this process; rank 0 prints its figures as JSON."""
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.utils.data import DataLoader

    from shadowlit.callbacks.checkpoint import CheckpointCallback
    from shadowlit.pair.pair import ModelPair
    from shadowlit.training.checkpoints import wait_for
    from shadowlit.training.module import ShadowModule

    class Tokens(LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            row = torch.arange(16)
            return DataLoader([{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}])

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_) -> None:
            io = trainer.strategy.checkpoint_io
            background, path = io.background, Path(out) / "last.ckpt"
            trainer.save_checkpoint(path)  # the first one pays for what is set up once
            wait_for(trainer)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            found: dict[str, list[list[float]]] = {"synchronous": [], "asynchronous": []}
            for _ in range(repetitions):
                for how, figures in found.items():
                    io.background = background if how == "asynchronous" else None
                    start, cpu = time.perf_counter(), time.process_time()
                    trainer.save_checkpoint(path)
                    blocked = time.perf_counter() - start
                    wait_for(trainer)
                    figures.append([blocked, time.perf_counter() - start, time.process_time() - cpu])
            files = [path, *path.rglob("*")]
            size = sum(file.stat().st_size for file in files if file.is_file()) / 1e9
            if trainer.is_global_zero:
                print("FIGURES", json.dumps({"found": found, "gb": size, "peak_gb": peak}), flush=True)

    torch.set_num_threads(2 // world_size)
    seed_everything(0)
    sharded = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=sharded if world_size > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_steps=1,
        use_distributed_sampler=False, callbacks=[CheckpointCallback(True), Saves()],
    )  # fmt: skip
    trainer.fit(ShadowModule(ModelPair(model, model), lr=1e-5), Tokens())


def measure(model: str, out: str | None, world_size: int, repetitions: int) -> dict:
    """One run in processes of its own, as torchrun would start them."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513",
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "benchmark",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=out) as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--run", model, folder, str(world_size), str(repetitions)], text=True,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        outputs = [process.communicate() for process in ranks]
    for output, _ in outputs:
        for line in output.splitlines():
            if line.startswith("FIGURES "):
                return json.loads(line.removeprefix("FIGURES "))
    raise RuntimeError(outputs[0][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", default=None, help="folder on the disk to measure; by default the temporary one")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        model, out, world_size, repetitions = options.run
        return run(model, out, int(world_size), int(repetitions))
    print("| processes | writes | GB | blocked, s | on the disk after, s | CPU time of rank 0, s | peak memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for world_size in options.ranks:
        measured = measure(options.model, options.out, world_size, options.repetitions)
        for how, figures in measured["found"].items():
            columns = [f"{statistics.median(c):.2f} ({min(c):.2f}–{max(c):.2f})" for c in zip(*figures, strict=True)]
            size, peak = measured["gb"], measured["peak_gb"]
            print(f"| {world_size} | {how} | {size:.2f} | {' | '.join(columns)} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
