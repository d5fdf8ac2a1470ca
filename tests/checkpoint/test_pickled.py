"""Pickled checkpoints give the same graft as safetensors, need a flag, and never run code."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shadowlit.checkpoint import streaming
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.pickled import PickledReader, open_checkpoint
from shadowlit.cli.main import main
from shadowlit.errors import CheckpointError
from shadowlit.grafting.manifest import read_manifest
from tests.tiny import save_model, save_pair

SIDES = ("base", "tuned", "instruct")
FLAG = "--allow_pickle=true"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A few rows a part, so that every tensor comes in many."""
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 100)


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """Base and Instruct in bfloat16, tuned in float32; and their graft from safetensors."""
    root = tmp_path_factory.mktemp("trio")
    base, _ = save_pair(root, "qwen3", dtype=torch.bfloat16)
    save_model(root / "tuned", "qwen3", near=base, seed=5, distance=0.02)
    assert graft(root) == 0
    return root


def graft(root, *options):
    return main(["graft", *(f"--{side}={root / side}" for side in SIDES), f"--out={root / 'out'}", *options])


def pickle_folder(folder, num_shards=1):
    """Put pickled weights in the place of a folder's safetensors."""
    found = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(dict(found), folder / "pytorch_model.bin")
        return
    weight_map = {}
    for i in range(num_shards):
        file = f"pytorch_model-{i + 1:05d}-of-{num_shards:05d}.bin"
        torch.save(dict(found[i::num_shards]), folder / file)
        weight_map |= {name: file for name, _ in found[i::num_shards]}
    write_index(folder, weight_map)


def write_index(folder, weight_map):
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


class RunsCode:
    """Pickled, it makes whoever loads it without restriction create a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("sides", [["base"], ["tuned"], ["instruct"], SIDES])
def test_the_graft_is_that_of_safetensors(tmp_path, trio, sides, num_shards):
    shutil.copytree(trio, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out"))
    for side in sides:
        pickle_folder(tmp_path / side, num_shards)
    assert graft(tmp_path, FLAG) == 0
    out, wanted = tmp_path / "out", load_file(trio / "out" / "model.safetensors")
    got = load_file(out / "model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) and got[name].dtype == wanted[name].dtype for name in wanted)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (trio / "out").iterdir())
    manifest = read_manifest(out)
    for side in ("base", "instruct"):
        assert manifest[side]["fingerprint"] == CheckpointReader(trio / side).fingerprint()


@pytest.mark.parametrize("side", SIDES)
def test_without_the_flag_the_remedy_is_told(tmp_path, trio, side, capsys):
    shutil.copytree(trio, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out"))
    pickle_folder(tmp_path / side)
    assert graft(tmp_path) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"{side} holds no model.safetensors" in told and "only pickled weights (pytorch_model.bin)" in told
    assert "Or give --allow_pickle=true, which reads them as tensors alone" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"a": torch.ones(2), "b": bad}])
def test_code_in_a_pickle_is_not_run(tmp_path, wrap):
    victim = tmp_path / "victim"
    path = tmp_path / "pytorch_model.bin"
    torch.save(wrap(RunsCode(victim)), path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin can't be read as tensors alone .*Don't trust"):
        PickledReader(tmp_path)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the file does what it is feared for
    assert victim.exists()


def test_safetensors_come_first(tmp_path, trio):
    shutil.copytree(trio / "base", tmp_path, dirs_exist_ok=True)
    victim = tmp_path / "victim"
    torch.save(RunsCode(victim), tmp_path / "pytorch_model.bin")
    reader = open_checkpoint(tmp_path, allow_pickle=True)
    assert reader.fingerprint() == CheckpointReader(trio / "base").fingerprint()
    assert not victim.exists()


def test_rows_come_in_memory_of_their_own(tmp_path):
    stored = {
        "matrix": torch.randn(7, 5),
        "transposed": torch.randn(4, 6).T,
        "half": torch.randn(3, 2, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    stored["again"] = stored["matrix"]  # shares its storage, as a tied head does
    torch.save(stored, tmp_path / "pytorch_model.bin")
    reader = PickledReader(tmp_path)
    assert list(reader.tensors) == sorted(stored)
    for name, tensor in stored.items():
        assert reader.tensors[name].shape == tuple(tensor.shape)
        got = reader.read(name)
        assert torch.equal(got, tensor) and got.dtype == tensor.dtype
    part = reader.read_slice("transposed", (slice(1, 4),))
    assert torch.equal(part, stored["transposed"][1:4])
    part.zero_()
    assert torch.equal(reader.read("transposed"), stored["transposed"])


def save_legacy(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def cut_short(path):
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_legacy, r"pytorch_model\.bin is not a zip archive.*save its tensors with safetensors"),
        (cut_short, r"pytorch_model\.bin is not a zip archive, .*was cut short"),
        (lambda path: torch.save([torch.ones(2)], path), "holds a list, expected tensors by name"),
        (lambda path: torch.save({}, path), "holds nothing, expected tensors by name"),
        (lambda path: torch.save({"model": {"a": torch.ones(2)}, "step": 3}, path), r"more than plain tensors \(model"),
        (lambda path: torch.save({"a": torch.ones(2).to_sparse()}, path), r"more than plain tensors \(a\)"),
        (lambda path: torch.save({"a": torch.ones(2, dtype=torch.complex128)}, path), r"'a' of dtype torch.complex128"),
        (lambda path: None, r"holds no pytorch_model\.bin and no pytorch_model\.bin\.index\.json"),
    ],
)
def test_files_that_are_no_state_dict(tmp_path, save, message):
    save(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        PickledReader(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.bin"}, r"names files outside of its folder"),
        ({"a": "/etc/passwd"}, r"names files outside of its folder"),
        ({"a": "one.bin", "b": "two.bin"}, r"1 can't be found: two\.bin"),
        ({"a": "one.bin", "c": "one.bin"}, r"does not match its shards: it names the wrong file for 1 tensor \(c\)"),
        ({}, r"has no 'weight_map'"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, weight_map, message):
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        PickledReader(tmp_path)
