"""``graft`` is killed at any moment: its folder is whole or not there, and the same command again writes it."""

from __future__ import annotations

import json
import signal
from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint import workers
from shadowlit.errors import CheckpointError
from tests.chaos.harness import SIGNALS, Chaos, Kill
from tests.chaos.strikes import Aim
from tests.grafting.test_interrupted import graft, left, models, weights  # noqa: F401  a fixture

OUT = "grafted-model"


def two_processes() -> None:
    workers.WORTH_FORKING_BYTES, workers.num_cores = 0, lambda: 2


def unlike(folder: Path, whole: Path) -> list[str]:
    """The files that differ from the uninterrupted command's; the manifest's last entry may be missing."""
    manifest, expected = (json.loads((each / "shadowlit.json").read_text()) for each in (folder, whole))
    wrong = [name for name, value in manifest.items() if name != "survival" and value != expected[name]]
    wrong += [name for name in left(whole) if name not in left(folder)]
    more = [name for name in left(folder) if name not in left(whole)]
    wrong += [name for name in more if not (name.startswith("shadowlit.json.") and name.endswith(".partial"))]
    same = (name for name in left(whole) if name != "shadowlit.json" and name in left(folder))
    return wrong + [name for name in same if (folder / name).read_bytes() != (whole / name).read_bytes()]


class Graft:
    ranks = 1

    def __init__(self, root: Path, name: str, whole: Path) -> None:
        self.root, self.name, self.whole = root, name, whole
        self.prepare = two_processes if name == "processes" else None

    def arguments(self, folder: Path) -> list[str]:
        return graft(self.root, folder / OUT)

    def is_done(self, folder: Path) -> bool:
        return (folder / OUT).exists()  # nothing is overwritten

    def torn(self, folder: Path, kill: Kill) -> list[str]:
        """What has the target's name is whole; a signal that can be caught leaves nothing else."""
        if self.is_done(folder):
            wrong = unlike(folder / OUT, self.whole)
            return [f"{OUT} is there, but not {wrong}"] if wrong else []
        partial = left(folder)
        if kill.number != signal.SIGKILL:
            return [f"{name} is left" for name in partial]
        wrong = [name for name in partial if not name.startswith(f".{OUT}.partial-")]
        for name in partial:
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(folder)
            try:
                found = weights(folder / name)
            except CheckpointError:
                continue
            expected = weights(self.whole)  # all is there, and only the rename is missing
            wrong += [f"{name} loads" for key, value in found.items() if not torch.equal(value, expected[key])]
        return wrong

    def differences(self, folder: Path) -> list[str]:
        return unlike(folder / OUT, self.whole)


def aims(chaos: Chaos, changes: list[str], largest: int):
    """At any change and in any write, by each signal."""
    for number in cycle(SIGNALS):
        at, group = chaos.random.randrange(1, len(changes) + 1), chaos.random.random() < 0.5
        yield Aim(OUT, at, number, group)
        yield Aim(OUT, 1, room=chaos.random.randrange(1, largest))


LONG = pytest.mark.chaos


@pytest.mark.parametrize(("name", "kills"), [
    ("processes", 4), pytest.param("processes", 20, marks=LONG), pytest.param("threads", 20, marks=LONG),
])  # fmt: skip
def test_graft(chaos, models, name, kills):  # noqa: F811
    case = Graft(models, name, chaos.folder / "whole" / OUT)
    seconds, changes = chaos.measure(case, case.whole.parent, Aim(OUT))
    largest = max(path.stat().st_size for path in case.whole.iterdir())
    chaos.attack(case, chaos.plan(kills, seconds, aims(chaos, changes, largest), aimed=2 / 3), finish_each=True)
