"""A training resumes exactly from each of its checkpoints, whenever they were written."""

import csv
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from shadowlit.checkpoint.saved import find_whole
from shadowlit.data.module import ShadowData
from shadowlit.errors import CheckpointError, ShadowlitError
from shadowlit.lightning_cli import main
from shadowlit.pair.pair import ModelPair
from shadowlit.training import checkpoints
from shadowlit.training.anchors import Anchors
from shadowlit.training.resuming import require_states
from tests.data.templates import talk
from tests.test_stopping import _MACHINES, root  # noqa: F401  a fixture
from tests.tiny import save_pair
from tests.training import test_anchors as anchored

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")  # sys.argv is pytest's own

SAVING = "lightning.pytorch.callbacks.ModelCheckpoint"


def fit(root, folder, every, *options):  # noqa: F811
    """Train, with a checkpoint of each step, and one of each validation; return the folder of checkpoints."""
    saved = [
        {"dirpath": str(folder), "filename": "step-{step}", "every_n_train_steps": 1, "save_top_k": -1},
        {"dirpath": str(folder), "filename": "validation-{step}", "monitor": "val/grafted/loss", "save_top_k": -1},
    ]
    callbacks = [{"class_path": SAVING, "init_args": {**each, "auto_insert_metric_name": False}} for each in saved]
    torch.set_num_threads(1)
    main(["fit", "--config", str(root / "run.yaml"), f"--trainer.callbacks={json.dumps(callbacks)}",
          "--evaluation.evaluators={}", "--export.enabled=false", f"--trainer.val_check_interval={every}",
          f"--run.root={folder}", *options])  # fmt: skip
    return folder


