"""How long a training waits for its checkpoints, synchronous and asynchronous, with a real model.

    python benchmarks/checkpoints.py MODEL [--repetitions 3] [--steps 12] [--every 4] [--out FOLDER]

Trains all weights of MODEL, a folder, and keeps the newest checkpoint (weights and AdamW's moments in float32), with
and without ``checkpoint.asynchronous`` by turns, each run in processes of its own: one process that writes one file,
and two under FSDP2 (gloo) that write shards. Prints a Markdown table of medians: of the time in ``save_checkpoint``,
of a step after the first checkpoint was begun, of the time from the last step to the end, and of the whole training.
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

BATCH_SIZE, LENGTH = 2, 64


def run(model: str, out: str, asynchronous: bool, world_size: int, steps: int, every: int) -> None:
    """Train in this process; rank 0 prints its figures as JSON."""
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.utils.data import DataLoader

    from shadowlit.callbacks.checkpoint import CheckpointCallback
    from shadowlit.pair.pair import ModelPair
    from shadowlit.training.module import ShadowModule

    class Tokens(LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            generator = torch.Generator().manual_seed(self.trainer.global_rank)
            rows = torch.randint(0, 1000, (steps * BATCH_SIZE // world_size, LENGTH), generator=generator)
            samples = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
            return DataLoader(samples, batch_size=BATCH_SIZE // world_size)

    class Timed(Trainer):
        saved: list[float] = []  # noqa: RUF012 - one trainer

        def save_checkpoint(self, *args, **kwargs) -> None:
            start = time.perf_counter()
            super().save_checkpoint(*args, **kwargs)
            self.saved.append(time.perf_counter() - start)

    class Watch(Callback):
        steps_s: list[float] = []  # noqa: RUF012
        start = began = ended = 0.0

        def on_train_start(self, *_) -> None:
            self.began = time.perf_counter()

        def on_train_batch_start(self, *_) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_) -> None:
            self.steps_s.append(time.perf_counter() - self.start)

        def on_train_end(self, *_) -> None:
            self.ended = time.perf_counter()

    torch.set_num_threads(2 // world_size)
    seed_everything(0)
    watch, sharded = Watch(), ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    trainer = Timed(
        accelerator="cpu", devices=world_size, strategy=sharded if world_size > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=steps, use_distributed_sampler=False,
        callbacks=[watch, ModelCheckpoint(out, every_n_train_steps=every), CheckpointCallback(asynchronous)],
    )  # fmt: skip
    trainer.fit(ShadowModule(ModelPair(model, model), lr=1e-5), Tokens())
    end = time.perf_counter()
    if trainer.is_global_zero:
        figures = {
            "blocked_s": statistics.median(trainer.saved),
            "end_s": end - watch.ended,
            "step_s": statistics.median(watch.steps_s[every:]),
            "train_s": end - watch.began,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "bytes": sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file()),
        }
        print("FIGURES", json.dumps(figures), flush=True)


def measure(model: str, out: str, asynchronous: bool, world_size: int, steps: int, every: int) -> dict[str, float]:
    """One run in processes of its own, as torchrun would start them."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513",
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "benchmark",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=out) as folder:
        arguments = [model, folder, *(str(int(value)) for value in (asynchronous, world_size, steps, every))]
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--run", *arguments], text=True,
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
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=4, help="steps from one checkpoint to the next")
    parser.add_argument("--out", default=None, help="folder on the disk to measure; by default the temporary one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--run", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        model, out, *numbers = options.run
        asynchronous, *others = map(int, numbers)
        return run(model, out, bool(asynchronous), *others)
    print("| processes | writes | GB | blocked per checkpoint, s | step, s | end, s | training, s | peak memory, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for world_size in options.ranks:
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(options.repetitions):
            for asynchronous, figures in found.items():
                figures.append(
                    measure(options.model, options.out, asynchronous, world_size, options.steps, options.every)
                )
        for asynchronous, figures in found.items():
            columns = [
                f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
                for values in ([one[name] for one in figures] for name in ("blocked_s", "step_s", "end_s", "train_s"))
            ]
            peak, size = (statistics.median(one[name] for one in figures) for name in ("peak_gb", "bytes"))
            how = "asynchronous" if asynchronous else "synchronous"
            print(f"| {world_size} | {how} | {size / 1e9:.2f} | {' | '.join(columns)} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
