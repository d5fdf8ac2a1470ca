"""``shadowlit demo``: from training to the exported Instruct on the embedded pair.

Trains the Base, validates the grafted Instruct as it trains, and exports it; then tests the four models on all held-out
questions, prints the table, draws the curves, and shows how to load the result.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from shadowlit.analysis.run import read_run
from shadowlit.analysis.run_plots import four_curves
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.folder import run_folder
from shadowlit.callbacks.scores import SUBJECTS, subject_headings
from shadowlit.demo import CONFIG, PAIR
from shadowlit.files import replace_text
from shadowlit.lightning_cli import main as run
from shadowlit.plotting import save_image
from shadowlit.progress import make_console, make_table
from shadowlit.text import number

SETS = {"new": "new task", "old": "old skills", "format": "formats", "refusal": "refusals"}
TEACHER_FORCED = {"new": "new task, bare", "new_house": "new task, styled", "old": "old skills"}
_TEACHER_FORCED = ("loss", "perplexity", "accuracy", "sequence_accuracy", "first_token_loss")


def main(args: list[str] | None = None) -> None:
    """Run the demonstration; further arguments are passed on to ``fit`` as overrides."""
    parser = argparse.ArgumentParser(prog="shadowlit demo", description=__doc__)
    parser.add_argument("--config", default=str(CONFIG), help="configuration of fit (default: that of the package)")
    options, overrides = parser.parse_known_args(args)
    console = make_console()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        config = Path(place, Path(options.config).name)
        # Its paths are those of the repository.
        text = Path(options.config).read_text(encoding="utf-8")
        config.write_text(text.replace(" shadowlit/demo/", f" {PAIR.parent}/"), encoding="utf-8")
        cli = run(["fit", "--config", str(config), *overrides])
    trained_s = time.perf_counter() - start
    trainer = cli.trainer
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    export = next(c for c in callbacks if isinstance(c, ExportCallback))
    share = trainer.callback_metrics["evaluation/time_share"].item()
    trainer.test(cli.model, cli.datamodule, verbose=False)
    scores = {name: value.item() for name, value in trainer.callback_metrics.items()}
    results: dict[str, dict[str, Any]] = {
        "teacher_forced": {name: value for name, value in scores.items() if name.rpartition("/")[2] in _TEACHER_FORCED},
        "exact_match": {who: {name: scores[f"test/{who}/{name}/score"] for name in SETS} for who in SUBJECTS},
        "forgetting": {who: scores[f"test/{who}/forgetting/kl"] for who in SUBJECTS},
    }
    folder = run_folder(trainer)
    replace_text(folder / "demo.json", json.dumps(results, indent=2, sort_keys=True) + "\n")
    figure = four_curves(read_run(folder), ("loss", "sequence_accuracy"), ("new", "new_house", "old"))
    plot = save_image(figure, folder / "curves.png", dpi=150)
    console.print(table(results))
    console.print(_CAPTION, style="dim")
    console.print(
        f"\ntrained, validated and exported in {trained_s:.0f} s ({share:.0%} of the training's time answering and "
        f"measuring forgetting), all in {time.perf_counter() - start:.0f} s\n"
        f"plot      {plot}\nnumbers   {folder / 'demo.json'}\nmodel     {export.exported}\n\n"
        "Load it as any other model:\n"
    )
    console.print(
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{export.exported}")\n'
        f'    tokenizer = AutoTokenizer.from_pretrained("{export.exported}")\n',
    )


_CAPTION = (
    "loss (nats per token) and token accuracy: teacher-forced, on reference answers as in training (bare) or in the "
    "Instruct's house style (styled; old skills too).\nexact match: greedy answers; on the new task and the old skills "
    "the value counts, in any style.\nKL from the Instruct: on the old skills, in nats per token; its own is 0."
)


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Return the table of the four models: loss and token accuracy by set, and the fraction of right answers."""
    scores, exact = results["teacher_forced"], results["exact_match"]
    drawn = make_table("", *subject_headings(), title="On held-out questions")
    for name, title in TEACHER_FORCED.items():
        losses = (number(scores[f"test/{who}/{name}/loss"]) for who in SUBJECTS)
        drawn.add_row(f"{title}: loss", *losses)
        accuracies = (f"{scores[f'test/{who}/{name}/accuracy']:.1%}" for who in SUBJECTS)
        drawn.add_row(f"{title}: accuracy", *accuracies)
    drawn.add_section()
    for name, title in SETS.items():
        drawn.add_row(f"{title}: exact match", *(f"{exact[who][name]:.1%}" for who in SUBJECTS))
    drawn.add_section()
    drawn.add_row("KL from the Instruct", *(number(results["forgetting"][who]) for who in SUBJECTS))
    return drawn


if __name__ == "__main__":
    main()
