"""Shadow-FT against direct tuning on a real language model, Gemma 3 270M, with Instructs that are made from it here.

    python experiments/real/study.py --shared ../shared [--runs runs/real] [--workers 2] [--only near/tools ...]

Makes the models and the rows, trains both arms on every task, scores every trained model row by row, and writes
``experiments/real/results`` and ``REPORT.md``. What is finished is skipped, so it can be interrupted. ``--shared`` is a
folder with ``real_models.py``, ``cut_vocabulary.py`` and ``data/``: the Base's weights and the data sets, which are not
part of this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not where this is imported; and before torch is
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a thread for each worker
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))  # speed matters here, and a little memory does not

import torch
import yaml

from experiments.real.answers import answer_all
from experiments.real.premise import measure
from experiments.real.reading import read_result
from experiments.real.report import choose_rates, write_report
from experiments.real.rows import Row, files, write
from experiments.real.score import Scorer, gradient_norm, read_reference
from shadowlit.analysis.curves import read_metrics
from shadowlit.analysis.similarity import similarity
from shadowlit.delta.delta import Delta
from shadowlit.errors import CheckpointError, ShadowlitError
from shadowlit.files import replace_text, written_beside
from shadowlit.studies.trials.process import Job, failure, start

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCALES = (0.5, 1.0, 1.5)
SEEDS = (0, 1, 2)
RATES = {
    ("near", "tools", "lora"): (2e-4, 5e-4, 1e-3),
    ("near", "gsm8k", "lora"): (5e-4, 1e-3, 2e-3),
    ("near", "gsm8k_opened", "lora"): (5e-4, 1e-3, 2e-3, 4e-3),
    ("near", "tools", "full"): (1e-5, 3e-5, 1e-4),
    ("far", "tools", "lora"): (5e-4, 1e-3),
    ("far", "gsm8k", "lora"): (5e-4, 1e-3),
}
"""Settings (pair, task and method), and the learning rates that both arms try in each; kept results may have others."""
FURTHER = {("near", "gsm8k", "lora"): {"B": (4e-3,)}}
"""Further rates of one arm (``B`` or ``I``), where the best of the others is the largest or smallest."""
EPOCHS = {"gsm8k": 1, "gsm8k_opened": 1, "tools": 3}
VALIDATE_EVERY = {"gsm8k": 4, "gsm8k_opened": 4, "tools": 3}
"""Steps between two validations, which divide the number of steps."""
NUM_ANSWERED = 24  # rows of the task that are answered
NUM_READ = 10  # general answers that are kept to be read
NUM_PERTURBED = 24  # rows of GSM8K that are perturbed
PAIRS = ("near", "far")
"""The far Instruct is the near one, tuned further and then on preferences."""
_TEMPLATE = """{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}\
{% if message['role'] == 'system' %}{% set ns.system = message['content'] | trim + '\\n\\n' %}{% else %}<start_of_turn>\
{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ ns.system }}{{ message['content'] | trim }}<end_of_turn>
{% set ns.system = '' %}{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


@dataclass(frozen=True)
class Training:
    """One training: of the Base (``B``) or the Instruct (``I``) of a pair, on a task."""

    pair: str
    task: str
    method: str
    source: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the training, of its folder and of its result."""
        return f"{self.pair}/{self.task}_{self.method}/{self.source}_lr{self.lr:g}_seed{self.seed}"


class Study:
    """The folders of the study, and what is done in them.

    Args:
        shared: Folder with the scripts and data sets.
        runs: Folder of the models, rows and trainings, outside the repository's files.
        results: Folder of the result files.
    """

    scales: tuple[float, ...] = SCALES
    """Scales of the update at which it is scored."""

    def __init__(self, shared: Path, runs: Path, results: Path = RESULTS) -> None:
        self.shared, self.runs, self.results = shared, runs, results
        self.data, self.base = runs / "data", runs / "base"

    def prepare(self, pairs: Iterable[str]) -> None:
        """Make the rows, the Base and the Instructs."""
        for name, rows in files(self.shared / "data").items():
            write(rows, self.data / f"{name}.jsonl")
        if not self.base.exists():
            self._make_base()
        for pair in pairs:
            if not (self.runs / pair).exists():
                self._make_instruct(pair)

    def _make_base(self) -> None:
        """Gemma 3 270M with the tokens of the data alone, Gemma's turns, and their end where generation stops."""
        whole, cut, template = self.runs / "models", self.runs / "base-partial", self.runs / "template.jinja"
        template.write_text(_TEMPLATE)
        if not (whole / "gemma-3-270m").exists():
            run(self.shared / "real_models.py", whole)
        shutil.rmtree(cut, ignore_errors=True)
        texts = sorted(file for file in (self.shared / "data").iterdir() if file.suffix in (".json", ".jsonl"))
        run(self.shared / "cut_vocabulary.py", whole / "gemma-3-270m", cut, *texts, "--template", template)
        vocabulary = json.loads((cut / "tokenizer.json").read_text())["model"]["vocab"]
        generation = json.loads((cut / "generation_config.json").read_text())
        generation["eos_token_id"] = [generation["eos_token_id"], vocabulary["<end_of_turn>"]]
        (cut / "generation_config.json").write_text(json.dumps(generation, indent=2))
        cut.rename(self.base)

    def instruct(self, pair: str) -> Path:
        """Folder of the Instruct of a pair."""
        return self.runs / pair / "model"

    def _make_instruct(self, pair: str) -> None:
        tune = partial(fit, HERE / "instruct.yaml", self.runs / "instructs", threads=os.cpu_count() or 1)
        rows = self.data / "instruct_train.jsonl"
        kept = {name: str(self.data / f"{name}.jsonl") for name in ("alpaca", "identity")}
        if pair == "near":
            tune(pair, pair=(self.base, self.base), train=rows, validation=kept, export=self.runs / pair)
            return
        near, tuned = self.instruct("near"), self.runs / "far-sft"
        if not near.exists():
            self._make_instruct("near")
        if not tuned.exists():
            tune(tuned.name, pair=(near, near), train=rows, validation=kept, export=tuned, **{"model.lr": 1e-4})
        tune(
            "far-dpo", pair=(tuned / "model", tuned / "model"), train=self.data / "preferences.jsonl", validation=None,
            export=self.runs / pair,
            **{"model.objective": "DPO", "model.lr": 1e-5, "trainer.max_epochs": 1, "data.batch_size": 4,
               "data.max_length": 512, "data.group_by_length": False, "graft.baselines": True},
        )  # fmt: skip

    def sets(self, task: str) -> dict[str, Path]:
        """The rows of a task and of what should be kept, by which models are scored."""
        return {
            "choice": self.data / f"{task}_choice.jsonl",
            "report": self.data / f"{task}_report.jsonl",
            "general": self.data / "alpaca.jsonl",
            "identity": self.data / "identity.jsonl",
        }

    def scorer(self, pair: str, task: str) -> Scorer:
        """A scorer of a task and of what should be kept, with the untouched Instruct as reference."""
        return self.with_reference(Scorer(self.instruct(pair), self.sets(task)), pair, task)

    def with_reference(self, scorer: Scorer, pair: str, task: str) -> Scorer:
        """The scorer with the untouched Instruct's states on its rows, once they have been measured."""
        file = self.reference_of(pair, task)
        if file.exists():
            scorer.reference = read_reference(file, scorer.rows)
        return scorer

    def reference_of(self, pair: str, task: str) -> Path:
        """File of the untouched Instruct's states on the rows of a task; other rows or models have another file."""
        parts = (self.models_id(pair).encode(), *(file.read_bytes() for file in self.sets(task).values()))
        return self.runs / f"{pair}-{task}-{digest(parts)}.pt"

    def _untouched_files(self, pair: str, task: str) -> tuple[Path, Path]:
        return self.results / pair / f"{task}_untouched.json", self.reference_of(pair, task)

    def untouched(self, pair: str, task: str) -> None:
        """Measure the untouched models, unless they have been."""
        if not all(file.exists() for file in self._untouched_files(pair, task)):
            self.in_a_process("untouched", {"pair": pair, "task": task})

    def measure_untouched(self, pair: str, task: str) -> None:
        """Score the untouched models, and their loss and gradient on the first rows that are trained on."""
        target, reference = self._untouched_files(pair, task)
        scorer = self.scorer(pair, task)
        found: dict[str, Any] = {"instruct": {name: scorer.measure(name, keep=True) for name in scorer.rows}}
        with written_beside(reference) as file:
            torch.save(scorer.reference, file)
        scorer.load(self.base)
        found["base"] = {name: scorer.measure(name) for name in scorer.rows}
        rows = scorer.read(self.data / f"{task}_train.jsonl")[:16]
        for who, folder in (("instruct", self.instruct(pair)), ("base", self.base)):
            found[who]["initial"] = gradient_norm(folder, rows)
        found["offset"] = offset_of(self.base, self.instruct(pair))
        replace_text(target, compact(found))

    def delta_of(self, training: Training) -> Path:
        """Folder of a training's delta, which is trained if it is not there."""
        folder = self.runs / "trainings" / self.recipe_id(training) / training.name
        delta = folder.parent / f"{folder.name}-delta"
        if not delta.exists():
            instruct = self.instruct(training.pair)
            config, overrides = self.recipe(training)
            fit(
                config, folder.parent, folder.name,
                pair=(instruct if training.source == "I" else self.base, instruct),
                train=self.data / f"{training.task}_train.jsonl",
                validation={"early": str(self.data / f"{training.task}_early.jsonl")},
                export=delta,
                **{"model.lr": training.lr, "seed_everything": training.seed, **overrides},
            )  # fmt: skip
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return delta / "delta"

    def recipe(self, training: Training) -> tuple[Path, dict[str, Any]]:
        """Configuration of a training, and the keys that differ from it."""
        overrides: dict[str, Any] = {
            "trainer.max_epochs": EPOCHS[training.task], "trainer.val_check_interval": VALIDATE_EVERY[training.task],
        }  # fmt: skip
        return HERE / "lora.yaml", overrides if training.method == "lora" else {**overrides, "model.adapter": None}

    def recipe_id(self, training: Training) -> str:
        """A digest of a training's configuration, and of the rows that it is trained and scored on.

        A file that the configuration names counts by what is in it.
        """
        config, overrides = self.recipe(training)
        files = (self.data / f"{training.task}_train.jsonl", *self.sets(training.task).values())
        keys = json.dumps(
            [yaml.safe_load(config.read_text()), overrides], sort_keys=True,
            default=lambda file: hashlib.sha256(file.read_bytes()).hexdigest(),
        )  # fmt: skip
        return digest((keys.encode(), *(file.read_bytes() for file in files)))

    def models_id(self, pair: str) -> str:
        """A digest of the weights of a pair: another kind of CPU makes an Instruct that differs in its last digits.

        Raises:
            CheckpointError: A model has no weights: a digest of nothing would pass for one of a model.
        """
        found = {folder: sorted(folder.glob("*.safetensors")) for folder in (self.base, self.instruct(pair))}
        for folder, weights in found.items():
            if not weights:
                raise CheckpointError(
                    f"{folder} has no safetensors files, by which a result names the models that it was made on. "
                    "Restore them."
                )
        return digest(file.read_bytes() for weights in found.values() for file in weights)

    def is_finished(self, training: Training, results: Path) -> bool:
        """Whether there is a result of this training, by its recipe."""
        file = results / f"{training.name}.json"
        return file.exists() and read_result(file, lambda raw: raw.get("recipe")) == self.recipe_id(training)

    def remove_others(self, pair: str, task: str, method: str) -> None:
        """Remove the results of a setting that are from another recipe, and what was measured of their updates."""
        for file in sorted((self.results / pair / f"{task}_{method}").glob("*_seed*.json")):
            of = read_result(file, lambda raw: Training(pair, task, method, raw["source"], raw["lr"], raw["seed"]))
            if not self.is_finished(of, self.results):
                print(f"{file} is from another recipe: removed, to be made again")
                file.unlink()
                for measured in ("cosines", "answers") if of.source in ("B", "I") else ():
                    (self.results / pair / f"{task}_{method}_{measured}.json").unlink(missing_ok=True)

    def train_and_score(self, training: Training) -> None:
        """Train, score every scale, and write the result."""
        if not self.is_finished(training, self.results):
            self.delta_of(training)
            self.in_a_process("score", training.__dict__)

    def in_a_process(self, step: str, arguments: dict[str, Any]) -> None:
        """Do a step in a process of its own, whose models are gone at its end; threads can't load models at once."""
        run(__file__, "--shared", self.shared, "--runs", self.runs, "--step", json.dumps([step, arguments]))

    def do(self, step: str, arguments: dict[str, Any]) -> None:
        """Do a step that :meth:`in_a_process` has been asked for."""
        if step == "score":
            self.score(Training(**arguments))
        elif step == "answers":
            self.write_answers(arguments)
        elif step == "untouched":
            self.measure_untouched(**arguments)
        else:
            self.measure_premise(**arguments)

    def answer(self, trained: tuple[Training, ...]) -> None:
        """Write the answers of both arms with the first seed, and of the untouched models."""
        target = self._answers_file(trained[0])
        names = [training.name for training in trained]
        if not target.exists() or read_result(target, lambda raw: raw["trainings"]) != names:
            for training in trained:
                self.delta_of(training)
            self.in_a_process("answers", {training.source: training.__dict__ for training in trained})

    def _answers_file(self, training: Training) -> Path:
        return self.results / training.pair / f"{training.task}_{training.method}_answers.json"

    def write_answers(self, trained: dict[str, dict[str, Any]]) -> None:
        """Write the answers of trainings by their arm's source, at scale 1, and of the untouched models."""
        arms = {f"{source}2I": Training(**training) for source, training in trained.items()}
        first = next(iter(arms.values()))
        scorer = self.scorer(first.pair, first.task)
        tasks = read_rows(self.data / f"{first.task}_report.jsonl")[:NUM_ANSWERED]
        general = read_rows(self.data / "alpaca.jsonl")[:NUM_READ]
        given = {}
        for name in ("Base", "Instruct", *arms):
            if name in arms:
                scorer.load_graft(Delta.open(self.delta_of(arms[name])), 1.0)
            elif name == "Base":
                scorer.load(self.base)
            else:
                scorer.load(self.instruct(first.pair))
            given[name] = answer_all(scorer.model, scorer.tokenizer, first.task, tasks, general)
        found = {
            "trainings": [training.name for training in arms.values()],
            "prompts": [row["messages"][0]["content"] for row in general],
            "answers": given,
        }
        replace_text(self._answers_file(first), compact(found))

    def premise(self, pair: str) -> None:
        """Measure the premise of a pair, unless it has been on these rows."""
        file = self._premise_file(pair)
        if not file.exists() or read_result(file, lambda raw: raw.get("rows")) != self._premise_rows_id():
            self.in_a_process("premise", {"pair": pair})

    def _premise_file(self, pair: str) -> Path:
        return self.results / pair / "premise.json"

    def _premise_rows_id(self) -> str:
        return digest((self.data / f"gsm8k_{part}.jsonl").read_bytes() for part in ("report", "train"))

    def measure_premise(self, pair: str) -> None:
        """Score the untouched models with and without examples, on GSM8K's rows and their perturbed copies."""
        scorer = Scorer(self.instruct(pair), {})
        rows, examples = (read_rows(self.data / f"gsm8k_{part}.jsonl") for part in ("report", "train"))
        found = {"rows": self._premise_rows_id(), "instruct": measure(scorer, rows[:NUM_PERTURBED], examples)}
        scorer.load(self.base)
        found["base"] = measure(scorer, rows[:NUM_PERTURBED], examples)
        replace_text(self._premise_file(pair), compact(found))

    @staticmethod
    def folder_of(delta: Path) -> Path:
        """Folder of the training that a delta is from."""
        return delta.parent.with_name(delta.parent.name.removesuffix("-delta"))

    def delta_for(self, training: Training, scorer: Scorer) -> tuple[Delta, dict[str, Any]]:
        """A training's update, and what the result says of it besides its scores."""
        return Delta.open(self.delta_of(training)), {}

    def score(self, training: Training) -> None:
        """Score a trained delta at every scale."""
        ids = {"recipe": self.recipe_id(training), "models": self.models_id(training.pair)}
        scorer = self.scorer(training.pair, training.task)
        trained = self.delta_of(training)
        delta, details = self.delta_for(training, scorer)
        scores: dict[str, Any] = {}
        for scale in self.scales:
            scorer.load_graft(delta, scale)
            scores[f"{scale:g}"] = {name: scorer.measure(name) for name in scorer.rows}
        if training.source == "B":
            scorer.load_graft(delta, 1.0, self.base)
            scores["B2B"] = {name: scorer.measure(name) for name in ("report", "general")}
        live = {
            name: values
            for name, values in read_metrics(self.folder_of(trained) / "metrics.csv").items()
            if name.startswith(("val/", "train/loss")) or name == "graft/survival"
        }
        made = {**training.__dict__, **ids, "norm": delta.norm(), "live": live}
        replace_text(self.results / f"{training.name}.json", compact({**made, **details, "scores": scores}))

    def measure_cosines(self, pair: str, task: str, method: str) -> None:
        """Cosines of the two arms' deltas at equal rate and seed, where both are in ``runs`` by the present recipe."""
        target = self.results / pair / f"{task}_{method}_cosines.json"
        found = read_result(target, dict) if target.exists() else {}
        recipe = self.recipe_id(Training(pair, task, method, "B", 0.0, 0))  # of any rate and seed
        for one in sorted(self.runs.glob(f"trainings/{recipe}/{pair}/{task}_{method}/B_*-delta")):
            other = one.with_name(one.name.replace("B_", "I_", 1))
            name = one.name.removeprefix("B_").removesuffix("-delta")
            if name not in found and other.exists():
                found[name] = Delta.open(one / "delta").cosine(Delta.open(other / "delta"))
        replace_text(target, compact(found))


def fit(
    config: Path,
    root: Path,
    name: str,
    *,
    pair: tuple[Path, Path],
    train: Path,
    validation: dict[str, str] | None,
    export: Path,
    threads: int = 1,
    **overrides: Any,
) -> None:
    """Run ``shadowlit fit`` in a process of its own; its output goes into a folder next to its own."""
    given = {
        "pair.base": pair[0], "pair.instruct": pair[1], "data.train": train, "data.validation": validation,
        "run.root": root, "run.name": name, "export.folder": export, **overrides,
    }  # fmt: skip
    arguments = [
        f"--{key}={value if isinstance(value, str | Path) else json.dumps(value, default=str)}"
        for key, value in given.items()
    ]
    log = root / f"{name}-log"
    process = start(Job(name, ("fit", "--config", str(config), *arguments)), log, threads=threads)
    while (code := process.poll()) is None:
        time.sleep(0.2)
    if code:
        raise RuntimeError(f"the training {name} failed: {failure(log)}")


def digest(parts: Iterable[bytes]) -> str:
    """Eight hexadecimal digits that recognise some contents, in their order."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:8]


def compact(found: Any) -> str:
    """A result as a line of JSON."""
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_rows(file: Path) -> list[Row]:
    """Rows of a file that the study has written."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run(script: Path | str, *arguments: object) -> None:
    """Run a Python script."""
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True)


