"""Preferences on the embedded pair: DPO of the Base grafted on the Instruct, against DPO of the Instruct.

    python experiments/embedded/preferences.py [--runs runs/preferences] [--workers 1] [--only skill] [--seeds 0 1 2]

Makes the pairs of ``preference_pairs.py``, runs ``compare`` on two settings (three learning rates and three
seeds per arm, 36 trainings), and writes ``experiments/embedded/PREFERENCES.md``. What is finished is skipped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a thread for each worker

import numpy as np
from preference_pairs import preferences

from experiments.embedded.world import World, write_rows
from shadowlit.cli.compare import compare
from shadowlit.studies.comparison.records import read_records
from shadowlit.studies.comparison.selection import choose_rate, scored, seeds_of, standings
from shadowlit.studies.rows import Row

ROOT = Path(__file__).parents[2]
SHIPPED = "shadowlit/demo/data"
ARMS = ["B2I", "I2I", "B2B", "I2B"]
SEEDS = [0, 1, 2]
RATES = {"B2I": [2e-3, 4e-3, 8e-3], "I2I": [5e-4, 1e-3, 2e-3]}
EPOCHS = {"skill": 6, "style": 3}
SETS = {
    "skill": {"new": "skill_new", "new_house": "skill_new_house", "old_house": "skill_old_house"},
    "style": {"style": "style_held_out", "old_house": "skill_old_house"},
}
TITLES = {
    "skill": "The right value over a wrong one (new skill and old ones, bare)",
    "style": "The bare value over the same in the Instruct's style (old skills)",
}
GAIN = {"skill": ["new"], "style": ["plain"]}
KEEP = {"skill": ["old", "format", "refusal"], "style": ["old", "format", "refusal"]}
_VALUE_FIRST = r"^{answer}(?!\w)"


def evaluators(setting: str, data: Path) -> dict[str, dict]:
    """What is to be learned, and what the Instruct could before."""

    def generation(file: Path | str, **options: object) -> dict:
        own = {"data": str(file), "max_new_tokens": 24, "batch_size": 128, "limit": 100, **options}
        return {"class_path": "shadowlit.evaluation.generated.Generation", "init_args": own}

    gained = {
        "skill": {"new": generation(f"{SHIPPED}/new.jsonl", answer="answer", match="regex", pattern=_VALUE_FIRST)},
        "style": {"plain": generation(data / "plain.jsonl", match="exact")},
    }[setting]
    return {
        **gained,
        "old": generation(f"{SHIPPED}/old.jsonl", answer="answer", match="regex", pattern=_VALUE_FIRST),
        "format": generation(f"{SHIPPED}/format.jsonl", match="exact"),
        "refusal": generation(f"{SHIPPED}/refusal.jsonl", match="regex", pattern=r"(?i)^sorry\b"),
    }


def run(setting: str, runs: Path, workers: int, seeds: list[int]) -> None:
    """One of the two comparisons."""
    data = runs / "data"
    compare(
        "configs/demo_lora.yaml",
        arms=ARMS,
        seeds=seeds,
        rates=RATES,
        gain=GAIN[setting],
        keep=KEEP[setting],
        overrides={
            "model.objective": {"class_path": "DPO", "init_args": {"beta": 0.1}},
            "data.train": str(data / f"{setting}_pairs.jsonl"),
            "data.validation": {name: str(data / f"{stem}.jsonl") for name, stem in SETS[setting].items()},
            "data.limit_train_samples": 320,
            "data.batch_size": 16,
            "data.eval_batch_size": 128,
            "trainer.max_epochs": EPOCHS[setting],
            "trainer.check_val_every_n_epoch": EPOCHS[setting],
            "trainer.val_check_interval": 1.0,
            "trainer.num_sanity_val_steps": 0,
            "trainer.callbacks": [],
            "trainer.enable_checkpointing": False,
            "trainer.log_every_n_steps": 50,
            "evaluation.evaluators": evaluators(setting, data),
        },
        title=TITLES[setting],
        out=str(runs / setting),
        workers=workers,
        threads=1,
    )


def table(setting: str, records: Sequence[Row]) -> list[str]:
    """An arm a line, at the rate that the selection half of the rows chose; mean ± sample deviation over the seeds."""
    scores = [*GAIN[setting], *KEEP[setting]]
    columns = [(f"{name}/score", f"{name}, %") for name in scores]
    for name in SETS[setting]:
        columns += [(f"{name}/accuracy", f"{name}: acc., %"), (f"{name}/margin", f"{name}: margin"),
                    (f"{name}/likelier", f"{name}: likelier, %")]  # fmt: skip
    lines = [
        "| arm | rate | " + " | ".join(title for _, title in columns) + " | mean of scores, % |",
        "|" + "---|" * (len(columns) + 3),
    ]
    grid = standings(scored(records, scores))
    for arm in ("Base", "Instruct", *ARMS):
        choice = choose_rate(grid, arm) if arm in ARMS else None
        own = [r for r in records if r.arm == arm and (choice is None or r.lr == choice.best.lr)]
        cells = [arm, f"{choice.best.lr:g}" + (f" ({choice.edge})" if choice.edge else "") if choice else ""]
        for metric, title in columns:
            cells.append(_cell([r.metrics.get(metric, np.nan) for r in own], "%" in title))
        cells.append(_cell([np.mean([r.metrics.get(f"{s}/score", np.nan) for s in scores]) for r in own], True))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rates_table(setting: str, records: Sequence[Row]) -> list[str]:
    """Every rate of the two arms that are compared."""
    scores = [*GAIN[setting], *KEEP[setting]]
    lines = [
        "| arm | rate | " + " | ".join(f"{s}, %" for s in scores) + " | mean, % |",
        "|" + "---|" * (len(scores) + 3),
    ]
    for arm in ("B2I", "I2I"):
        for rate in RATES[arm]:
            own = [r for r in records if r.arm == arm and r.lr == rate]
            cells = [_cell([r.metrics.get(f"{s}/score", np.nan) for r in own], True) for s in scores]
            mean = _cell([np.mean([r.metrics.get(f"{s}/score", np.nan) for s in scores]) for r in own], True)
            lines.append("| " + " | ".join([arm, f"{rate:g}", *cells, mean]) + " |")
    return lines


def _cell(values: Sequence[float], percent: bool) -> str:
    factor, digits = (100, 0) if percent else (1, 1)
    known = factor * np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return "–"
    spread = f" ± {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{spread}"


def report(runs: Path) -> Path:
    """All settings that are finished, as one page."""
    lines = [
        "# Preferences on the embedded pair",
        "",
        "DPO (β = 0.1) with LoRA of rank 16, about 300 pairs in batches of 16. B2I: the Base is trained and its delta "
        "grafted on the Instruct; I2I: the Instruct is trained. Each arm at the rate that does best on one half of the "
        "evaluators' rows, by the mean of its scores; the table is over all rows, so it flatters each arm a little and "
        "alike. accuracy and margin (β times nats) are of implicit rewards on held-out pairs, each model against its "
        "own start; likelier is the share of pairs whose chosen answer has the larger probability, whatever the start. "
        "`(largest)` or `(smallest)`: the rate is the last of those tried.",
        "",
        "Made by `python experiments/embedded/preferences.py`.",
    ]
    for setting, title in TITLES.items():
        file = runs / setting / "records.json"
        if file.is_file():
            records = read_records(file)
            seeds = ", ".join(map(str, seeds_of(records)))
            lines += ["", f"## {title}", "", f"Seeds: {seeds}.", "", *table(setting, records), ""]
            lines += rates_table(setting, records)
    target = ROOT / "experiments/embedded/PREFERENCES.md"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args()
    os.chdir(ROOT)
    write_rows(options.runs / "data", preferences(World()))
    for setting in options.only:
        run(setting, options.runs, options.workers, options.seeds)
    print(report(options.runs))


if __name__ == "__main__":
    main()
