import contextlib
import csv
import io
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowlit.analysis import sums
from shadowlit.analysis.similarity import Group, Similarity, TensorSimilarity, compare, open_reader, with_ranks
from shadowlit.analysis.sums import Sums
from shadowlit.checkpoint.folder import CheckpointReader, require_no_model, require_replaceable
from shadowlit.checkpoint.workers import in_order
from shadowlit.cli.main import main
from shadowlit.cli.similarity import _runs
from shadowlit.demo import BASE, INSTRUCT
from shadowlit.errors import CheckpointError, ExportError, PairError
from tests.grafting.test_mixtures import fuse
from tests.tiny import MIXTURES, save_model, save_pair

LAYER = "model.layers.{}.mlp.up_proj.weight"


def save(folder, tensors, stem="model"):
    folder.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / f"{stem}.safetensors")
    return folder


def save_sharded(folder, shards, stem):
    folder.mkdir(parents=True)
    weight_map = {}
    for i, tensors in enumerate(shards, start=1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def readers(*folders):
    return [CheckpointReader(folder) for folder in folders]


def models_of(tmp_path, *states):
    return readers(*(save(tmp_path / f"model{i}", state) for i, state in enumerate(states)))


def deltas_of(tmp_path, *states):
    opened = [open_reader(save(tmp_path / f"delta{i}", state, "delta")) for i, state in enumerate(states)]
    assert all(is_delta for _, is_delta in opened)
    return [reader for reader, _ in opened]


def noise(*shape, seed, scale=1.0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def flat(state, names):
    """All elements in one vector, in float64."""
    return torch.cat([state[name].double().flatten() for name in names])


def expected_weights(a, b):
    """The equations in float64: σ, cosine, relative norm."""
    a, b = a.double().flatten(), b.double().flatten()
    return (
        ((a - b).abs().sum() / (a.abs().sum() + b.abs().sum())).item(),
        (a @ b / (a.norm() * b.norm())).item(),
        ((b - a).norm() / a.norm()).item(),
    )


def expected_differences(a, b):
    """The equations in float64: cosine, sign agreement, norm ratio."""
    a, b = a.double().flatten(), b.double().flatten()
    both = (a != 0) & (b != 0)
    agreement = (torch.signbit(a) == torch.signbit(b))[both].double().mean()
    return ((a @ b / (a.norm() * b.norm())).item(), agreement.item(), (b.norm() / a.norm()).item())


def weights_of(found):
    return found.sigma, found.cosine, found.relative_norm


def differences_of(found):
    return found.cosine, found.sign_agreement, found.norm_ratio


@pytest.fixture
def small_windows(monkeypatch):
    """Several windows and several tasks for every tensor of a few thousand elements."""
    monkeypatch.setattr(sums, "_CHUNK", 8)
    monkeypatch.setattr(sums, "_WINDOW_ELEMENTS", 400)
    monkeypatch.setattr(sums, "_TASK_ELEMENTS", 700)


def test_by_hand(tmp_path):
    """|a−b| sums to 3, |a| to 5, |b| to 4: σ = 3/9; ⟨a,b⟩ = 5, ‖a‖² = 9, ‖b‖² = 4, ‖b−a‖² = 3."""
    a = torch.tensor([[1.0, -2.0], [2.0, 0.0]])
    b = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    (found,) = compare(models_of(tmp_path, {LAYER.format(3): a}, {LAYER.format(3): b})).similarities
    (tensor,) = found.tensors
    assert tensor.sums.sigma == 3 / 9
    assert tensor.sums.cosine == pytest.approx(5 / (9 * 4) ** 0.5)
    assert tensor.sums.relative_norm == pytest.approx((3 / 9) ** 0.5)
    assert (tensor.layer, tensor.kind, tensor.sums.num_elements) == (3, "up_proj", 4)


@pytest.mark.parametrize("windows", ["one", "several"])
def test_a_pair_against_the_equations_in_float64(windows, tmp_path, request):
    if windows == "several":
        request.getfixturevalue("small_windows")
    base, instruct = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    (found,) = compare(readers(base, instruct)).similarities
    a, b = load_file(base / "model.safetensors"), load_file(instruct / "model.safetensors")
    assert [tensor.name for tensor in found.tensors] == sorted(a)
    for tensor in found.tensors:
        expected = expected_weights(a[tensor.name], b[tensor.name])
        assert weights_of(tensor.sums) == pytest.approx(expected, rel=1e-6)
    assert weights_of(found.whole.sums)[1:] == pytest.approx(expected_weights(flat(a, a), flat(b, a))[1:], rel=1e-6)
    inside = [expected_weights(a[n], b[n])[0] for n in a if ".layers." in n]
    assert found.sigma == pytest.approx(sum(inside) / len(inside), rel=1e-6)
    assert len(inside) == len(found.tensors) - 2  # embedding and final norm
    kinds = {group.key: group.sigma for group in found.by_kind()}
    layers = {group.key: group.sigma for group in found.by_layer()}
    of_kind = [expected_weights(a[n], b[n])[0] for n in a if ".q_proj." in n]
    of_layer = [expected_weights(a[n], b[n])[0] for n in a if ".layers.1." in n and a[n].ndim == 2]
    assert kinds["q_proj"] == pytest.approx(sum(of_kind) / len(of_kind), rel=1e-6)
    assert layers[1] == pytest.approx(sum(of_layer) / len(of_layer), rel=1e-6)
    assert list(layers) == [0, 1]


def test_norms_do_not_swamp_the_totals(tmp_path, capsys):
    """As in Gemma 3: norms' weights of another size, which hardly differ. Totals are over the matrices."""
    a = {
        "model.embed_tokens.weight": noise(30, 8, seed=0),
        "model.layers.0.self_attn.q_proj.weight": noise(8, 8, seed=1),
        "model.layers.0.mlp.up_proj.weight": noise(16, 8, seed=2),
        "model.layers.0.input_layernorm.weight": torch.full((8,), 1000.0),
        "model.norm.weight": torch.full((8,), 1000.0),
    }
    b = {name: tensor + 0.1 * noise(*tensor.shape, seed=9) for name, tensor in a.items()}
    report = compare(models_of(tmp_path, a, b))
    (found,) = report.similarities
    matrices = [name for name in a if a[name].ndim == 2]
    alone = expected_weights(flat(a, matrices), flat(b, matrices))
    assert weights_of(found.total.sums) == pytest.approx(alone, rel=1e-6)
    assert found.total.sums.relative_norm > 0.09 > 100 * found.whole.sums.relative_norm
    each = {name: expected_weights(a[name], b[name]) for name in a}
    inside = [each[name][0] for name in matrices[1:]]
    assert found.sigma_of_matrices == pytest.approx(sum(inside) / 2, rel=1e-6)
    assert found.sigma == pytest.approx((sum(inside) + each["model.layers.0.input_layernorm.weight"][0]) / 3, rel=1e-6)
    assert f"σ is {found.sigma:.4f} ({found.sigma_of_matrices:.4f} over the matrices alone" in found.verdict
    parts = {group.key: group.sums.relative_norm for group in found.by_component()}
    assert list(parts) == ["embeddings", "attention", "mlp", "norms"]
    assert parts["attention"] == pytest.approx(each["model.layers.0.self_attn.q_proj.weight"][2], rel=1e-6)
    (layer,) = found.by_layer()
    assert {tensor.component for tensor in layer.tensors} == {"attention", "mlp"}
    told = json.loads(report.to_json())["similarities"][0]
    assert told["relative_norm"] == found.total.sums.relative_norm and told["over"] == "3 of 5 tensors"
    assert told["by_component"]["norms"]["relative_norm"] == parts["norms"]
    assert main(["similarity", str(tmp_path / "model0"), str(tmp_path / "model1")]) == 0
    assert "whole model, over the 3 matrices, but the paper’s σ" in capsys.readouterr().out


@pytest.mark.parametrize("make", [
    lambda seed: noise(700_001, seed=seed, scale=0.02),
    lambda seed: torch.full((700_001,), 0.3 + 0.01 * seed),  # roundings that all go one way
    lambda seed: 1 + noise(700_001, seed=seed, scale=1e-4),  # far from zero, close to each other
], ids=["noise", "constant", "close"])  # fmt: skip
def test_sums_of_many_elements_keep_six_digits(make, tmp_path):
    a, b = make(0), make(1)
    (found,) = compare(models_of(tmp_path, {"x": a}, {"x": b})).similarities
    a, b, offset, got = a.double(), b.double(), (b - a).double(), found.tensors[0].sums
    assert got.size_a == pytest.approx(a.abs().sum().item(), rel=1e-6)
    assert got.distance == pytest.approx(offset.abs().sum().item(), rel=1e-6)
    assert got.square_b == pytest.approx((b @ b).item(), rel=1e-6)
    assert got.square_difference == pytest.approx((offset @ offset).item(), rel=1e-6)
    assert got.dot == pytest.approx((a @ b).item(), rel=1e-6, abs=1e-6 * (a.norm() * b.norm()).item())


def test_dtypes_scalars_and_empty_tensors(tmp_path, small_windows):
    a = {
        "model.layers.0.a.weight": noise(37, 53, seed=0, dtype=torch.bfloat16),
        "model.layers.0.b.weight": noise(5, 400, seed=1, dtype=torch.float16),
        "model.layers.1.c.weight": noise(999, seed=2, dtype=torch.float64),
        "model.layers.1.scale": torch.tensor(3.0),
        "model.layers.1.none": torch.zeros(0, 4),
        "steps": torch.arange(2000),
    }
    b = {name: (tensor * 1.5 + (tensor != 0)).float() for name, tensor in a.items()}
    b["model.layers.1.c.weight"] = b["model.layers.1.c.weight"].bfloat16()
    report = compare(models_of(tmp_path, a, b))
    (found,) = report.similarities
    by_name = {tensor.name: tensor.sums for tensor in found.tensors}
    assert set(by_name) == set(a) - {"steps"} and report.left_out == {"A": ("steps",), "B": ("steps",)}
    del a["steps"]
    for name in set(a) - {"model.layers.1.none"}:
        assert weights_of(by_name[name]) == pytest.approx(expected_weights(a[name], b[name]), rel=1e-6)
    empty = by_name.pop("model.layers.1.none")
    assert empty.num_elements == 0 and math.isnan(empty.sigma) and math.isnan(empty.cosine)
    inside = [expected_weights(a[n], b[n])[0] for n in by_name if ".layers." in n]
    assert found.sigma == pytest.approx(sum(inside) / 4, rel=1e-6)  # the empty one doesn't count


def test_zeros(tmp_path):
    """Two tensors of zeros are equal; there is no angle to a zero: null in JSON, empty in CSV."""
    names = [LAYER.format(i) for i in range(2)]
    zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
    report = compare(models_of(tmp_path, dict.fromkeys(names, zeros), dict(zip(names, (zeros, ones), strict=True))))
    first, second = report.similarities[0].tensors
    assert (first.sums.sigma, second.sums.sigma) == (0.0, 1.0)
    assert math.isnan(first.sums.cosine) and math.isnan(second.sums.cosine) and math.isnan(second.sums.relative_norm)
    told = json.loads(report.to_json())["similarities"][0]
    assert told["cosine"] is None and told["tensors"][1]["cosine"] is None and told["sigma"] == 0.5
    row = list(csv.DictReader(io.StringIO(report.to_csv())))[1]
    assert (row["sigma"], row["cosine"], row["relative_norm"]) == ("1.0", "", "")


def test_several_models_and_the_angles_between_their_offsets(tmp_path, small_windows):
    names = ["embed.weight", *(LAYER.format(i) for i in range(3))]
    states = [{name: noise(23, 41, seed=7 * k + i, dtype=torch.bfloat16) for i, name in enumerate(names)}
              for k in range(4)]  # fmt: skip
    found = compare(models_of(tmp_path, *states)).similarities
    assert [s.title for s in found] == [
        "A, B", "A, C", "A, D", "B - A, C - A", "B - A, D - A", "C - A, D - A",
    ]  # fmt: skip
    for k, similarity in enumerate(found[:3], start=1):
        for tensor in similarity.tensors:
            expected = expected_weights(states[0][tensor.name], states[k][tensor.name])
            assert weights_of(tensor.sums) == pytest.approx(expected, rel=1e-6)
    for (i, j), similarity in zip([(1, 2), (1, 3), (2, 3)], found[3:], strict=True):
        one, other = (flat(states[k], names) - flat(states[0], names) for k in (i, j))
        assert differences_of(similarity.whole.sums) == pytest.approx(expected_differences(one, other), rel=1e-6)
        (layer,) = [group for group in similarity.by_layer() if group.key == 1]
        one, other = (states[k][LAYER.format(1)].float() - states[0][LAYER.format(1)].float() for k in (i, j))
        assert differences_of(layer.sums) == pytest.approx(expected_differences(one, other), rel=1e-6)


def test_deltas(tmp_path, small_windows):
    """The cosine over several tensors is that of the long vectors; a tensor that one lacks is zero there."""
    names = [LAYER.format(i) for i in range(3)]
    one = {n: noise(30, 40, seed=i, scale=10.0**-i) for i, n in enumerate(names)}
    other = {n: one[n] * 0.3 + noise(30, 40, seed=i + 9, scale=10.0**-i) for i, n in enumerate(names)}
    other[names[0]][::3] = 0
    one["embed.weight"] = noise(50, 8, seed=20, dtype=torch.bfloat16)
    both = {n: other.get(n, torch.zeros_like(t)) for n, t in one.items()}
    report = compare(deltas_of(tmp_path, one, other), deltas=True)
    (found,) = report.similarities
    assert found.of == "deltas" and not report.left_out
    whole = expected_differences(flat(one, one), flat(both, one))
    assert differences_of(found.whole.sums) == pytest.approx(whole, rel=1e-6)
    for tensor in found.tensors[1:]:
        expected = expected_differences(one[tensor.name], other[tensor.name])
        assert differences_of(tensor.sums) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(found.tensors[0].sums.cosine)
    (kind,) = [group for group in found.by_kind() if group.key == "up_proj"]
    expected = expected_differences(flat(one, names), flat(both, names))
    assert differences_of(kind.sums) == pytest.approx(expected, rel=1e-6)


def test_tiny_updates_have_signs(tmp_path):
    """Products of these underflow in float32; their signs don't."""
    a = {"x": torch.tensor([1e-30, -1e-30, 1e-30, 0.0])}
    b = {"x": torch.tensor([1e-30, -1e-30, -1e-30, 1.0])}
    (found,) = compare(deltas_of(tmp_path, a, b), deltas=True).similarities
    assert found.whole.sums.sign_agreement == 2 / 3


def test_effective_rank_of_the_offset(tmp_path):
    """An offset of two equal orthogonal directions has rank 2, one of a single direction has rank 1."""
    base = noise(12, 20, seed=0).round()
    two = torch.zeros(12, 20)
    two[0, 0] = two[1, 1] = 3.0
    a = {LAYER.format(i): base for i in range(3)} | {"model.layers.0.norm.weight": torch.ones(20)}
    b = a | {LAYER.format(0): base + two, LAYER.format(1): base + torch.ones(12, 20)}
    models = models_of(tmp_path, a, b)
    (found,) = with_ranks(compare(models), models).similarities
    first, second, third, norm = (found.tensors[i] for i in (0, 2, 3, 1))
    assert (first.effective_rank, first.stable_rank) == (pytest.approx(2), pytest.approx(2))
    assert second.effective_rank == pytest.approx(1)
    assert math.isnan(third.effective_rank) and norm.effective_rank is None
    assert found.whole.effective_rank == pytest.approx(1.5)


def test_other_vocabulary_and_other_architectures(tmp_path):
    base, _ = save_pair(tmp_path, "qwen3")
    wider = save_model(tmp_path / "wider", "qwen3", hidden=64)
    with pytest.raises(PairError, match="differ in the shapes of"):
        compare(readers(base, wider))
    longer = save_model(tmp_path / "longer", "qwen3", vocab_size=300)
    first = compare(readers(base, longer)).similarities[0].tensors[0]
    a, b = (load_file(folder / "model.safetensors")[first.name] for folder in (base, longer))
    assert first.sums.num_elements == 272 * 32  # the shared rows
    assert weights_of(first.sums) == pytest.approx(expected_weights(a, b[:272]), rel=1e-6, abs=1e-8)
    with pytest.raises(PairError, match="found 1 model; expected 2 to 26"):
        compare(readers(base))
    fewer_rows = models_of(tmp_path, {LAYER.format(0): torch.ones(4, 2)}, {LAYER.format(0): torch.ones(2, 2)})
    with pytest.raises(PairError, match=r"up_proj.weight \(4, 2\) and \(2, 2\)"):
        compare(fewer_rows)


def test_not_in_all_models(tmp_path):
    a, b = ({LAYER.format(0): torch.ones(2, 2), **more} for more in ({"only": torch.ones(1)}, {}))
    assert compare(models_of(tmp_path, a, b)).left_out == {"A": ("only",)}
    with pytest.raises(PairError, match="share no weight's name"):
        compare(models_of(tmp_path / "x", {"a": torch.ones(1)}, {"b": torch.ones(1)}))


def test_buffers_of_integers_and_truth_values_are_not_compared(tmp_path, capsys):
    def state(value):
        weights = {LAYER.format(0): noise(2, 3, seed=value)}
        buffers = {"counter": torch.tensor([value]), "flag": torch.tensor([value > 1])}
        buffers["mlp.relative_position_index"] = torch.full((2, 2), value, dtype=torch.int32)
        return weights, weights | {f"model.layers.0.{name}": tensor for name, tensor in buffers.items()}

    plain, full = zip(state(1), state(2), strict=True)
    found, wanted = (compare(models_of(tmp_path / n, *m)) for n, m in (("full", full), ("plain", plain)))
    assert found.similarities == wanted.similarities
    assert {letter: len(names) for letter, names in found.left_out.items()} == {"A": 3, "B": 3}
    assert main(["similarity", *(str(tmp_path / "full" / f"model{i}") for i in (0, 1))]) == 0
    assert "not all models have it as a weight: model.layers.0.counter" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights(value, tmp_path, monkeypatch):
    """Whoever computes the parts has ended before the error is reported: a signal that comes later would be lost."""
    ended = []

    def watched(*args, **options):
        with contextlib.closing(in_order(*args, **options)) as parts:
            try:
                yield from parts
            finally:
                ended.append(True)

    monkeypatch.setattr(sums, "in_order", watched)
    good, bad = ({LAYER.format(0): torch.tensor([1.0, last])} for last in (2.0, value))
    with pytest.raises(CheckpointError, match=r"up_proj.weight' of \S*model1 holds NaN or infinities") as held:
        compare(models_of(tmp_path, good, bad))
    assert held.tb and ended == [True]


def test_threads_are_as_before(tmp_path):
    before = torch.get_num_threads()
    compare(models_of(tmp_path, {"x": torch.ones(3)}, {"x": torch.ones(3)}))
    assert torch.get_num_threads() == before


def similar(of, **given):
    return Similarity("A", "B", of, (TensorSimilarity(LAYER.format(0), 0, "up_proj", Sums(10, **given)),))


@pytest.mark.parametrize(("distance", "words"), [
    (0.0, "equal in every decoder layer"),
    (0.002, "σ is 0.0010, below the range of the paper's pairs (0.003–0.042): close enough"),
    (0.032, "σ is 0.0160, within the range"),
    (0.112, "σ is 0.0560, above the range of the paper's pairs (0.003–0.042)"),
])  # fmt: skip
def test_verdict_on_models(distance, words):
    assert words in similar("weights", size_a=1.0, size_b=1.0, distance=distance).verdict


@pytest.mark.parametrize(("cosine", "of_deltas", "of_offsets"), [
    (0.5, "speaks for a graft", "repeats what the other"),
    (0.02, "is 0.020, near zero (below 0.1): the graft is a gamble", "neither repeats nor undoes"),
    (-0.02, "the graft is a gamble", "neither repeats nor undoes"),
    (-0.5, "speaks against a graft", "undoes what the other"),
])  # fmt: skip
def test_verdict_on_updates(cosine, of_deltas, of_offsets):
    assert of_deltas in similar("deltas", square_a=4.0, square_b=1.0, dot=2 * cosine).verdict
    assert of_offsets in similar("offsets", square_a=4.0, square_b=1.0, dot=2 * cosine).verdict


def test_verdict_on_nothing():
    assert "One of A and B is zero" in similar("deltas", square_a=4.0).verdict
    assert "One of A and B is zero" in similar("offsets").verdict
    outside = Similarity("A", "B", "weights", (TensorSimilarity("x", None, "x", Sums(1, 1.0, 1.0)),))
    assert "No tensor lies inside a decoder layer" in outside.verdict


def test_many_layers_share_rows():
    groups = [Group(i, similar("weights").tensors) for i in range(100)]
    runs = _runs(groups)
    assert len(runs) == 34 and [runs[0].key, runs[-1].key] == ["0–2", 99] and len(runs[0].tensors) == 3
    assert [run.key for run in _runs(groups[:48])] == list(range(48))


def test_the_embedded_pair(tmp_path, capsys):
    out, table, image = tmp_path / "new" / "s.json", tmp_path / "s.csv", tmp_path / "s.png"
    assert main(["similarity", str(BASE), str(INSTRUCT), f"--out={out}", f"--heat_map={image}",
                 "--effective_rank=true"]) == 0  # fmt: skip
    assert "above the range of the paper's pairs (0.003–0.042)" in " ".join(capsys.readouterr().out.split())
    assert image.read_bytes().startswith(b"\x89PNG")
    told = json.loads(out.read_text())
    (pair,) = told["similarities"]
    assert told["models"] == {"A": str(BASE), "B": str(INSTRUCT)}
    assert pair["sigma"] == pytest.approx(0.06, abs=0.005)
    assert main(["similarity", str(BASE), str(INSTRUCT), f"--out={table}"]) == 0
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    a, b = (load_file(folder / "model.safetensors") for folder in (BASE, INSTRUCT))
    assert len(rows) == len(pair["tensors"]) == len(a)
    for row, tensor in zip(rows, pair["tensors"], strict=True):
        assert (row["name"], row["kind"], int(row["num_elements"])) == (
            tensor["name"], tensor["kind"], a[tensor["name"]].numel(),
        )  # fmt: skip
        numbers = [float(row[column]) for column in ("sigma", "cosine", "relative_norm")]
        assert numbers == [tensor[column] for column in ("sigma", "cosine", "relative_norm")]
        assert numbers == pytest.approx(expected_weights(a[row["name"]], b[row["name"]]), rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "s.csv", "s.png"]  # nothing beside them


def test_three_models_and_deltas_on_the_command_line(tmp_path, capsys):
    assert main(["similarity", str(BASE), str(BASE), str(INSTRUCT), f"--heat_map={tmp_path / 's.svg'}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "A, B: The two are equal in every decoder layer" in told and "A, C: σ is 0.06" in told
    assert "One of B - A and C - A is zero" in told
    names = [LAYER.format(i) for i in range(2)]
    deltas = [
        save_sharded(tmp_path / f"d{k}", [{n: noise(40, 50, seed=2 * k + i)} for i, n in enumerate(names)], "delta")
        for k in range(2)
    ]
    assert (
        main(["similarity", *map(str, deltas), f"--out={tmp_path / 'd.json'}", f"--heat_map={tmp_path / 'd.png'}"]) == 0
    )
    assert "the graft is a gamble" in " ".join(capsys.readouterr().out.split())
    (found,) = json.loads((tmp_path / "d.json").read_text())["similarities"]
    one, other = (torch.cat([noise(40, 50, seed=2 * k + i).flatten() for i in range(2)]) for k in range(2))
    expected = expected_differences(one, other)
    assert [found[n] for n in ("cosine", "sign_agreement", "norm_ratio")] == pytest.approx(expected, rel=1e-6)
    assert set(found["by_layer"]) == {"0", "1"} and set(found["by_kind"]) == {"up_proj"}


@pytest.mark.parametrize(("words", "error"), [
    (["--out=x.txt"], "out is 'x.txt'; expected a name ending in .json, .csv"),
    (["--heat_map=x.txt"], "heat_map is 'x.txt'"),
])  # fmt: skip
def test_refusals(words, error, capsys):
    assert main(["similarity", str(BASE), str(BASE), *words]) == 1
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("option", ["out", "heat_map"])
def test_no_file_of_a_model_is_overwritten(tmp_path, capsys, option):
    """Not of the compared ones, not through a link, and not of another model's folder; results may be."""
    ending = "json" if option == "out" else "png"
    model, other = tmp_path / "model", tmp_path / "other"
    for folder in (model, other):
        shutil.copytree(BASE, folder)
        (folder / "sub").mkdir()
        (folder / f"kept.{ending}").write_text("theirs")
        (folder / f"sub/kept.{ending}").write_text("theirs")
    (tmp_path / f"link.{ending}").symlink_to(other / f"kept.{ending}")
    for target in (model / f"kept.{ending}", model / f"sub/kept.{ending}", other / f"kept.{ending}",
                   tmp_path / f"link.{ending}"):  # fmt: skip
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert main(["similarity", str(model), str(BASE), f"--{option}={target}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {option} is '{target}', which exists and ") and "nothing was written" in error
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for new in (model / f"new.{ending}", other / f"new.{ending}"):
        with pytest.raises(
            ExportError, match=r"new.*, which (belongs to|is in the folder of a model).*nothing was wri"
        ):
            require_replaceable(new, option, [str(model), "org/name"])
    with pytest.raises(ExportError, match=r"^out is '.*other', the folder of a model\. Give another folder"):
        require_no_model(other, "out")
    require_no_model(tmp_path, "out")
    result = tmp_path / f"result.{ending}"
    result.write_text("of the last time")
    require_replaceable(result, option, [str(model), "org/name"])


def test_deltas_are_not_mixed_with_models(tmp_path, capsys):
    folder = str(save(tmp_path / "d", {LAYER.format(0): torch.ones(2, 2)}, "delta"))
    assert main(["similarity", str(BASE), folder]) == 1
    assert "deltas among models" in capsys.readouterr().err
    assert main(["similarity", folder, folder, "--effective_rank=true"]) == 1
    assert "delta show DELTA --effective_rank" in capsys.readouterr().err


def test_nothing_to_draw(tmp_path, capsys):
    folder = str(save(tmp_path / "d", {"x": torch.ones(2, 2)}, "delta"))
    assert main(["similarity", folder, folder, f"--heat_map={tmp_path / 'x.png'}"]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    assert not list(tmp_path.glob("*x.png*"))


# --- mixtures of experts ---


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_are_compared_one_by_one_in_either_layout(tmp_path, capsys, arch):
    folders = save_pair(tmp_path, arch, tied=False, dtype=torch.bfloat16)
    fused = [fuse(folder, tmp_path / f"fused{i}") for i, folder in enumerate(folders)]
    states = [load_file(folder / "model.safetensors") for folder in fused]
    reports = []
    for i, pair in enumerate([folders, fused, (folders[0], fused[1]), (fused[0], folders[1])]):
        out = tmp_path / f"{i}.json"
        assert main(["similarity", "--models", json.dumps([str(f) for f in pair]), f"--out={out}"]) == 0
        assert "mean σ of experts" in capsys.readouterr().out
        (report,) = json.loads(out.read_text())["similarities"]
        reports.append(report)
    assert all(report["sigma"] == pytest.approx(reports[0]["sigma"], rel=1e-9) for report in reports)
    for report in reports:
        assert {layer: set(found) for layer, found in report["by_expert"].items()} == {
            str(layer): {"0", "1", "2", "3"} for layer in range(2)
        }
        for layer in range(2):
            gates, downs = (
                [state[f"model.layers.{layer}.mlp.experts.{kind}"][3] for state in states]
                for kind in ("gate_up_proj", "down_proj")
            )
            halves = [*zip(*(gate.chunk(2) for gate in gates), strict=True), downs]
            wanted = [expected_weights(a, b)[0] for a, b in halves]
            got = report["by_expert"][str(layer)]["3"]["sigma"]
            assert got == pytest.approx(sum(wanted) / 3, rel=1e-5)
