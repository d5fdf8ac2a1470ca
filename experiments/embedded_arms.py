"""The embedded pair's arms over seeds: what the table of the README is made of.

    python experiments/embedded_arms.py [--runs runs/embedded_arms] [--seeds 0 1 2]

Runs the demonstration for each arm and seed in a process of its own (about a minute each on two cores), skips what
is finished, and prints a Markdown table: exact match of greedy answers to held-out questions in %, mean ± standard
error over the seeds. B2I trains the Base and grafts, I2I tunes the Instruct directly (its "grafted" model is the
tuned one). Each arm has its own learning rate; how they were found is in dev/LOG.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTRUCT = "--pair.base=shadowlit/demo/pair/instruct"
HOUSE = "--data.train=shadowlit/demo/data/train_house.jsonl"
SETS = ("new", "old", "format", "refusal")
ARMS = {
    "b2i_lora": ("lora", "B2I, LoRA", "2e-3", []),
    "b2i_full": ("full", "B2I, full", "3e-4", []),
    "i2i_lora": ("lora", "I2I, LoRA", "3e-4", [INSTRUCT]),
    "i2i_full": ("full", "I2I, full", "7e-5", [INSTRUCT]),
    "house_b2i_lora": ("lora", "B2I, LoRA, house-style answers", "2e-3", [HOUSE]),
    "house_i2i_lora": ("lora", "I2I, LoRA, house-style answers", "1e-3", [HOUSE, INSTRUCT]),
    "house_b2i_full": ("full", "B2I, full, house-style answers", "3e-4", [HOUSE]),
    "house_i2i_full": ("full", "I2I, full, house-style answers", "3e-4", [HOUSE, INSTRUCT]),
}


def run(runs: Path, arm: str, seed: int) -> dict[str, dict[str, float]]:
    """Exact match by model and set of one arm and seed, from its file if it is there."""
    name = f"{arm}_{seed}"
    finished = runs / name / "version_0/demo.json"
    if not finished.is_file():
        config, _, rate, overrides = ARMS[arm]
        seeds = [f"--{key}={seed}" for key in ("seed_everything", "model.seed", "data.seed")]
        subprocess.run(
            [
                sys.executable, "-m", "shadowlit.demo", "--config", f"configs/demo_{config}.yaml", f"--model.lr={rate}",
                f"--trainer.logger.init_args.save_dir={runs.resolve()}", f"--trainer.logger.init_args.name={name}",
                "--trainer.enable_progress_bar=false", *seeds, *overrides,
            ],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    return json.loads(finished.read_text())["exact_match"]


def row(title: str, rate: str, found: list[dict[str, float]]) -> str:
    """A line of the table."""
    columns = [[100 * scores[name] for scores in found] for name in SETS]
    columns.append([statistics.mean(values) for values in zip(*columns, strict=True)])
    return f"| {title} | {rate} | " + " | ".join(map(_cell, columns)) + " |"


def _cell(values: list[float]) -> str:
    middle = f"{statistics.mean(values):.1f}"
    return middle if len(set(values)) == 1 else f"{middle} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/embedded_arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    print("| model | lr | new task | old skills | format asked | refusals | mean |\n|---|---|---|---|---|---|---|")
    for arm, (_, title, rate, _) in ARMS.items():
        found = [run(options.runs, arm, seed) for seed in options.seeds]
        if arm == "b2i_lora":
            print(row("Base, untouched", "–", [scores["base"] for scores in found]))
            print(row("Instruct, untouched", "–", [scores["instruct"] for scores in found]))
        if arm.startswith("b2i"):
            print(row(f"tuned Base{title.removeprefix('B2I')}", rate, [scores["tuned"] for scores in found]))
        print(row(title, rate, [scores["grafted"] for scores in found]), flush=True)


if __name__ == "__main__":
    main()
