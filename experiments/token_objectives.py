"""Short trainings of the embedded pair: objectives per token at one rate, and Muon against AdamW at equal steps.

    python experiments/token_objectives.py --out experiments/results/token_objectives

LoRA r 16, two epochs of the demonstration's 600 rows (38 steps of 32). The end scores the tuned Base and the graft on
the new skill, in bare answers and in the Instruct's style, and on old skills. ``curves.csv`` has a line for each
number; a training whose lines are there is not run again. ``--seconds`` ends after the training that is running then.
``curves.png`` and the printed table show what is there.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from peft import LoraConfig

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.module import ShadowData
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import DFT, EAFT, SFT, Objective

DEMO = Path(__file__).parents[1] / "shadowlit/demo"
COLUMNS = ("training", "seed", "step", "name", "value")
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "SFT": SFT,
    "DFT": DFT,
    "EAFT": EAFT,
    "SFT, KL to the start": partial(SFT, 0.3),
    "SFT, KL to the Instruct": partial(SFT, 0.3, "forward", "instruct"),
    "SFT, reverse KL to the Instruct": partial(SFT, 0.3, "reverse", "instruct"),
}
LEFT_OUT = ("train/lr", "train/tokens")
SCORES = {
    "val/tuned/new/loss": "tuned: new skill, loss",
    "val/tuned/new/sequence_accuracy": "right, %",
    "val/grafted/new_house/loss": "grafted: new skill, loss",
    "val/grafted/new_house/sequence_accuracy": "right, %",
    "val/grafted/old/sequence_accuracy": "grafted: old skills right, %",
}
SHOWN = {"train/cross_entropy": "cross entropy", "train/entropy": "entropy of predictions", "train/kl": "divergence"}
MUON = partial(torch.optim.Muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


class Curves(Callback):
    """Keeps what each step and each validation log."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """The step's own numbers."""
        found = trainer.callback_metrics
        self.rows += [
            (trainer.global_step, k, float(v)) for k, v in found.items() if k.startswith("train/") and k not in LEFT_OUT
        ]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Losses and accuracies of the models."""
        found = trainer.callback_metrics
        self.rows += [(trainer.global_step, k, float(v)) for k, v in found.items() if k.startswith("val/")]


def train(seed: int, **options: object) -> list[tuple[int, str, float]]:
    """Train once and return step, name and value of everything that was logged."""
    pair = ModelPair(str(DEMO / "pair/base"), str(DEMO / "pair/instruct"))
    sets = {name: str(DEMO / f"data/{name}.jsonl") for name in ("new", "new_house", "old")}
    data = ShadowData(
        pair, train=str(DEMO / "data/train.jsonl"), validation=sets, ignore_columns=["skill", "answer", "format"],
        max_length=128, batch_size=32, eval_batch_size=128, cache=False, num_workers=0, seed=seed,
    )  # fmt: skip
    module = ShadowModule(pair, LoraConfig(r=16, lora_alpha=32), seed=seed, **{"lr": 2e-3, **options})  # type: ignore[arg-type]
    curves = Curves()
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2,
        enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0, log_every_n_steps=1,
        check_val_every_n_epoch=2, use_distributed_sampler=False,
        callbacks=[GraftCallback(baselines=False), curves],
    )  # fmt: skip
    trainer.fit(module, data)
    return curves.rows


def read(file: Path) -> dict[str, dict[str, dict[int, list[float]]]]:
    """The values of all seeds by training, name and step."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    with file.open(newline="") as known:
        for row in csv.DictReader(known):
            steps = found.setdefault(row["training"], {}).setdefault(row["name"], {})
            steps.setdefault(int(row["step"]), []).append(float(row["value"]))
    found["SFT"]["train/cross_entropy"] = found["SFT"]["train/loss"]
    found["AdamW at 0.002"] = found["SFT"]  # the same training
    return found


def table(found: dict[str, dict[str, dict[int, list[float]]]]) -> str:
    """What the end scores, as Markdown: mean ± standard error over seeds."""
    lines = [f"| training | {' | '.join(SCORES.values())} |", "|---" * (1 + len(SCORES)) + "|"]
    for training in sorted(found, key=lambda one: (" at " in one, one if " at " in one else 0)):
        cells = []
        for key in SCORES:
            values = found[training][key][max(found[training][key])]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            percent = 100 if key.endswith("accuracy") else 1
            cells.append(f"{percent * statistics.fmean(values):.3g} ± {percent * error:.2g}")
        lines.append(f"| {training} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, dict[int, list[float]]]], file: Path) -> None:
    """Means over seeds by step: of objectives what they log, and of optimizers the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from shadowlit.plotting import SERIES

    figure, axes = plt.subplots(1, 4, figsize=(16, 4))
    panels = [(one, title, list(OBJECTIVES)) for one, title in SHOWN.items()]
    panels.append(("train/loss", "loss by optimizer", sorted(name for name in found if " at " in name)))
    for axis, (key, title, trainings) in zip(axes, panels, strict=True):
        for number, name in enumerate(trainings):
            if steps := found[name].get(key):
                means = [statistics.fmean(steps[step]) for step in sorted(steps)]
                axis.plot(sorted(steps), means, label=name, color=SERIES[number], linewidth=1.2)
        axis.set(title=title, xlabel="step", ylabel="nats per token")
        axis.legend(fontsize=7)
    axes[0].set_yscale("log")
    axes[3].set_yscale("log")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run what is missing, and show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    started, file = time.monotonic(), args.out / "curves.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    done = set()
    if file.exists():
        with file.open(newline="") as known:
            done = {(row["training"], int(row["seed"])) for row in csv.DictReader(known)}
    else:
        file.write_text(",".join(COLUMNS) + "\n")
    planned: dict[str, dict[str, object]] = {name: {"objective": make} for name, make in OBJECTIVES.items()}
    for rate in (1e-3, 2e-3, 4e-3):
        planned |= {f"AdamW at {rate:g}": {"lr": rate}, f"Muon at {rate:g}": {"lr": rate, "optimizer": MUON}}
    for seed in args.seeds:
        for name, options in planned.items():
            if (name, seed) in done or name == "AdamW at 0.002":  # which is SFT
                continue
            if time.monotonic() - started > args.seconds:
                continue
            make = options.get("objective")
            rows = train(seed, **{**options, **({"objective": make()} if callable(make) else {})})
            with file.open("a", newline="") as out:
                csv.writer(out).writerows((name, seed, step, what, f"{value:.6g}") for step, what, value in rows)
            print(f"{name}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    found = read(file)
    plot(found, args.out / "curves.png")
    print(table(found))


if __name__ == "__main__":
    main()
