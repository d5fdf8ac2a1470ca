"""A full disk ends a command with one line, and leaves what was there; with room again, the command finishes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.chaos.disks import on_small_disk
from tests.chaos.harness import Chaos, Kill
from tests.chaos.strikes import FILLER, Aim
from tests.chaos.test_fit import Fit, root  # noqa: F401  a fixture
from tests.chaos.test_graft import LONG, OUT, Graft
from tests.chaos.test_studies import ROOT, Study
from tests.distributed import Forked
from tests.grafting.test_interrupted import models  # noqa: F401  a fixture
from tests.studies.sweep.test_sweep import SHORT, SIX

DISK = 64 * 2**20
NO_KILL, CACHE = Kill(0), "/cache/"


def survive(chaos: Chaos, case, folder: Path, aim: Aim, status: int, message: str) -> None:
    """Run a command whose disk becomes full at ``aim``, make room, and run it again."""
    folder.mkdir()
    found, _, printed = chaos.run(case, folder, aim)
    assert found == status and message in printed and "Traceback" not in printed, printed[-3000:]
    assert chaos.reached(aim), "the disk did not become full"
    assert case.torn(folder, NO_KILL) == []
    if status:
        if aim.fill:
            (Path(aim.fill) / FILLER).unlink()
        found, _, printed = chaos.run(case, folder)
        assert found == 0, printed[-3000:]
    assert case.differences(folder) == []


def fill_disk(chaos: Chaos, case, disk: Path, where: str, number: int, room: int, *expected) -> None:
    folder = disk / case.name
    if where == CACHE:  # alone on the disk
        case.cache, folder = disk / "cache", chaos.folder / case.name
    survive(chaos, case, folder, Aim(where, number, room=room, fill=str(disk)), *expected)


def study(folder: Path) -> list[str]:
    """A sweep of two trainings."""
    (folder / "two.yaml").write_text(
        yaml.safe_dump({**SIX, "name": "two", "seeds": [0], "grid": {"model.lr": [1e-3, 2e-3]}, "overrides": SHORT})
    )
    return ["sweep", f"--config={folder}/two.yaml", "--workers=2", "--threads=1"]


def make(kind: str, chaos: Chaos, request):
    """A command; where, at which change and with how much room its disk becomes full; what it ends with."""
    whole = chaos.folder / f"{kind}-whole"
    if kind == "graft":
        case = Graft(request.getfixturevalue("models"), "threads", whole / OUT)
        return case, whole, (OUT, 5, 200_000, 1, "Free some disk space")
    if kind == "journal":
        request.getfixturevalue("monkeypatch").chdir(ROOT)
        return Study("study", study(chaos.folder), whole), whole, ("study.journal", 13, 10, 1, "can't be written")
    case = Fit(request.getfixturevalue("root"), "lora", whole)
    return case, whole, {
        "checkpoint": (".ckpt", 8, 20_000, 1, "can't be written"),
        "export": ("/export/", 4, 20_000, 1, "could not be written"),
        "cache": (CACHE, 1, 100, 0, "can't be kept in"),
        "metrics": ("metrics.csv", 2, 10, 1, "can't be written"),
    }[kind]  # fmt: skip


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["checkpoint", "metrics", "export", "cache", "journal", "graft"])
def test_full_disk(chaos, request, kind):
    """ENOSPC on a disk of its own."""
    case, whole, how = make(kind, chaos, request)
    chaos.measure(case, whole, Aim(how[0]))
    disk, told = chaos.folder / "disk", chaos.folder / "told.txt"
    disk.mkdir()
    status = Forked(on_small_disk, disk, DISK, fill_disk, chaos, case, disk, *how, out=told).wait(500)
    if status == 77:
        pytest.skip("this user may mount no disk")
    assert status == 0, told.read_text()[-5000:]


@pytest.mark.parametrize("kind", ["graft", *(pytest.param(kind, marks=LONG) for kind in ("checkpoint", "export"))])
def test_files_that_may_not_grow(chaos, request, kind):
    """EFBIG, which needs no disk; larger files than what the command prints."""
    case, whole, (where, number, room, *expected) = make(kind, chaos, request)
    chaos.measure(case, whole, Aim(where))
    survive(chaos, case, chaos.folder / case.name, Aim(where, number, room=room, full=True), *expected)
