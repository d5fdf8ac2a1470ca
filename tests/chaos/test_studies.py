"""``sweep`` and ``compare`` are killed: no training outlives its command, and each gives the numbers it would have."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import pytest
import yaml

from tests.chaos.harness import SIGNALS, Chaos, Kill
from tests.chaos.strikes import Aim
from tests.studies.sweep.test_sweep import SHORT, SIX

ROOT = Path(__file__).parents[2]
RANKS = {"trainer.devices": 2, "trainer.strategy": "ddp"}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    """The configurations' paths are relative to it."""
    monkeypatch.chdir(ROOT)


def sweep(folder: Path, more: dict) -> list[str]:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**SIX, "overrides": {**SHORT, **more}}, sort_keys=False))
    return ["sweep", f"--config={file}", "--workers=2", "--threads=1"]


def compare(folder: Path, more: dict) -> list[str]:
    config = yaml.safe_load((ROOT / "configs/demo_lora.yaml").read_text())
    evaluators = config["evaluation"]["evaluators"]
    config["evaluation"]["evaluators"] = {name: evaluators[name] for name in ("new", "old")}
    for each in ("new", "old"):
        evaluators[each]["init_args"]["limit"] = 4
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    overrides = {key: value for key, value in SHORT.items() if key != "evaluation.evaluators"}
    return ["compare", str(folder / "fit.yaml"), "--workers=2", "--threads=1", "--seeds=0,1",
            f"--overrides={json.dumps({**overrides, **more})}"]  # fmt: skip


def numbers(out: Path) -> dict[str, dict[str, float]]:
    """The metrics of finished trainings, without times, which no two runs share."""
    found = {path.parent.name: json.loads(path.read_text())["metrics"] for path in out.glob("*/result.json")}
    return {trial: {name: value for name, value in metrics.items() if "second" not in name and "share" not in name}
            for trial, metrics in found.items()}  # fmt: skip


class Study:
    ranks, prepare = 1, None

    def __init__(self, name: str, command: list[str], whole: Path) -> None:
        self.name, self.command, self.whole = name, command, whole

    def arguments(self, folder: Path) -> list[str]:
        return [*self.command, f"--out={folder}"]

    def is_done(self, folder: Path) -> bool:
        return False

    def torn(self, folder: Path, kill: Kill) -> list[str]:
        """A result that is there is the uninterrupted one's."""
        whole = numbers(self.whole)
        return [f"result.json of {name}" for name, found in numbers(folder).items() if found != whole[name]]

    def differences(self, folder: Path) -> list[str]:
        wrong = [] if numbers(folder) == numbers(self.whole) else ["the numbers"]
        return wrong + [name for name in ("REPORT.md", "table.csv") if not any(folder.glob(f"**/{name}"))]


def aims(chaos: Chaos, changes: list[str]):
    """At a change of the study's own files."""
    for number in cycle(SIGNALS):
        yield Aim("/study-", chaos.random.randrange(1, len(changes) + 1), number, chaos.random.random() < 0.5)


@pytest.mark.parametrize(
    ("make", "more", "kills"),
    [
        pytest.param(make, more, kills, id=name, marks=pytest.mark.chaos)
        for name, make, more, kills in [
            ("sweep", sweep, {}, 20), ("compare", compare, {}, 20), ("ranks", sweep, RANKS, 6),
        ]
    ],
)  # fmt: skip
def test_study(chaos, make, more, kills):
    case = Study("study", make(chaos.folder, more), chaos.folder / "study-whole")
    seconds, changes = chaos.measure(case, case.whole, Aim("/study-"))
    chaos.attack(case, chaos.plan(kills, seconds / 2, aims(chaos, changes), aimed=0.25, first_s=0.5))
