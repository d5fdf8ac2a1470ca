"""Commands with many trainings are killed again and again: nothing is left running, and nothing changes in the end."""

import json
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.distributed import Forked, shadowlit
from tests.studies.sweep.test_sweep import SHORT, SIX
from tests.studies.test_trials import has_ended

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
RANKS = {"trainer.devices": 2, "trainer.strategy": "ddp"}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def sweep(tmp_path, out, more):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**SIX, "overrides": {**SHORT, **more}}, sort_keys=False))
    return ["sweep", f"--config={file}", f"--out={out}", "--workers=2", "--threads=1"]


def compare(tmp_path, out, more):
    config = yaml.safe_load((ROOT / "configs/demo_lora.yaml").read_text())
    evaluators = config["evaluation"]["evaluators"]
    config["evaluation"]["evaluators"] = {name: evaluators[name] for name in ("new", "old")}
    for each in ("new", "old"):
        evaluators[each]["init_args"]["limit"] = 4
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    overrides = {key: value for key, value in SHORT.items() if key != "evaluation.evaluators"}
    return ["compare", str(tmp_path / "fit.yaml"), f"--out={out}", "--workers=2", "--threads=1", "--seeds=0,1",
            f"--overrides={json.dumps({**overrides, **more})}"]  # fmt: skip


def running(command, out):
    """The command's processes, and whoever else has a file open below ``out``."""
    found = psutil.Process(command.pid).children(recursive=True)
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path.startswith(str(out)) for file in each.open_files()) and each not in found:
                found.append(each)
    return [each for each in found if each.pid != command.pid]


def numbers(out):
    return {path.parent.name: json.loads(path.read_text())["metrics"] for path in out.glob("*/result.json")}


def measured(results):
    """Without times, which no two runs share."""
    return {trial: {name: value for name, value in metrics.items() if "second" not in name and "share" not in name}
            for trial, metrics in results.items()}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("make", "more", "kills"), [(sweep, {}, 20), (compare, {}, 20), (sweep, RANKS, 6)],
                         ids=["sweep", "compare", "ranks"])  # fmt: skip
def test_nothing_is_left_running_and_nothing_changes(tmp_path, make, more, kills):
    told, rng = tmp_path / "told.txt", random.Random(0)
    whole = tmp_path / "whole"
    assert Forked(shadowlit, *make(tmp_path, whole, more), out=told).wait(900) == 0, told.read_text()[-3000:]
    out, round_number = tmp_path / "killed-0", 0
    for number in range(kills):
        if len(numbers(out)) == len(numbers(whole)):
            assert measured(numbers(out)) == measured(numbers(whole))
            round_number += 1
            out = tmp_path / f"killed-{round_number}"
        sent = SIGNALS[number % 3]
        command = Forked(shadowlit, *make(tmp_path, out, more), out=told)
        time.sleep(rng.uniform(2, 8 if more else 6))  # while it checks, trains or reports
        if command.poll() is not None:  # it was done before
            assert command.poll() == 0
            continue
        family = running(command, out)
        command.send_signal(sent)
        assert command.wait(30) in (STATUS[sent], 0)
        deadline = time.monotonic() + 5
        while left := [each for each in family if not has_ended(each)]:
            assert time.monotonic() < deadline, (sent, [(each.pid, each.cmdline()) for each in left])
            time.sleep(0.05)
    assert Forked(shadowlit, *make(tmp_path, out, more), out=told).wait(900) == 0, told.read_text()[-3000:]
    assert measured(numbers(out)) == measured(numbers(whole))