def logged(folder):
    """The rows of metrics.csv in a folder's last run, without times."""
    file = max(folder.glob("run/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    return [{name: value for name, value in row.items() if value and not any(m in name for m in _MACHINES)}
            for row in csv.DictReader(file.open())]  # fmt: skip


def held(path):
    """A checkpoint's weights, moments and progress, without that of the validations, which may be repeated."""
    found = torch.load(path, weights_only=True)
    loops = {key: value for key, value in found["loops"]["fit_loop"].items() if "val_loop" not in key}
    return [found[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")] + [loops]


def require_equal(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, list | tuple):
        for each, found in zip(one, other, strict=True):
            require_equal(each, found)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


SOME = ["step-2", "step-3", "validation-5"]  # before a validation, at an epoch's end, and due after half a step


@pytest.mark.parametrize(("every", "names"), [
    (4, SOME), *(pytest.param(every, [], marks=pytest.mark.slow) for every in (4, 1, 5)),
])  # fmt: skip
def test_a_run_resumes_exactly_from_each_of_its_checkpoints(root, tmp_path, every, names):  # noqa: F811
    """Two micro-batches are a step, and five an epoch of three: some validations are due after half a step."""
    whole = fit(root, tmp_path / "whole", every)
    end, rows = held(whole / "step-9.ckpt"), logged(whole)
    for path in [whole / f"{name}.ckpt" for name in names] or sorted(whole.glob("*.ckpt")):
        parts = fit(root, tmp_path / path.stem, every, f"--ckpt_path={path}")
        require_equal(held(parts / "step-9.ckpt") if (parts / "step-9.ckpt").exists() else held(path), end)
        again = parts / f"step-{torch.load(path, weights_only=True)['global_step']}.ckpt"
        assert not again.exists(), "after half a step"
        found = logged(parts) if any(parts.glob("run/version_*/metrics.csv")) else []
        assert found == rows[len(rows) - len(found) :] and (found or path.stem.endswith("-9")), path


def test_a_step_s_row_is_written_before_its_checkpoint(root, tmp_path, monkeypatch):  # noqa: F811
    """And not again after it: a run that is killed in between resumes after the step."""
    write, seen = checkpoints.write_file, []

    def look(path, content):
        rows = list(csv.DictReader((tmp_path / "one/metrics.csv").open())) if (tmp_path / "one").exists() else []
        seen.append((content["global_step"], [int(row["step"]) + 1 for row in rows if row["train/loss"]]))
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_file", look)
    saved = [{"class_path": SAVING, "init_args": {"every_n_train_steps": 1}}]
    main(["fit", "--config", str(root / "run.yaml"), f"--run.root={tmp_path}", "--run.name=one",
          "--export.enabled=false", f"--trainer.callbacks={json.dumps(saved)}", "--trainer.max_steps=3"])  # fmt: skip
    assert seen == [(1, [1]), (2, [1, 2]), (3, [1, 2, 3])]


def test_the_configured_settings_count_and_not_those_of_the_checkpoint(root, tmp_path):  # noqa: F811
    """A changed rate is trained with, over the whole schedule; a forged one in a checkpoint is not."""
    short, new = "--trainer.max_steps=5", ["--model.lr=3e-3", "--model.weight_decay=0.5", "--model.betas=[0.8,0.9]"]
    one, other = (fit(root, tmp_path / name, 4, short, *options) for name, options in (("one", []), ("other", new)))
    ends = []
    mixed = fit(root, tmp_path / "mixed", 4, short, *new, f"--ckpt_path={one / 'step-2.ckpt'}")
    for folder in (one, other, mixed):
        optimizer, schedule = held(folder / "step-5.ckpt")[2:4]
        ends.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer[0]["param_groups"]])
        ends[-1].append(schedule)
    assert ends[2] == ends[1] != ends[0]
    forged = torch.load(one / "step-2.ckpt", weights_only=True)
    for group in forged["optimizer_states"][0]["param_groups"]:
        group.update(lr=0.77, initial_lr=0.77, betas=(0.1, 0.1), eps=1.0, weight_decay=0.9)
    forged["lr_schedulers"][0]["base_lrs"] = [0.77 for _ in forged["lr_schedulers"][0]["base_lrs"]]
    torch.save(forged, tmp_path / "forged.ckpt")
    parts = fit(root, tmp_path / "parts", 4, short, f"--ckpt_path={tmp_path / 'forged.ckpt'}")
    require_equal(held(parts / "step-5.ckpt"), held(one / "step-5.ckpt"))


class Leave(Callback):
    """Stops a training after a micro-batch, or saves a checkpoint there."""

    def __init__(self, after, save=None):
        self.after, self.save = after, save

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.after:
            trainer.should_stop = self.save is None
            if self.save:
                trainer.save_checkpoint(self.save)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A function that trains two epochs of two steps, each of two micro-batches, with two anchors."""
    folder = tmp_path_factory.mktemp("short")
    pair = ModelPair(*map(str, save_pair(folder, "qwen3", distance=0.5)))
    rows = ({"messages": talk(f"say {i}", "x" * (i % 5 + 1))} for i in range(8))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(*callbacks, start=None, **options):
        module = anchored.make_module(pair, "lora", Anchors(0.5), dropout=0.2)
        data = ShadowData(pair, train=str(folder / "rows.jsonl"), batch_size=2, max_length=64, cache=False)
        trainer = anchored.fit(module, data, callbacks, start, **{"max_epochs": 2, **options})
        return trainer.global_step, anchored.parameters(module)

    return train


@pytest.mark.parametrize(("after", "stopped", "options"), [
    ([1], [1], {}), ([5], [3], {}), ([4, 6], [2, 3], {"max_epochs": -1, "max_steps": 4}),
])  # fmt: skip
def test_a_training_that_was_stopped_resumes_exactly(short, tmp_path, after, stopped, options):
    """By the clock or early, in the middle of an epoch: after the whole step, and the epoch is finished later."""
    (steps, expected), start = short(**options), None
    for place, step in zip(after, stopped, strict=True):
        assert short(Leave(place), ModelCheckpoint(tmp_path, f"{step}"), start=start, **options)[0] == step
        start = tmp_path / f"{step}.ckpt"
    again, found = short(start=start, **options)
    assert again == steps == 4 and all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_checkpoint_within_a_step_is_for_its_weights_alone(short, tmp_path):
    """And one between steps that another number of micro-batches makes one within a step, with two anchors."""
    for after in (1, 2):
        short(Leave(after, tmp_path / f"{after}.ckpt"), max_steps=1 + after // 2)
    assert find_whole(tmp_path / "1.ckpt", resumes=False, contents=True)
    with pytest.raises(CheckpointError, match=r"1\.ckpt was written within a step, by an exception or a callback"):
        short(start=tmp_path / "1.ckpt")
    with pytest.raises(ShadowlitError, match=r"resumes after 2 micro-batches.*trainer\.accumulate_grad_batches=4"):
        short(start=tmp_path / "2.ckpt", accumulate_grad_batches=4)


OPTIMIZERS = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}
NO_STATES = {
    "optimizer_states": ("adam", {"optimizer_states": []}, "a.ckpt holds 0 optimizer_states, but the run has 1"),
    "lr_schedulers": ("adam", {"lr_schedulers": []}, "a.ckpt holds 0 lr_schedulers, but the run has 1"),
    "another": (
        "sgd",
        {},
        "is SGD, but a.ckpt was written with another .* betas.* and lacks .*momentum",
    ),
    "moments": ("adam", {"no": "moments"}, "a.ckpt holds no moments of its optimizer"),
    "all": ("adam", {}, None),
    "not begun": ("adam", {"no": "moments", "global_step": 0}, None),
}


@pytest.mark.parametrize("what", NO_STATES)
def test_a_checkpoint_without_states_is_refused(what):
    """Lightning pairs states and optimizers with zip: without the check the moments would begin at zero."""
    kind, changes, message = NO_STATES[what]
    parameters = [torch.nn.Parameter(torch.ones(2))]
    saved, own = (OPTIMIZERS[each](parameters, lr=0.1) for each in ("adam", kind))
    parameters[0].grad = torch.ones(2)
    if "no" not in changes:
        saved.step()
    content = {"global_step": 3, "optimizer_states": [saved.state_dict()], "lr_schedulers": [{}], **changes}
    trainer = SimpleNamespace(_checkpoint_connector=SimpleNamespace(_loaded_checkpoint=content), ckpt_path="a.ckpt",
                              optimizers=[own], lr_scheduler_configs=[1])  # fmt: skip
    with nullcontext() if message is None else pytest.raises(CheckpointError, match=message):
        require_states(trainer)
