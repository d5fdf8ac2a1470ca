"""Short runs on the embedded pair, which the notebooks show if no folder is given."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shadowlit.demo import BASE, DATA, INSTRUCT
from shadowlit.files import replace_text

_MADE = "embedded_for_notebooks"
_DONE = "complete"
_STEPS = 10
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "shadowlit")


@dataclass(frozen=True)
class Material:
    """A pair and its updates, as :func:`given_or_made` describes them."""

    base: str
    instruct: str
    updates: Mapping[str, str]
    runs: Mapping[str, str]
    sides: tuple[str, str]
    cut: str
    scored: str | None


def given_or_made(
    base: str | None,
    instruct: str | None,
    updates: Mapping[str, str] | None,
    runs: Mapping[str, str] | None,
    sides: Sequence[str] | None,
    cut: str | None,
    scored: str | None,
    folder: str | Path,
) -> Material:
    """Return what is given; or, if no updates are, the embedded pair and short runs on it, made once in ``folder``.

    The runs learn the new skill by LoRA of two ranks and two seeds and by full tuning, new facts by LoRA, and, as
    Δ_I, the new skill on the Instruct itself. They take about 10 seconds of processor time, and
    up to a minute where other processes share the core.

    Args:
        base: Folder or hub id of the Base.
        instruct: Folder or hub id of the Instruct.
        updates: Sources that :func:`shadowlit.analysis.deltas.open_delta` opens, by name.
        runs: Folders of runs whose checkpoints are compared, by name; None for all updates that are runs.
        sides: Names of an update learned by the Base and of one learned by the Instruct; None for the first two.
        cut: Name of the update that is compressed; None for the first.
        scored: Folder of a run with validation data; None for none.
        folder: Folder for what is made.
    """
    if updates is not None:
        followed = {n: s for n, s in updates.items() if any(Path(s).rglob("*.ckpt"))} if runs is None else runs
        first, second = sides or (*updates, *updates)[:2]
        return Material(
            base or str(BASE), instruct or str(INSTRUCT), updates, followed, (first, second), cut or first, scored
        )
    home = Path(folder) / _MADE
    exchanged = {"pair.base": INSTRUCT, "pair.instruct": BASE, "pair.template_owner": "base"}
    plans: dict[str, dict[str, object]] = {
        "r4": {"model.adapter.r": 4, "model.adapter.lora_alpha": 8},
        "r16": {},
        "r16, seed 1": {"seed_everything": 1},
        "full": {"model.adapter": "null", "model.lr": 3e-4},
        "facts r16": {"data.train": DATA / "facts_train.jsonl"},
        "Δ_I r16": exchanged,
    }
    made = {name: str(fit(home / _plain(name), plan)) for name, plan in plans.items()}
    followed = {name: made[name] for name in ("r16", "full")}
    return Material(str(BASE), str(INSTRUCT), made, followed, ("r16", "Δ_I r16"), "full", made["full"])


def run_or_made(run: str | None, folder: str | Path) -> str:
    """Return the run that is given, or else a short one on the embedded pair with evaluators, made once in
    ``folder``.
    """
    if run is not None:
        return run
    generation = {"class_path": "shadowlit.evaluation.generated.Generation"}
    right = {"match": "regex", "pattern": r"^{answer}(?!\w)", "answer": "answer"}
    shared = {"max_new_tokens": 12, "every": 2, "limit": 16, "batch_size": 16}
    evaluators = {
        "new": {**generation, "init_args": {"data": str(DATA / "new.jsonl"), **right, **shared}},
        "old": {**generation, "init_args": {"data": str(DATA / "old.jsonl"), **right, **shared}},
        "forgetting": {
            "class_path": "shadowlit.evaluation.forgetting.Divergence",
            "init_args": {"data": str(DATA / "old.jsonl"), "every": 2, "limit": 32},
        },
    }
    sets = {name: str(DATA / f"{name}.jsonl") for name in ("new", "new_house", "old")}
    plan = {
        "data.validation": sets,
        "evaluation.evaluators": evaluators,
        "data.eval_batch_size": 32,
        "trainer.max_steps": 2 * _STEPS,
        "trainer.val_check_interval": 4,
        "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 1,
        "graft.baselines": True,
        "export.enabled": True,
    }
    return str(fit(Path(folder) / _MADE / "watched", plan))


def fit(folder: Path, plan: Mapping[str, object]) -> Path:
    """Run ``fit`` into a folder of its own, unless that is complete."""
    if (folder / _DONE).is_file():
        return folder
    from shadowlit.lightning_cli import main  # late: what was made before needs no training

    shutil.rmtree(folder, ignore_errors=True)  # an interrupted one

    values: dict[str, object] = {
        "pair.base": BASE,
        "pair.instruct": INSTRUCT,
        "model.adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "model.lr": 2e-3,
        "data.train": DATA / "train.jsonl",
        "data.validation": {"new_house": str(DATA / "new_house.jsonl")},
        "data.ignore_columns": ["skill", "answer"],
        "data.max_length": 128,
        "data.batch_size": 8,
        "data.eval_batch_size": 64,
        "graft.baselines": False,
        "export.enabled": False,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": _STEPS,
        "trainer.limit_val_batches": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "trainer.log_every_n_steps": 4,
        "trainer.val_check_interval": _STEPS,
        "trainer.check_val_every_n_epoch": "null",
        "run.root": folder.parent,
        "run.name": folder.name,
        "trainer.callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "filename": "step-{step}",
                    "auto_insert_metric_name": False,
                    "every_n_train_steps": 2,
                    "save_top_k": -1,
                },
            }
        ],
        **plan,
    }
    with _quiet():
        main(["fit", *(f"--{key}={_text(value)}" for key, value in values.items())])
    replace_text(folder / _DONE, "")
    return folder


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log of a training, but not its errors."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    shown = io.StringIO()
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