def offset_of(base: Path, instruct: Path) -> dict[str, float]:
    """Norm of ``Instruct - Base`` over the linear layers, which LoRA trains, and sigma of the layers' matrices."""
    offset = Delta.make(base, instruct, select="linear")
    return {"offset": offset.norm(), "sigma": similarity(base, instruct).similarities[0].sigma_of_matrices}


def rates_of(setting: tuple[str, str, str]) -> dict[str, tuple[float, ...]]:
    """The rates that each arm tries, by its source."""
    return {source: (*RATES[setting], *FURTHER.get(setting, {}).get(source, ())) for source in ("B", "I")}


def trainings(
    setting: tuple[str, str, str], rates: Mapping[str, Sequence[float]], chosen: dict[str, float] | None
) -> Iterator[Training]:
    """The trainings of each source at all its rates with the first seed, or at the chosen ones with the others."""
    for seed in SEEDS[:1] if chosen is None else SEEDS[1:]:
        for lr in dict.fromkeys(lr for own in rates.values() for lr in own):
            for source, own in rates.items():
                if lr in own and (chosen is None or chosen[source] == lr):
                    yield Training(*setting, source, lr, seed)


def main() -> None:
    """Run what is missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="settings, e.g. near/tools_lora")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    study = Study(given.shared.resolve(), given.runs.resolve())
    if given.step:
        return study.do(*json.loads(given.step))
    settings = [s for s in RATES if not given.only or f"{s[0]}/{s[1]}_{s[2]}" in given.only]
    study.prepare(dict.fromkeys(pair for pair, _, _ in settings))
    with ThreadPoolExecutor(given.workers) as pool:
        measured = dict.fromkeys((pair, task) for pair, task, _ in settings)
        list(pool.map(lambda which: study.untouched(*which), measured))
        for setting in settings:
            study.remove_others(*setting)
            rates = rates_of(setting)
            list(pool.map(study.train_and_score, trainings(setting, rates, None)))
            chosen = choose_rates(RESULTS, *setting)
            list(pool.map(study.train_and_score, trainings(setting, rates, chosen)))
            study.measure_cosines(*setting)
            write_report(RESULTS, HERE)
        firsts = [
            tuple(Training(*setting, source, lr, SEEDS[0]) for source, lr in choose_rates(RESULTS, *setting).items())
            for setting in settings
        ]
        list(pool.map(study.answer, firsts))
        list(pool.map(study.premise, dict.fromkeys(pair for pair, _, _ in settings)))
        write_report(RESULTS, HERE)
    return None


if __name__ == "__main__":
    try:
        main()
    except ShadowlitError as error:
        sys.exit(f"error: {error}")
