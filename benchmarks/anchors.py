"""What two anchors cost: time and memory of a step, next to a training on the Base alone with the same tokens.

    python benchmarks/anchors.py [--repetitions 3] [--kinds full lora] [--micro 4] [--steps 3] [--hidden 768]

Trains a pair of 108M random parameters (that of graft_cost.py; 33M with --hidden 384) on 4 micro-batches of 4 rows of
64 tokens a step, one of them on the Instruct, each run in a process of its own and in turns, with the graft's callback
in both. The first step is not counted. Prints a Markdown table of medians: processor seconds and seconds of a step, the
peak of resident memory, and their ratios to the training on the Base alone.
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

from graft_cost import VOCABULARY, make_pair

ROWS, LENGTH = 4, 64


def run(root: str, kind: str, weight: float, micro: int, steps: int) -> None:
    """Train in this process, and print its figures as JSON."""
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
    from peft import LoraConfig
    from torch.utils.data import DataLoader

    from shadowlit.callbacks.graft import GraftCallback
    from shadowlit.pair.pair import ModelPair
    from shadowlit.training.anchors import Anchors
    from shadowlit.training.module import ShadowModule

    class Tokens(LightningDataModule):
        def train_dataloader(self):
            rows = torch.randint(0, VOCABULARY, ((steps + 1) * micro * ROWS, LENGTH))
            samples = [{"input_ids": r, "labels": r, "attention_mask": torch.ones_like(r)} for r in rows]
            return DataLoader(samples, batch_size=ROWS)

    class Watch(Callback):
        begun = (0.0, 0.0)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == micro - 1:
                self.begun = time.process_time(), time.perf_counter()

        def on_train_end(self, trainer, module):
            now = time.process_time(), time.perf_counter()
            self.seconds = [(end - begin) / steps for begin, end in zip(self.begun, now, strict=True)]

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    seed_everything(0)
    pair, adapter = ModelPair(f"{root}/base", f"{root}/instruct"), None if kind == "full" else LoraConfig(r=16)
    watch, anchors = Watch(), Anchors(weight) if weight else None
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0, accumulate_grad_batches=micro,
        precision="bf16-mixed" if kind == "lora-bf16" else "32-true", callbacks=[watch, GraftCallback()],
    )  # fmt: skip
    trainer.fit(ShadowModule(pair, adapter, lr=1e-4, anchors=anchors), Tokens())
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print("FIGURES", json.dumps([*watch.seconds, peak_gb]), flush=True)


def measure(*args: object) -> list[float]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--run", *map(str, args)]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True)
    for line in done.stdout.splitlines():
        if line.startswith("FIGURES "):
            return json.loads(line.removeprefix("FIGURES "))
    raise RuntimeError(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["full", "lora"])
    parser.add_argument("--micro", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768, help="width, a multiple of 192")
    parser.add_argument("--run", nargs=5, metavar=("ROOT", "KIND", "WEIGHT", "MICRO", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        root, kind, weight, *counts = options.run
        run(root, kind, float(weight), *map(int, counts))
        return
    print("| tuning | anchors | processor seconds a step | seconds a step | peak memory, GB | ratios |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        make_pair(Path(root), options.hidden)
        for kind in options.kinds:
            runs: dict[float, list[list[float]]] = {0.0: [], 1 / options.micro: []}
            for _ in range(options.repetitions):  # in turns, so that a slow minute hits all of them
                for weight, found in runs.items():
                    found.append(measure(root, kind, weight, options.micro, options.steps))
            medians = {
                weight: [statistics.median(part) for part in zip(*each, strict=True)] for weight, each in runs.items()
            }
            for weight, (cpu, wall, peak) in medians.items():
                ratios = " / ".join(f"{a / b:.2f}" for a, b in zip((cpu, wall, peak), medians[0.0], strict=True))
                print(f"| {kind} | {weight or 'none'} | {cpu:.2f} | {wall:.2f} | {peak:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
