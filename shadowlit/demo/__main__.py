"""``python -m shadowlit.demo``: the whole main job on the embedded pair.

Trains the Base, watches the grafted Instruct, exports it; then scores the four models by what they answer on
held-out questions, prints the table, draws the curves, and says how to load the result.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shadowlit.analysis.curves import plot_curves
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.cli import main as run
from shadowlit.demo import DATA
from shadowlit.demo.scoring import is_correct
from shadowlit.evaluation.generation import generate_answers, greedy_config
from shadowlit.graft.live import BASE
from shadowlit.training.module import ShadowModule

SETS = {"new": "new task", "old": "old skills", "format": "formats", "refusal": "refusals"}
TEACHER_FORCED = {"new": "new task, bare", "new_house": "new task, styled", "old": "old skills"}
MODELS = {"base": "Base", "instruct": "Instruct", "tuned": "tuned Base", "grafted": "grafted Instruct"}
_BATCH = 64
_MAX_NEW_TOKENS = 24


def main(args: list[str] | None = None) -> None:
    """Run the demonstration; further arguments are passed on to ``fit`` as overrides."""
    parser = argparse.ArgumentParser(prog="python -m shadowlit.demo", description=__doc__)
    parser.add_argument("--config", default="configs/demo_lora.yaml", help="a configuration of fit")
    options, overrides = parser.parse_known_args(args)
    console = Console()
    start = time.perf_counter()
    cli = run(["fit", "--config", options.config, *overrides])
    trained_s = time.perf_counter() - start
    module, trainer = cli.model, cli.trainer
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    graft = next(c for c in callbacks if isinstance(c, GraftCallback))
    export = next(c for c in callbacks if isinstance(c, ExportCallback))
    trainer.test(module, cli.datamodule, verbose=False)
    results: dict[str, dict[str, Any]] = {
        "teacher_forced": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "exact_match": exact_match(module, graft, console),
    }
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    (folder / "demo.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    picture = plot_curves(
        folder / "metrics.csv",
        folder / "curves.png",
        sets=("new", "new_house", "old"),
        whats=("loss", "sequence_accuracy"),
    )
    console.print(table(results))
    console.print(_CAPTION, style="dim")
    console.print(
        f"\ntrained, validated and exported in {trained_s:.0f} s, all in {time.perf_counter() - start:.0f} s\n"
        f"picture   {picture}\nnumbers   {folder / 'demo.json'}\nmodel     {export.exported}\n\n"
        "Load it as any other model:\n"
    )
    console.print(
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{export.exported}")\n'
        f'    tokenizer = AutoTokenizer.from_pretrained("{export.exported}")\n',
        highlight=False,
        soft_wrap=True,
    )


_CAPTION = (
    "loss (nats per token) and token accuracy: teacher-forced, on reference answers as in training (bare) or in the "
    "Instruct's house style (styled; old skills too).\nexact match: greedy answers; on the new task and the old skills "
    "the value counts, in any style."
)


def table(results: dict[str, dict[str, Any]]) -> Table:
    """The four models in columns: loss and token accuracy by set, and the share of right answers."""
    scores, exact = results["teacher_forced"], results["exact_match"]
    drawn = Table(title="On held-out questions")
    drawn.add_column("")
    for title in MODELS.values():
        drawn.add_column(title, justify="right")
    for name, title in TEACHER_FORCED.items():
        losses = (f"{scores[f'test/{who}/{name}/loss']:.3f}" for who in MODELS)
        drawn.add_row(f"{title}: loss", *losses)
        accuracies = (f"{scores[f'test/{who}/{name}/accuracy']:.1%}" for who in MODELS)
        drawn.add_row(f"{title}: accuracy", *accuracies)
    drawn.add_section()
    for name, title in SETS.items():
        drawn.add_row(f"{title}: exact match", *(f"{exact[who][name]:.1%}" for who in MODELS))
    return drawn


def exact_match(module: ShadowModule, callback: GraftCallback, console: Console) -> dict[str, dict[str, float]]:
    """Share of right greedy answers, 0 to 1, by model and set of held-out questions."""
    graft = callback.build(module)
    rows = {name: read_jsonl(DATA / f"{name}.jsonl") for name in SETS}
    states: dict[str, float | str | None] = {
        "base": BASE, "instruct": 0.0, "tuned": None, "grafted": callback.scales[0]
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("answering", total=len(MODELS) * sum(map(len, rows.values())))
        for who, state in states.items():
            if state is not None:
                graft.apply(state)
            try:
                found[who] = {}
                for name, questions in rows.items():
                    answers = []
                    for batch in _batches(questions):
                        answers += answer(module, [row["messages"][:-1] for row in batch])
                        progress.advance(task, len(batch))
                    right = [is_correct(row, text) for row, text in zip(questions, answers, strict=True)]
                    found[who][name] = sum(right) / len(right)
            finally:
                graft.restore()
    return found


def answer(module: ShadowModule, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers of the weights that stand in the module; always with the Instruct's chat template."""
    assert module.model is not None
    tokenizer = module.pair.tokenizer()
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    config = greedy_config(module.pair.instruct_folder(), tokenizer, _MAX_NEW_TOKENS)
    device = next(module.model.parameters()).device
    with torch.no_grad():
        return generate_answers(
            module.model, tokenizer, config, batch["input_ids"].to(device), batch["attention_mask"].to(device)
        )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _batches(rows: list[Any]) -> Iterator[list[Any]]:
    indices: Iterable[int] = range(0, len(rows), _BATCH)
    for start in indices:
        yield rows[start : start + _BATCH]


if __name__ == "__main__":
    main()
