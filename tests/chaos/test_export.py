"""The export at the end of ``fit``, and ``export`` of a checkpoint, are killed, and written by the same command."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest

from tests.chaos.harness import SIGNALS, Chaos, Kill
from tests.chaos.strikes import Aim
from tests.chaos.test_fit import RUN, Fit, exported, root  # noqa: F401  a fixture

PARTS = ("model", "adapter", "delta")


class Export:
    """``shadowlit export`` of a checkpoint."""

    name, ranks, prepare = "export", 1, None

    def __init__(self, checkpoint: Path, whole: Path) -> None:
        self.checkpoint, self.whole = checkpoint, whole

    def arguments(self, folder: Path) -> list[str]:
        left = [part for part in PARTS if not (folder / "out" / part).exists()]  # nothing is overwritten
        return ["export", f"--ckpt={self.checkpoint}", f"--out={folder}/out", "--parts", *left]

    def is_done(self, folder: Path) -> bool:
        return all((folder / "out" / part).exists() for part in PARTS)

    def torn(self, folder: Path, kill: Kill) -> list[str]:
        """A part that is there is whole."""
        whole, found = exported(self.whole / "out"), exported(folder / "out")
        there = [part for part in PARTS if (folder / "out" / part).exists()]
        return [
            name for name in {*whole, *found} if name.startswith(tuple(there)) and whole.get(name) != found.get(name)
        ]

    def differences(self, folder: Path) -> list[str]:
        return [] if exported(folder / "out") == exported(self.whole / "out") else ["the folder"]


def aims(chaos: Chaos, changes: list[str], where: str):
    """At any change of the export, and inside its files."""
    for number in cycle(SIGNALS):
        at, group = chaos.random.randrange(1, len(changes) + 1), chaos.random.random() < 0.5
        yield Aim(where, at, number, group)
        yield Aim(where, 1, room=chaos.random.randrange(10_000, 100_000))


@pytest.mark.chaos
@pytest.mark.parametrize("by", ["fit", "command"])
def test_export(chaos, root, by):  # noqa: F811
    fit = Fit(root, "export", chaos.folder / "whole")
    seconds, changes = chaos.measure(fit, fit.whole, Aim("/export/"))
    case, where = fit, "/export/"
    if by == "command":
        case, where = Export(fit.whole / RUN / "checkpoints/step=2.ckpt", chaos.folder / "whole-export"), "/out/"
        seconds, changes = chaos.measure(case, case.whole, Aim(where))
    kills = chaos.plan(10, seconds, aims(chaos, changes, where), aimed=0.8, first_s=seconds / 2)
    chaos.attack(case, kills, finish_each=True)
