"""What ``shadowlit plan`` estimates, next to the peaks that are measured: memory per rank, in two phases of a run.

    python benchmarks/memory.py --model SmolLM2-135M-Instruct --data alpaca_en_demo.json [--settings lora_32 ...]

The Instruct is the given folder, and the Base a copy with noise of a hundredth of its weights. The data are 16 rows
with short prompts and long answers, so that every batch is as long as the longest one, which the estimate assumes.
Each setting trains two steps in processes of its own, with a validation after them; the first step fills the
optimizer's moments and leaves gradients, so that the second has everything in memory. The peak of a phase is the
largest resident size of the process in it (Linux forgets the earlier ones when 5 is written to
``/proc/self/clear_refs``). Prints a Markdown table: estimated / measured, in MB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LORA = "--model.adapter={r: 16, lora_alpha: 32, target_modules: all-linear}"
FSDP = [
    "--trainer.devices=2",
    "--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy, "
    "init_args: {data_parallel_size: 2, tensor_parallel_size: 1}}",
]
SETTINGS = {
    "LoRA, 32-true": [LORA],
    "LoRA, bf16-mixed": [LORA, "--trainer.precision=bf16-mixed"],
    "full, 32-true": [],
    "full, bf16-mixed": ["--trainer.precision=bf16-mixed"],
    "full, 32-true, activation checkpointing": ["--model.activation_checkpointing=full"],
    "LoRA, 32-true, selective checkpointing": [LORA, "--model.activation_checkpointing=selective"],
    "LoRA, 32-true, FSDP2 on 2 ranks": [LORA, *FSDP],
    "full, 32-true, FSDP2 on 2 ranks": [*FSDP],
    "full, bf16-mixed, FSDP2 on 2 ranks": ["--trainer.precision=bf16-mixed", *FSDP],
    "full, 32-true, DDP on 2 ranks": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "DoRA, 32-true": [LORA.replace("}", ", use_dora: true}")],
    "QLoRA, bf16-mixed": [LORA, "--model.quantization=nf4", "--trainer.precision=bf16-mixed"],
    "LoRA, 32-true, packed (padding_free)": [LORA, "--data.packing=padding_free"],
    "LoRA, 32-true, 1 x 1,024 tokens": [LORA, "--data.batch_size=1", "--data.max_length=1024"],
}


def make_base(instruct: Path, base: Path) -> None:
    """Write the Base: the Instruct's weights times 1 plus noise."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(instruct, base)
    tensors = load_file(instruct / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {k: (v * (1 + 1e-2 * torch.randn(v.shape, generator=generator))).to(v.dtype) for k, v in tensors.items()}
    save_file(noisy, base / "model.safetensors", metadata={"format": "pt"})


def arguments(root: Path, setting: str, data: str, rows: int, length: int) -> list[str]:
    """The arguments of fit and of plan."""
    folder = root / re.sub(r"\W+", "_", setting)
    return [
        f"--pair.base={root / 'base'}", f"--pair.instruct={root / 'instruct'}", f"--data.train={data}",
        f"--data.validation={{task: {{path: {data}, max_rows: 4}}}}", "--data.limit_train_samples=16",
        f"--data.max_length={length}", f"--data.batch_size={rows}", "--data.cache=false", "--trainer.accelerator=cpu",
        "--trainer.devices=1", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.logger=false",
        "--trainer.num_sanity_val_steps=0", "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=2",
        "--trainer.enable_checkpointing=false", f"--run.root={folder}", "--export.enabled=false",
        "--model.schedule=constant", "--model.warmup_ratio=0", *SETTINGS[setting],
    ]  # fmt: skip


def resident(reset: bool = False) -> float:
    """The largest resident size of this process since the last reset, in MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(found[1]) * 1024 / 1e6


def run(args: list[str]) -> None:
    """Train in this process; each rank prints its peaks as JSON."""
    sys.path.insert(0, str(ROOT))
    from lightning.pytorch import Callback

    from shadowlit.lightning_cli import main

    peaks: dict[str, float] = {}

    class Peaks(Callback):
        def on_train_start(self, *_: Any) -> None:
            peaks["loading"] = resident(reset=True)

        def on_validation_start(self, *_: Any) -> None:
            peaks["training"] = max(peaks.get("training", 0.0), resident(reset=True))

        def on_validation_end(self, *_: Any) -> None:
            peaks["validation"] = max(peaks.get("validation", 0.0), resident(reset=True))

    cli = main(["fit", *args], callbacks=[Peaks()])
    # In one write, for the ranks share the output.
    os.write(1, f"\nPEAKS {json.dumps([cli.trainer.global_rank, peaks])}\n".encode())


def plan(args: list[str]) -> None:
    """Estimate in this process and print the peaks as JSON."""
    sys.path.insert(0, str(ROOT))
    from shadowlit.lightning_cli import main

    planned = main(["plan", *args, "--measure_steps=0"]).planned
    peaks = {phase: size / 1e6 for phase, size in planned.phases(planned.memory()).items()}
    os.write(1, f"\nPEAKS {json.dumps([0, peaks])}\n".encode())


def peaks_of(mode: str, folder: Path, args: list[str]) -> dict[str, float]:
    """The largest peaks of any rank, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), mode, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    found = [json.loads(line[6:])[1] for line in done.stdout.splitlines() if line.startswith("PEAKS ")]
    if done.returncode or not found:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return {phase: max(each[phase] for each in found) for phase in found[0]}


if __name__ == "__main__":
    if sys.argv[1:2] in (["--run"], ["--plan"]):
        {"--run": run, "--plan": plan}[sys.argv[1]](sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = [row for row in json.loads(options.data.read_text()) if len(row["instruction"] + row["input"]) < 200]
        rows = sorted(rows, key=lambda row: len(row["output"]))[-16:]
        data = folder / "rows.json"
        data.write_text(json.dumps(rows))
        (folder / "instruct").symlink_to(options.model.resolve())
        make_base(options.model, folder / "base")
        print("| setting | training | validation |\n|---|---|---|")
        for name in options.settings:
            given = arguments(folder, name, str(data), options.rows, options.length)
            estimated, measured = (peaks_of(mode, folder, given) for mode in ("--plan", "--run"))
            cells = [
                f"{estimated[p]:,.0f} / {measured[p]:,.0f} ({estimated[p] / measured[p] - 1:+.0%})" for p in estimated
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
