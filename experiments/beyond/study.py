"""Methods beyond the paper against the graft and direct tuning, on the embedded pair and on a real one.

    python experiments/beyond/study.py [--runs runs/beyond] [--workers 2] [--only embedded/skill_bare_lora ...]
    python experiments/beyond/study.py --shared ../shared --runs runs/real --only near/tools_lora

Trains one update on both anchors at several weights of the Instruct, changes a trained update in the ways that
``arms.py`` lists, scores every scale of all of them row by row, and writes ``experiments/beyond/results`` and
``REPORT.md``. What is finished is skipped. The real pairs, their rows and the two arms that they share with
``experiments/real`` are that study's, so it comes first; on them anchors have the rates that B2I and I2I chose.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

if __name__ == "__main__":  # not where this is imported; and before torch is
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a thread for each worker
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))  # speed matters here, and a little memory does not

from experiments.beyond.arms import ANCHORS, BY_ROWS, CHANGED, FITS, FITTED, anchors_of, changed, trained_as
from experiments.beyond.level import file_of, write_level
from experiments.beyond.report import (
    BY_KIND,
    KINDS,
    NAMES,
    Compared,
    kinds_of,
    level,
    rates_at_level,
    runs_of,
    write_report,
)
from experiments.real import study as real
from experiments.real.reading import read_result
from experiments.real.report import KL, Run, per_token
from experiments.real.report import rows as rows_of
from experiments.real.rows import Row, write
from experiments.real.score import Scorer
from experiments.real.study import Study, Training, compact, digest, read_rows, run, trainings
from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.template import Encoded
from shadowlit.delta.delta import Delta
from shadowlit.errors import ShadowlitError
from shadowlit.files import replace_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROOT = HERE.parents[1]
SHIPPED = ROOT / "shadowlit" / "demo" / "data"
RATES = {"lora": (3e-4, 1e-3, 3e-3), "full": (1e-4, 3e-4, 1e-3)}
"""Learning rates on the embedded pair; those of the real ones are the other study's."""
_SETTINGS = [
    *(("embedded", task, method) for task in ("skill_bare", "skill_house") for method in ("lora", "full")),
    *(("near", task, "lora") for task in ("tools", "gsm8k", "gsm8k_opened")),
]
_NUM_KEPT = 40  # rows of each kind of what the Instruct could do before


class Beyond(Study):
    """The study on a real pair, with arms that train on both anchors or change a trained update."""

    scales = (0.5, 1.0)  # and where it diverges as the others do
    _kept = "instruct_train"

    @property
    def kept(self) -> Path:
        """Rows of what should be kept, by which an update may be changed or trained."""
        return self.data / f"{self._kept}.jsonl"

    def recipe(self, training: Training) -> tuple[Path, dict[str, Any]]:
        config, overrides = super().recipe(training)
        anchors = self.anchors(training)
        if ANCHORS.get(training.source, {}).get("instruct", 1.0) in (0.0, 1.0):  # one model in all steps
            return config, {**overrides, **anchors}
        # The same rows in a step, in four micro-batches.
        batches = {"data.batch_size": 2, "trainer.accumulate_grad_batches": 4}
        every = overrides["trainer.val_check_interval"] * 4
        return config, {**overrides, **batches, "trainer.val_check_interval": every, **anchors}

    def anchors(self, training: Training) -> dict[str, Any]:
        """The key of a training's anchors, if it has some."""
        if training.source not in ANCHORS:
            return {}
        return {"model.anchors": anchors_of(training.source, self.kept)}

    def train_and_score(self, training: Training) -> None:
        if not self.is_finished(training, real.RESULTS):  # the other study's
            super().train_and_score(training)

    def in_a_process(self, step: str, arguments: dict[str, Any]) -> None:
        run(__file__, "--shared", self.shared, "--runs", self.runs, "--step", json.dumps([step, arguments]))

    def delta_for(self, training: Training, scorer: Scorer) -> tuple[Delta, dict[str, Any]]:
        if training.source not in CHANGED:
            return super().delta_for(training, scorer)
        delta = Delta.open(self.delta_of(training))
        file = self.results / f"{training.name}.json"
        known = read_result(file, dict) if self.is_finished(training, self.results) else {}
        found, about = changed(training, delta, scorer, self.kept, known)
        by = {"calibration": self.calibration_id(training)} if training.source in BY_ROWS else {}
        return found, {**about, **by}

    def is_finished(self, training: Training, results: Path) -> bool:
        """Whether there is a result by its recipe, and by the rows that the update is changed by, if it is by rows."""
        found = super().is_finished(training, results)
        if not found or training.source not in BY_ROWS:
            return found
        known = read_result(results / f"{training.name}.json", lambda raw: raw.get("calibration"))
        return bool(known == self.calibration_id(training))

    def calibration_id(self, training: Training) -> str:
        """A digest of the rows by which an update may be changed, and of the options of a fit."""
        options = json.dumps(FITS[training.pair]).encode() if training.source in FITTED else b""
        return digest((options, *(file.read_bytes() for file in (self.sets(training.task)["choice"], self.kept))))

    def meet(self, training: Training, kl: float) -> None:
        """Score a training's update also where it diverges from the Instruct by ``kl``, unless that has been done."""
        setting, run = self._find(training)
        known = setting.measured(run)
        if known is None:
            self.in_a_process("level", {"training": training.__dict__, "kl": kl})

    def do(self, step: str, arguments: dict[str, Any]) -> None:
        if step != "level":
            return super().do(step, arguments)
        training = Training(**arguments["training"])
        setting, run = self._find(training)
        scorer = self.scorer(training.pair, training.task)
        delta, _ = self.delta_for(training, scorer)
        write_level(file_of(self.results, setting.name, run), run, arguments["kl"], scorer, delta)
        return None

    def _find(self, training: Training) -> tuple[Compared, Run]:
        """A training's setting, and its run there."""
        setting = Compared(self.results, real.RESULTS, training.pair, training.task, training.method)
        which = (training.source, training.lr, training.seed)
        return setting, next(run for run in setting.runs if (run.source, run.lr, run.seed) == which)

    def delta_of(self, training: Training) -> Path:
        return super().delta_of(replace(training, source=trained_as(training.source)))


