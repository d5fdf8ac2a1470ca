import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowlit.__main__ import main
from shadowlit.analysis.similarity import compare
from shadowlit.demo import BASE, INSTRUCT
from shadowlit.errors import PairError
from shadowlit.graft import streaming
from shadowlit.graft.checkpoint import CheckpointReader
from tests.tiny import save_model, save_pair


def readers(*folders):
    return [CheckpointReader(folder) for folder in folders]


def test_by_hand(tmp_path):
    """|a−b| sums to 3, |a| to 5, |b| to 4: σ = 3/9; ⟨a,b⟩ = 6, ‖a‖² = 9, ‖b‖² = 6."""
    a = torch.tensor([[1.0, -2.0], [2.0, 0.0]])
    b = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    for name, tensor in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        save_file({"model.layers.3.mlp.up_proj.weight": tensor}, tmp_path / name / "model.safetensors")
    (found,) = compare(*readers(tmp_path / "a", tmp_path / "b")).tensors
    assert found.sigma == pytest.approx(3 / 9)
    assert found.cosine == pytest.approx(5 / (9 * 4) ** 0.5)
    assert found.relative_norm == pytest.approx((3 / 9) ** 0.5)
    assert (found.layer, found.kind, found.num_elements) == (3, "up_proj", 4)


def test_in_parts_as_in_one(tmp_path, monkeypatch):
    base, instruct = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    whole = compare(*readers(base, instruct))
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 50)
    parts = compare(*readers(base, instruct))
    a, b = load_file(base / "model.safetensors"), load_file(instruct / "model.safetensors")
    for one, other in zip(whole.tensors, parts.tensors, strict=True):
        x, y = a[one.name].double(), b[one.name].double()
        assert one.sigma == pytest.approx(((x - y).abs().sum() / (x.abs().sum() + y.abs().sum())).item(), rel=1e-6)
        assert other.sigma == pytest.approx(one.sigma, rel=1e-6)
        assert other.relative_norm == pytest.approx(((y - x).norm() / x.norm()).item(), rel=1e-4)
    inside = [t.sigma for t in whole.tensors if ".layers." in t.name]
    assert whole.sigma == pytest.approx(sum(inside) / len(inside))
    assert len(inside) == len(whole.tensors) - 2  # embedding and final norm


def test_the_embedded_pair_and_the_verdict(tmp_path, capsys):
    out, picture = tmp_path / "s.json", tmp_path / "s.png"
    assert main(["similarity", str(BASE), str(INSTRUCT), f"--out={out}", f"--heat_map={picture}"]) == 0
    assert "above the range of the paper's pairs (0.003–0.042)" in " ".join(capsys.readouterr().out.split())
    assert json.loads(out.read_text())["sigma"] == pytest.approx(0.06, abs=0.005)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["similarity", str(BASE), str(BASE), f"--out={tmp_path / 's.csv'}"]) == 0
    assert "The two are equal" in capsys.readouterr().out
    assert (tmp_path / "s.csv").read_text().startswith("name,layer,kind,num_elements,sigma,cosine,relative_norm\n")
    assert main(["similarity", str(BASE), str(BASE), "--out=x.txt"]) == 1


def test_other_shapes(tmp_path):
    base, _ = save_pair(tmp_path, "qwen3")
    wider = save_model(tmp_path / "wider", "qwen3", hidden=64)
    with pytest.raises(PairError, match="differ in the shapes of"):
        compare(*readers(base, wider))
    longer = save_model(tmp_path / "longer", "qwen3", vocab_size=300)
    assert compare(*readers(base, longer)).tensors[0].num_elements == 272 * 32  # the shared rows
