"""What the GraftCallback costs: memory per rank, and its share of the validation, at about 100M parameters.

    python benchmarks/graft_cost.py [--repetitions 3]

Makes a Qwen3-architecture pair of 108M random parameters (bfloat16 files) in a temporary folder and trains it for
four steps with one validation, each run in a process of its own: without the callback, with it, and with it
offloaded; full tuning and LoRA; one process and two processes under FSDP2 (gloo). Prints a Markdown table of
medians. On a CPU "offloaded" and "on the device" are the same memory: the two rows show that nothing is kept
twice, the saving shows on a GPU only.
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

NUM_BATCHES, BATCH_SIZE, LENGTH, VOCABULARY = 8, 4, 128, 32768


def make_pair(root: Path, hidden: int = 768) -> None:
    """Save the two models; the Instruct is the Base with noise of a hundredth of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.tiny import make_tokenizer

    config = AutoConfig.for_model(
        "qwen3", vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=12,
        head_dim=64, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 192, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name in ("base", "instruct"):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 2e-4)


def run(root: str, kind: str, mode: str, world_size: int) -> None:
    """Train in this process; rank 0 prints its figures as JSON."""
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
    from lightning.pytorch.strategies import ModelParallelStrategy
    from peft import LoraConfig
    from torch.utils.data import DataLoader

    from shadowlit.callbacks.graft import GraftCallback
    from shadowlit.pair.pair import ModelPair
    from shadowlit.training.module import ShadowModule

    class Tokens(LightningDataModule):
        validation_names = ("random",)

        def _loader(self):
            generator = torch.Generator().manual_seed(self.trainer.global_rank)
            rows = torch.randint(0, VOCABULARY, (NUM_BATCHES * BATCH_SIZE, LENGTH), generator=generator)
            samples = [{"input_ids": r, "labels": r, "attention_mask": torch.ones_like(r)} for r in rows]
            return DataLoader(samples, batch_size=BATCH_SIZE)

        train_dataloader = val_dataloader = _loader

    class Watch(Callback):
        start = plain_s = 0.0

        def on_validation_start(self, trainer, module):
            self.start = time.perf_counter()

        def on_validation_epoch_end(self, trainer, module):  # listed before the graft: the plain pass is over
            self.plain_s = time.perf_counter() - self.start

    torch.set_num_threads(2 // world_size)
    seed_everything(0)
    module = ShadowModule(
        ModelPair(f"{root}/base", f"{root}/instruct"), LoraConfig(r=16) if kind == "lora" else None, lr=1e-4
    )
    watch = Watch()
    graft = GraftCallback(offload=mode == "offload", baselines=False, statistics=True)
    sharded = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=sharded if world_size > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        use_distributed_sampler=False, num_sanity_val_steps=0, limit_train_batches=4, gradient_clip_val=1.0,
        callbacks=[watch] if mode == "none" else [watch, graft],
    )  # fmt: skip
    trainer.fit(module, Tokens())
    if trainer.is_global_zero:
        logged = {k: v.item() for k, v in trainer.callback_metrics.items()}
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        live = None if mode == "none" else graft.build(module)
        figures = {
            "peak_gb": peak_gb,
            "plain_s": watch.plain_s,
            "graft_s": logged.get("graft/seconds", 0.0),
            "swap_s": logged.get("graft/swap_seconds", 0.0),
            "bytes_per_parameter": live.frozen_bytes / live.num_local_parameters if live else 0.0,
            "parameters": sum(p.numel() for p in module.parameters()),
        }
        print("FIGURES", json.dumps(figures), flush=True)


def measure(root: str, kind: str, mode: str, world_size: int) -> dict[str, float]:
    """One run in processes of its own, as torchrun would start them."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "benchmark",
    }  # fmt: skip
    command = [sys.executable, __file__, "--run", root, kind, mode, str(world_size)]
    ranks = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
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
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--run", nargs=4, metavar=("ROOT", "KIND", "MODE", "WORLD_SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(*options.run[:3], int(options.run[3]))
        return
    print("| tuning | processes | callback | peak memory per rank, GB | frozen bytes per parameter | plain pass, s |"
          " grafted pass beyond a plain one, share | both swaps, share of a plain pass |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        make_pair(Path(root))
        for kind in ("full", "lora"):
            for world_size in (1, 2):
                runs = {mode: [] for mode in ("none", "device", "offload")}
                for _ in range(options.repetitions):  # alternating, so that a slow minute hits all of them
                    for mode in runs:
                        runs[mode].append(measure(root, kind, mode, world_size))
                for mode, figures in runs.items():
                    middle = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
                    plain = middle["plain_s"]
                    beyond = "–" if mode == "none" else f"{middle['graft_s'] / plain - 1:+.1%}"
                    swaps = "–" if mode == "none" else f"{middle['swap_s'] / plain:.2%}"
                    print(
                        f"| {kind} | {world_size} | {mode} | {middle['peak_gb']:.2f} | "
                        f"{middle['bytes_per_parameter']:.1f} | {plain:.2f} | {beyond} | {swaps} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