class Embedded(Beyond):
    """The same on the embedded pair: a new skill, in bare answers or in the Instruct's own style."""

    scales = (0.05, 0.15, 0.5, 1.0, 1.5)
    _kept = "kept"

    def __init__(self, runs: Path) -> None:
        super().__init__(runs, runs, RESULTS)
        self.data, self.base = runs / "embedded-data", ROOT / "shadowlit/demo/pair/base"
        self._alone = Lock()

    def prepare(self, pairs: Iterable[str]) -> None:
        """Write the rows: what is asked is split into even rows for choosing and odd ones for the report."""
        new = read_rows(SHIPPED / "new.jsonl")
        kept = [read_rows(SHIPPED / f"{name}.jsonl") for name in KINDS]
        for style, train, asked in (("bare", "train", "new"), ("house", "train_house", "new_house")):
            task = f"skill_{style}"
            styled = read_rows(SHIPPED / f"{asked}.jsonl")[:16:2]
            parts = {"train": read_rows(SHIPPED / f"{train}.jsonl"), "choice": new[::2], "report": new[1::2]}
            for part, rows in {**parts, "early": styled}.items():
                write(map(_messages, rows), self.data / f"{task}_{part}.jsonl")
        write([_messages(row) for rows in kept for row in rows[:_NUM_KEPT]], self.data / "general.jsonl")
        others = zip(*(rows[_NUM_KEPT : 2 * _NUM_KEPT] for rows in kept), strict=True)  # the first ones of all kinds
        write([_messages(row) for rows in others for row in rows], self.data / "kept.jsonl")

    def instruct(self, pair: str) -> Path:
        return ROOT / "shadowlit/demo/pair/instruct"

    def measure_kinds(self, found: Sequence[Training]) -> None:
        """Measure where trained updates diverge: on which kind of what the Instruct could do before."""
        first = found[0]
        target = kinds_of(self.results, f"{first.pair}/{first.task}_{first.method}")
        known = read_result(target, dict) if target.exists() else {}
        scorer = self.scorer(first.pair, first.task)
        scorer.condensed = frozenset()
        for training in found:
            recipe = self.recipe_id(training)
            if known.get(training.name, {}).get("recipe") != recipe:
                delta, _ = self.delta_for(training, scorer)
                scorer.load_graft(delta, 1.0)
                scores = rows_of(scorer.measure("general"))
                parts = zip(KINDS, (scores[n : n + _NUM_KEPT] for n in range(0, len(scores), _NUM_KEPT)), strict=True)
                known[training.name] = {"recipe": recipe, **{kind: per_token(r, KL) for kind, r in parts}}
        replace_text(target, compact(known))

    def sets(self, task: str) -> dict[str, Path]:
        asked = {name: self.data / f"{task}_{name}.jsonl" for name in ("choice", "report", "early")}
        return {**asked, "general": self.data / "general.jsonl"}

    def scorer(self, pair: str, task: str) -> Scorer:
        sets = self.sets(task)
        scorer = Scorer(self.instruct(pair), sets, condensed=frozenset(sets) - {"report"})
        # Of an answer the value alone: every style begins with it, and they differ in what follows.
        for name in ("choice", "report"):
            scorer.rows[name] = [_without_end(row) for row in scorer.rows[name]]
        return self.with_reference(scorer, pair, task)

    def recipe(self, training: Training) -> tuple[Path, dict[str, Any]]:
        return ROOT / f"configs/demo_{training.method}.yaml", {
            "data.ignore_columns": [], "data.batch_size": 8, "trainer.accumulate_grad_batches": 4, "data.test": {},
            "data.eval_batch_size": 64, "evaluation.evaluators": {}, "graft.baselines": False,
            "export.parts": ["delta"], "trainer.max_epochs": 8, "trainer.check_val_every_n_epoch": None,
            "trainer.val_check_interval": 75, "trainer.num_sanity_val_steps": 0, "trainer.log_every_n_steps": 1,
            "trainer.callbacks": [], "trainer.enable_checkpointing": False, **self.anchors(training),
        }  # fmt: skip

    def in_a_process(self, step: str, arguments: dict[str, Any]) -> None:
        with self._alone:  # the models are small: starting a process would take longer
            self.do(step, arguments)


