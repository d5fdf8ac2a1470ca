"""``fit`` is killed at any moment and between the files of its checkpoints; it resumes bit for bit."""

from __future__ import annotations

import csv
import json
import os
import signal
import tempfile
from functools import cached_property
from itertools import cycle
from pathlib import Path

import pytest
import torch
import yaml

from shadowlit.checkpoint.saved import find_whole, read_rest
from shadowlit.checkpoint.sharded import read_nested
from shadowlit.errors import CheckpointError
from tests.chaos.harness import Kill
from tests.chaos.strikes import Aim
from tests.tiny import save_pair

RUN = "run"
_STATE = ("global_step", "state_dict", "optimizer", "lr_schedulers")
_MACHINES = ("seconds", "time", "per_s", "memory", "tokens")
_SAVED = (  # one is replaced and removed, one comes with each step
    {"monitor": "val/grafted/loss", "save_last": True},
    {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1},
)
_LOCAL = ("callbacks", "hyper_parameters")  # hold paths of the run


def content(path: Path) -> dict:
    """All that a checkpoint holds, whichever form it has."""
    if not path.is_dir():
        return read_rest(path)
    tensors = read_nested(path, ("state_dict.", "optimizer_"), lambda _, shape, dtype: torch.empty(shape, dtype=dtype),
                          alone=True)  # fmt: skip
    return {**read_rest(path), **tensors}


def same(one, other) -> bool:
    """Whether two nested values are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def unlike(one: dict, other: dict, keys=None) -> list[str]:
    """Names of what differs in two checkpoints, but for counts of validations, which may have been repeated."""
    one, other = ({name: each for name, each in held.items() if name not in _LOCAL} for held in (one, other))
    for held in (one, other):
        loops = held["loops"]["fit_loop"]
        held["loops"] = {name: each for name, each in loops.items() if "val_loop" not in name}
    names = sorted(one.keys() | other.keys())
    if keys:
        names = [name for name in names if name.startswith(keys)]
    return [name for name in names if not same(one.get(name), other.get(name))]


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without times."""
    return [{name: value for name, value in row.items() if value and not any(m in name for m in _MACHINES)}
            for row in csv.DictReader((folder / RUN / "metrics.csv").open())]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pair, and a configuration of 10 steps: 4 and a half batches an epoch are 3 steps, with validations."""
    root = tmp_path_factory.mktemp("fit")
    base, instruct = save_pair(root)
    rows = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ab" * (1 + i % 5)}]
            for i in range(9)]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = {
        "pair": {"base": str(base), "instruct": str(instruct)},
        "model": {"lr": 1e-2, "adapter": {"r": 4, "lora_dropout": 0.2}},
        "graft": {"select": "all", "dtype": "float32"},
        "data": {"train": str(root / "rows.jsonl"), "validation": str(root / "rows.jsonl"), "batch_size": 2,
                 "eval_batch_size": 4, "max_length": 64},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_progress_bar": False, "log_every_n_steps": 1,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "accumulate_grad_batches": 2,
            "check_val_every_n_epoch": None, "val_check_interval": 4,
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return root


def exported(folder: Path) -> dict[str, bytes]:
    """The files of an export but for the manifests, which hold paths and times, and what a killed writer has left."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "shadowlit.json" and ".partial-" not in str(path)}  # fmt: skip


def _of(path: str, **arguments) -> dict:
    return {"class_path": path, "init_args": arguments}


FULL = {"model.adapter": None}
SHARDED = _of("lightning.pytorch.strategies.ModelParallelStrategy", data_parallel_size=2, tensor_parallel_size=1)
SHORT = {"trainer.max_steps": 2, "trainer.val_check_interval": 4}
OPTIONS = {
    "lora": {},
    "full": FULL,
    "sharded": {**FULL, "trainer.devices": 2, "trainer.strategy": SHARDED, "trainer.accumulate_grad_batches": 1},
    "two_disks": {},
    "asynchronous": {"checkpoint.asynchronous": True},
    "export": SHORT,
}


