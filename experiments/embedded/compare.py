"""The comparison on the embedded pair: three settings, two styles of training answers, LoRA and full tuning.

    python experiments/embedded/compare.py [--runs runs/embedded] [--workers 2] [--only skill_bare_lora ...]

Makes the settings' data, runs ``compare`` on each of the twelve (four or five learning rates and three seeds per arm,
300 trainings in all), and writes ``experiments/embedded/REPORT.md`` and its plots. What is finished is skipped, so
it can be interrupted. 52 to 101 minutes on two cores, depending on their speed, with little else running.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a thread for each worker

from combined import write_combined

from experiments.embedded.settings import settings
from experiments.embedded.world import World, write_rows
from shadowlit.cli.compare import compare
from shadowlit.studies.comparison.records import read_records
from shadowlit.studies.comparison.summary import Description, summarise

ROOT = Path(__file__).parents[2]
SHIPPED = "shadowlit/demo/data"
ARMS = ["B2I", "I2I", "B2B", "I2B"]
SEEDS = [0, 1, 2]
RATES = {
    "lora": {"B2I": [5e-4, 1e-3, 2e-3, 4e-3], "I2I": [2e-4, 5e-4, 1e-3, 3e-3]},
    "full": {"B2I": [1e-4, 3e-4, 6e-4, 1e-3], "I2I": [5e-5, 1e-4, 3e-4, 6e-4]},
}
# Where the Instruct's best rate was known to lie between two of these.
FINER = {("skill", "lora"): {"I2I": [3e-4]}, ("skill", "full"): {"I2I": [7e-5]}}
SETTINGS = {
    "skill": ("a new skill", "new", 8, 32),
    "facts": ("new facts, asked and answered", "facts", 16, 16),
    "text": ("new facts, in plain text", "facts", 10, 16),
}
STYLES = {"bare": "bare answers", "house": "the Instruct's house style"}
METHODS = {"lora": "LoRA", "full": "full tuning"}
KEEP = ["old", "format", "refusal"]
COMMAND = "python experiments/embedded/compare.py"
_VALUE_FIRST = r"^{answer}(?!\w)"


def evaluators(gain: str, data: Path) -> dict[str, dict]:
    """The new task, and what the Instruct could before: old skills, forms on request, refusals, and its own words."""

    def generation(file: Path | str, **options: object) -> dict:
        own = {"data": str(file), "max_new_tokens": 24, "batch_size": 128, "limit": 100, **options}
        return {"class_path": "shadowlit.evaluation.generated.Generation", "init_args": own}

    new = f"{SHIPPED}/new.jsonl" if gain == "new" else data / "facts.jsonl"
    refusals = f"{SHIPPED}/refusal.jsonl" if gain == "new" else data / "facts_refusal.jsonl"
    return {
        gain: generation(new, answer="answer", match="regex", pattern=_VALUE_FIRST),
        "old": generation(f"{SHIPPED}/old.jsonl", answer="answer", match="regex", pattern=_VALUE_FIRST),
        "format": generation(f"{SHIPPED}/format.jsonl", match="exact"),
        "refusal": generation(refusals, match="regex", pattern=r"(?i)^sorry\b"),
        "forgetting": {
            "class_path": "shadowlit.evaluation.forgetting.Divergence",
            "init_args": {"data": f"{SHIPPED}/old.jsonl", "batch_size": 128, "limit": 100},
        },
    }


def run(setting: str, style: str, method: str, runs: Path, workers: int) -> None:
    """One of the twelve comparisons."""
    _, gain, epochs, batch_size = SETTINGS[setting]
    data = runs / "data"
    stem = {"skill": "train", "facts": "facts_train", "text": "text_train"}[setting]
    train = (Path(SHIPPED) if setting == "skill" else data) / f"{stem}{'_house' if style == 'house' else ''}.jsonl"
    held_out = f"{SHIPPED}/new_house.jsonl" if setting == "skill" else str(data / "facts.jsonl")
    compare(
        f"configs/demo_{method}.yaml",
        arms=ARMS,
        seeds=SEEDS,
        rates={arm: [*own, *FINER.get((setting, method), {}).get(arm, [])] for arm, own in RATES[method].items()},
        scales=[1.0, 0.5, 0.25, 0.75],
        task_scales=[0.5],
        gain=[gain],
        keep=KEEP,
        line="loss",
        overrides={
            "data.train": str(train),
            "data.validation": {"new": held_out},
            "data.batch_size": batch_size,
            "data.eval_batch_size": 128,
            "trainer.max_epochs": epochs,
            "trainer.check_val_every_n_epoch": epochs,
            "trainer.val_check_interval": 1.0,
            "trainer.num_sanity_val_steps": 0,
            "trainer.callbacks": [],
            "trainer.enable_checkpointing": False,
            "trainer.log_every_n_steps": 50,
            "evaluation.evaluators": evaluators(gain, data),
        },
        title=title(setting, style, method),
        out=str(runs / f"{setting}_{style}_{method}"),
        workers=workers,
        threads=1,
    )


def title(setting: str, style: str, method: str) -> str:
    return f"{SETTINGS[setting][0]}, {STYLES[style]}, {METHODS[method]}"


def report(names: list[tuple[str, str, str]], runs: Path) -> Path:
    """The twelve comparisons as one report, from what has finished."""
    reports = {}
    for each in names:
        file = runs / "_".join(each) / "records.json"
        if file.is_file():
            described = Description(title(*each), f"configs/demo_{each[2]}.yaml", COMMAND)
            gain = [SETTINGS[each[0]][1]]
            reports["_".join(each)] = summarise(read_records(file), described, gain=gain, keep=KEEP)
    whole = Description("The arms on the embedded pair", "configs/demo_lora.yaml, configs/demo_full.yaml", COMMAND)
    return write_combined(reports, whole, ROOT / "experiments/embedded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/embedded"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="names of settings, e.g. skill_bare_lora")
    options = parser.parse_args()
    os.chdir(ROOT)
    write_rows(options.runs / "data", settings(World()))
    names = [(s, style, method) for s in SETTINGS for style in STYLES for method in METHODS]
    chosen = [each for each in names if not options.only or "_".join(each) in options.only]
    for each in chosen:
        print("_".join(each), flush=True)
        run(*each, options.runs, options.workers)
    print(report(names, options.runs))


if __name__ == "__main__":
    main()
