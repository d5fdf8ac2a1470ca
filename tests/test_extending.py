"""Every example of docs/how-to/extend.md, as it is printed there, and the Python of the README."""

import json
import math
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main as command
from shadowlit.delta import registry, transforms  # noqa: F401 - the package's own are registered first
from shadowlit.delta.delta import Delta
from shadowlit.lightning_cli import main
from tests.tiny import save_model, save_pair

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/how-to/extend.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# file: (\w+\.py)\n(.*?)```", TEXT, re.S))

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")  # sys.argv is pytest's own


def section(title):
    """The text under a heading."""
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def settings(*titles):
    """The YAML of these sections in one."""
    merged: dict = {}
    for title in titles:
        for block in re.findall(r"```yaml\n(.*?)```", section(title), re.S):
            for key, value in yaml.safe_load(block).items():
                merged.setdefault(key, {}).update(value)
    return merged


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pair, rows, and the page's files in a folder on the path."""
    root = tmp_path_factory.mktemp("extending")
    save_pair(root)
    for name, source in FILES.items():
        (root / name).write_text(source, encoding="utf-8")
    rows = [{"question": f"{i}?", "choices": ["ab", "abab", "ba"], "solution": i % 3} for i in range(8)]
    (root / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"{i}?", "chosen": "ab" * (1 + i % 3), "rejected": "ba"} for i in range(8)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    talks = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ab"}] for i in range(8)]
    (root / "train.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (root / "held_out.jsonl").write_text((root / "train.jsonl").read_text())
    sys.path.insert(0, str(root))
    before, registered = Path.cwd(), dict(registry._registered)
    os.chdir(root)
    yield root
    os.chdir(before)
    sys.path.remove(str(root))
    registry._registered = registered


def fit(root, changes, *args):
    """Train for one epoch; the last value of every metric."""
    config = {
        "pair": {"base": "base", "instruct": "instruct"},
        "model": {"lr": 1e-2, "warmup_ratio": 0, "adapter": {"r": 2}},
        "data": {"batch_size": 4, "max_length": 64, "cache": False},
        "export": {"enabled": False},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "log_every_n_steps": 1,
            "enable_model_summary": False, "enable_checkpointing": False, "logger": False,
            "default_root_dir": tempfile.mkdtemp(dir=root),
        },
    }  # fmt: skip
    for key, value in changes.items():
        config.setdefault(key, {}).update(value)
    config["data"]["validation"] = config["data"]["train"]
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    trainer = main(["fit", "--config", str(root / "run.yaml"), *args]).trainer
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_example_is_one_short_file(name):
    for part in re.split(r"\n\n\n(?=class |def |@)", FILES[name].split('"""')[0] + FILES[name]):
        assert len(part.splitlines()) <= 25, part
    assert "shadowlit." not in name


def test_all_extensions_of_supervised_training_in_one_run(root):
    metrics = fit(root, settings(
        "A transform of the update", "An objective on conversations", "A validation metric", "An evaluator",
        "A data format", "A module of your own",
    ))  # fmt: skip
    assert metrics["train/factor"] == 2.0
    for who in ("tuned", "grafted", "base", "instruct"):
        assert 0 <= metrics[f"val/{who}/top5"] <= 1
        assert metrics[f"val/{who}/texts/score"] < 0
    gain = metrics["val/grafted/texts/score"] - metrics["val/instruct/texts/score"]
    assert metrics["graft/gain/texts"] == pytest.approx(gain, abs=1e-5) and gain != 0  # float32 of about 20
    # Every element of the update has the size 2e-4, but for the few that are exactly zero.
    with CheckpointReader(root / "instruct") as reader:
        count = sum(info.num_elements for name, info in reader.tensors.items() if "proj" in name)
    assert metrics["graft/delta_norm"] == pytest.approx(2e-4 * math.sqrt(count), rel=1e-2)
    # The focal loss is below the cross entropy, here times the factor 2; SFT's is above half of it.
    assert metrics["train/loss"] < metrics["val/base/loss"]


def test_an_objective_on_preferences(root):
    metrics = fit(root, settings("An objective on preferences"))
    assert metrics["train/loss"] > 0 and {"val/grafted/margin", "val/instruct/accuracy"} <= metrics.keys()
    assert math.exp(-metrics["val/base/margin"]) <= metrics["val/base/loss"] + 1e-6  # Jensen


def test_a_transform_on_disk(root):
    save_model(root / "TUNED", near=root / "base", seed=2)
    command(["delta", "make", "base", "TUNED", "DELTA", "--dtype=float32"])
    lines = re.findall(r"```bash\n(.*?)```", section("A transform of the update"), re.S)[0].splitlines()
    places = {"BASE": "base", "INSTRUCT": "instruct", "OUT": ""}
    for number, line in enumerate(lines):
        words = [places.get(word, word) for word in shlex.split(line.removeprefix("shadowlit "))]
        assert command([word or f"out{number}" for word in words]) == 0
    delta = Delta.open("out1")
    sizes = {float(x) for name in delta.shapes for x in delta.tensor(name).abs().unique()}
    assert {round(size, 6) for size in sizes} <= {0.0, 2e-4}
    with CheckpointReader("out0") as grafted, CheckpointReader("instruct") as instruct:
        name = "model.layers.0.self_attn.q_proj.weight"
        moved = (grafted.read(name).float() - instruct.read(name).float()).abs()
    assert torch.allclose(moved, torch.full_like(moved, 2e-4), atol=1e-7)


def test_the_optimizer_of_the_page(root):
    changes = settings("Optimizers and schedules")
    metrics = fit(root, {**changes, "data": {"train": "train.jsonl"}})
    assert metrics["train/lr"] <= 2e-2 and metrics["val/tuned/loss"] < metrics["val/base/loss"]


def test_the_python_of_the_readme_trains_validates_and_exports(root, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "trainer.fit" in block)
    assert len(code.split("\n\n")) == 2 and len(code.splitlines()) <= 11
    names = re.findall(r"from (\S+) import", code)
    assert set(names) == {"lightning.pytorch", "shadowlit"}
    code = code.replace("Qwen/Qwen3-0.6B-Base", "base").replace("Qwen/Qwen3-0.6B", "instruct")
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    metrics = scope["trainer"].callback_metrics
    assert {"val/tuned/loss", "val/grafted@0.5/loss", "graft/gain"} <= metrics.keys()
    (exported,) = root.glob("**/export/model/model.safetensors")
    with CheckpointReader(exported.parent) as grafted, CheckpointReader(root / "instruct") as instruct:
        assert grafted.tensors.keys() == instruct.tensors.keys()
        assert grafted.fingerprint() != instruct.fingerprint()