class Fit:
    """A training with a name: the same command continues it."""

    prepare = None
    cache: Path | None = None

    def __init__(self, root: Path, name: str, whole: Path) -> None:
        self.root, self.name, self.whole = root, name, whole
        self.ranks = 2 if name == "sharded" else 1

    @cached_property
    def steps(self) -> dict[int, dict]:
        """The uninterrupted run's checkpoints by step."""
        return {found["global_step"]: found for found in map(content, self.whole.rglob("step=*.ckpt"))}

    def arguments(self, folder: Path) -> list[str]:
        saving = "lightning.pytorch.callbacks.ModelCheckpoint"
        options = {
            "config": f"{self.root}/run.yaml",
            "run.root": str(folder),
            "run.name": RUN,
            "trainer.callbacks": [_of(saving, **each) for each in _SAVED],
            "data.cache_dir": str(self.cache or folder / "cache"),
            **OPTIONS[self.name],
        }
        return ["fit", *(f"--{name}={x if isinstance(x, str) else json.dumps(x)}" for name, x in options.items())]

    def torn(self, folder: Path, kill: Kill) -> list[str]:
        """Under the name of a checkpoint is a complete one; whatever loads is the uninterrupted run's of that step."""
        found = []
        for path in folder.glob(f"{RUN}/checkpoints/*"):
            partial = path.suffix == ".partial"
            try:
                find_whole(path, resumes=False)
                held = content(path)
            except CheckpointError as error:
                found += [] if partial else [f"{path.name}: {error}"]
                continue
            if wrong := unlike(held, self.steps[held["global_step"]], _STATE):
                found.append(f"{path.name} loads, but its {wrong} are not those of step {held['global_step']}")
        whole = exported(self.whole / RUN / "export")
        for name, data in exported(folder / RUN / "export").items():
            if not name.startswith(".") and data != whole.get(name):
                found.append(f"export/{name}")
        return found

    def is_done(self, folder: Path) -> bool:
        return False

    def differences(self, folder: Path) -> list[str]:
        wrong = unlike(content(_last(folder)), content(_last(self.whole)))
        if logged(folder) != logged(self.whole):
            wrong.append("metrics.csv")
        exports = [exported(each / RUN / "export") for each in (folder, self.whole)]
        return wrong + (["export"] if exports[0] != exports[1] or not exports[1] else [])


def _last(folder: Path) -> Path:
    return max(folder.glob(f"{RUN}/checkpoints/step=*.ckpt"), key=lambda path: int(path.stem[5:]))


def aims(chaos, changes: list[str], ranks: int):
    """Between the files of checkpoints and inside them, by each signal; up to a third of the run's changes."""
    for number in cycle([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT]):
        rank, group = chaos.random.randrange(ranks), chaos.random.random() < 0.5
        room = chaos.random.choice([None, None, chaos.random.randrange(1, 20_000)])
        at = chaos.random.randrange(1, len(changes) // 3)
        yield Aim(".ckpt", at, number, group, room if number == signal.SIGKILL else None, rank=rank)


@pytest.fixture
def shared_memory():
    """A folder on another disk than that of temporary files."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if os.stat(folder).st_dev == os.stat(tempfile.gettempdir()).st_dev:
            pytest.skip("there is no second file system")
        yield Path(folder)


LONG = [pytest.param(name, 15, marks=pytest.mark.chaos) for name in OPTIONS if name != "export"]


@pytest.mark.parametrize(("name", "kills"), [("lora", 2), *LONG])
def test_fit(chaos, root, request, name, kills):
    if name == "two_disks":
        chaos.runs = request.getfixturevalue("shared_memory")
    case = Fit(root, name, chaos.runs / "whole")
    seconds, changes = chaos.measure(case, case.whole, Aim(".ckpt"))
    chaos.attack(case, chaos.plan(kills, seconds, aims(chaos, changes, case.ranks)))