def _messages(row: Row) -> Row:
    return {"messages": row["messages"]}


def _without_end(row: Encoded) -> Encoded:
    labels = list(row.labels)
    last = max(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
    labels[last] = IGNORE_INDEX
    return Encoded(row.input_ids, labels)


def main() -> None:
    """Run what is missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="for the real pairs: as in experiments/real/study.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/beyond"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="settings, e.g. embedded/skill_bare_lora")
    arms = [arm for arm in NAMES if arm not in ("B", "I")]
    parser.add_argument("--arms", nargs="*", choices=arms, default=arms, help="besides B2I and I2I; all by default")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    runs = given.runs.resolve()
    embedded = Embedded(runs)
    pairs: dict[str, Beyond] = {"embedded": embedded}
    if given.shared:
        pairs |= dict.fromkeys(real.PAIRS, Beyond(given.shared.resolve(), runs, RESULTS))
    os.chdir(ROOT)  # the configurations of the embedded pair name its files from there
    if given.step:
        return pairs["near"].do(*json.loads(given.step))
    settings = [s for s in _SETTINGS if s[0] in pairs and (not given.only or f"{s[0]}/{s[1]}_{s[2]}" in given.only)]
    with ThreadPoolExecutor(given.workers) as pool:
        for setting in settings:
            pairs[setting[0]].prepare(setting[:1])
            run_setting(pairs[setting[0]], setting, given.arms, pool)
            write_report(RESULTS, HERE, real.RESULTS)
    return None


def run_setting(study: Beyond, setting: tuple[str, str, str], arms: Container[str], pool: ThreadPoolExecutor) -> None:
    """Run what is missing of a setting: B2I, I2I and these arms."""
    pair, task, method = setting
    # Of a real pair B2I and I2I are the other study's, which `Compared` reads.
    home = study if pair == "embedded" else Study(study.shared, study.runs)
    home.untouched(pair, task)
    study.remove_others(*setting)
    rates = dict.fromkeys(("B", "I"), RATES[method]) if pair == "embedded" else real.rates_of(setting)
    list(pool.map(study.train_and_score, trainings(setting, rates, None)))
    chosen = rates_at_level(Compared(RESULTS, real.RESULTS, *setting))
    own = rates["I"] if pair == "embedded" else tuple({chosen["B"]: 0, chosen["I"]: 0})
    rates |= {arm: own for arm in ANCHORS if arm in arms}
    list(pool.map(study.train_and_score, trainings(setting, rates, None)))
    chosen = rates_at_level(Compared(RESULTS, real.RESULTS, *setting))
    list(pool.map(study.train_and_score, trainings(setting, rates, {arm: chosen[arm] for arm in rates})))
    for source in (arm for arm in CHANGED if arm in arms):
        lr = chosen[trained_as(source)]
        list(pool.map(study.train_and_score, [Training(*setting, source, lr, seed) for seed in real.SEEDS]))
    study.measure_cosines(*setting)
    compared = Compared(RESULTS, real.RESULTS, *setting)
    found = [run for arm in NAMES if arm in ("B", "I") or arm in arms for run in runs_of(compared, arm)]
    at_rates = [Training(*setting, run.source, run.lr, run.seed) for run in found]
    unknown = [training for run, training in zip(found, at_rates, strict=True) if compared.measured(run) is None]
    trained = [replace(training, source=trained_as(training.source)) for training in unknown]
    list(pool.map(study.delta_of, dict.fromkeys(trained)))
    list(pool.map(partial(study.meet, kl=level(compared)), at_rates))
    if isinstance(study, Embedded):
        study.measure_kinds([training for training in at_rates if training.source in BY_KIND])


if __name__ == "__main__":
    try:
        main()
    except ShadowlitError as error:
        sys.exit(f"error: {error}")
