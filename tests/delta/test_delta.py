"""Deltas as objects and as artefacts, against sums written out in float64 and against peft's own loading."""

import json
import math
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint import streaming
from shadowlit.checkpoint.factored import FactoredReader
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main
from shadowlit.delta.delta import Delta, overlap, ties_sum, weighted_sum, write_delta
from shadowlit.delta.transforms import ties, truncated_svd
from shadowlit.errors import CheckpointError, GraftError
from shadowlit.grafting.disk import DiskGraft, Scale, linear_on_disk
from shadowlit.grafting.factors import Factors
from shadowlit.grafting.manifest import read_manifest
from tests.tiny import save_model, save_pair


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A few rows a part, so that every tensor comes in many."""
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 64)


@pytest.fixture
def pair(tmp_path):
    base, instruct = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    tuned = save_model(tmp_path / "tuned", "qwen3", near=base, seed=5, distance=0.02)
    return base, tuned, instruct


def tensors(folder, single_file="model.safetensors"):
    reader = CheckpointReader(folder, single_file)
    return {name: reader.read(name) for name in reader.tensors}


def sample(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


A = sample(0, w=(30, 20), b=(17,), s=())
B = sample(1, w=(30, 20), c=(5, 4))


def flat(tensors, names=("w", "b", "s", "c")):
    shapes = {"w": 600, "b": 17, "s": 1, "c": 20}
    return torch.cat(
        [tensors[n].flatten().double() if n in tensors else torch.zeros(shapes[n]).double() for n in names]
    )


def test_arithmetic():
    a, b = Delta.of(A), Delta.of(B)
    total = 2 * (a + b) - a * 0.5 + (-b)
    assert set(total.shapes) == {"w", "b", "s", "c"}
    assert torch.allclose(total.tensor("w"), 1.5 * A["w"] + B["w"], atol=1e-6)
    assert torch.allclose(total.tensor("b"), 1.5 * A["b"])
    assert torch.allclose(total.tensor("s"), 1.5 * A["s"])
    assert torch.allclose(total.tensor("c"), B["c"])
    assert torch.equal(total.rows("w", 3, 5), total.tensor("w")[3:5])


def test_sizes_and_overlaps():
    a, b = Delta.of(A), Delta.of({**B, "w": B["w"] * (B["w"] > 0)})
    x, y = flat(A), flat({**B, "w": B["w"] * (B["w"] > 0)})
    assert (a.norm(), b.norm()) == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-6)
    assert b.num_elements == 620
    assert sum(t.num_zeros for t in b.statistics()) == int((y[-20:] == 0).sum() + (y[:600] == 0).sum())
    met = overlap(a, b)
    matrices = [i for i in range(638) if not 600 <= i < 618]  # what is no matrix has no say
    x, y = x[matrices], y[matrices]
    assert a.cosine(b) == pytest.approx(met.cosine, rel=1e-12)
    assert met.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-5)
    both = (x != 0) & (y != 0)
    assert met.sign_agreement == pytest.approx(float((x.sign() == y.sign())[both].double().mean()))
    assert met.shared == pytest.approx(float(both.double().mean()))
    assert a.cosine(a) == pytest.approx(1) and a.cosine(-a) == pytest.approx(-1) and a.sign_agreement(-a) == 0
    assert math.isnan(a.cosine(a * 0))
    peak = {t.name: t.peak for t in a.statistics()}
    assert peak["w"] == float(A["w"].abs().max())


def product(seed, out=30, inputs=20, rank=3):
    return Factors(*sample(seed, up=(out, rank), down=(rank, inputs)).values())


def stored_delta(folder, seed):
    """A matrix as factors, one that is dense, and a vector."""
    tensors = sample(seed + 100, d=(5, 4), b=(7,))
    write_delta(folder, [("w", product(seed)), *tensors.items()], torch.float32)
    return Delta.open(folder), {"w": product(seed).matrix, **tensors}


def test_factors_are_stored_and_read_as_what_they_are(tmp_path):
    """Sizes, angles, spectra and sums against the products written out; an update without factors compares alike."""
    a, x = stored_delta(tmp_path / "a", 0)
    b, y = stored_delta(tmp_path / "b", 1)
    assert tensors(tmp_path / "a", "delta.safetensors").keys() == {"w.lora_A", "w.lora_B", "d", "b"}
    assert a.shapes == {"b": (7,), "d": (5, 4), "w": (30, 20)} and set(a.factored) == {"w"}
    assert a.manifest["stored_error"] == 0
    assert all(torch.allclose(a.tensor(name), x[name], atol=1e-6) for name in x)
    assert torch.equal(a.rows("w", 3, 9), a.tensor("w")[3:9])
    dense = Delta.of(x), Delta.of(y)
    assert a.norm() == pytest.approx(dense[0].norm(), rel=1e-6)
    assert a.squares()["w"] == pytest.approx(float(x["w"].double().square().sum()), rel=1e-6)
    for one, other in ((a, b), (a, dense[1]), (dense[0], b)):
        assert one.cosine(other) == pytest.approx(dense[0].cosine(dense[1]), rel=1e-5)
        assert one.sign_agreement(other) == pytest.approx(dense[0].sign_agreement(dense[1]), rel=1e-3)
    assert a.cosine(-a) == pytest.approx(-1, abs=1e-9) and math.isnan(a.cosine(a * 0))
    values = torch.linalg.svdvals(x["w"].double())
    torch.testing.assert_close(a.singular_values("w"), values, rtol=1e-6, atol=1e-5)
    assert a.effective_rank("w") == pytest.approx(dense[0].effective_rank("w"), rel=1e-5) and len(values) == 20
    total = 2 * a - 0.5 * b
    assert total.factored["w"]().rank == 6 and set((a + dense[1]).factored) == set()
    torch.testing.assert_close(total.tensor("w"), 2 * x["w"] - 0.5 * y["w"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.factored["w"]().matrix, total.tensor("w"), rtol=1e-5, atol=1e-5)
    assert not a.map(lambda name, tensor: tensor * 2).factored  # a transform's result is no product
    assert total.save(tmp_path / "sum", torch.float32) == 0 and set(Delta.open(tmp_path / "sum").factored) == {"w"}
    assert not (total + a * 0 + b * 0).only(["d"]).factored
    nothing = weighted_sum([a, b, a, b], [2, -1, -2, 1])
    nothing.save(tmp_path / "zero", torch.float32)  # which is zero also once it is multiplied out
    assert (a + a).factored["w"]().rank == 3
    assert not Delta.open(tmp_path / "zero").changes("w")


def test_products_larger_than_the_matrix_are_stored_dense(tmp_path):
    write_delta(tmp_path / "d", [("w", product(0, rank=20))], torch.float32)
    assert tensors(tmp_path / "d", "delta.safetensors").keys() == {"w"}
    write_delta(tmp_path / "e", [("w", product(0, rank=5))])
    assert not Delta.open(tmp_path / "d").factored and set(Delta.open(tmp_path / "e").factored) == {"w"}
    write_delta(tmp_path / "f", [("w", product(0, rank=6))])  # 4 · 6 · 50 = 2 · 30 · 20 bytes
    assert not Delta.open(tmp_path / "f").factored


def test_factors_are_compared_and_cut_without_their_product(tmp_path, monkeypatch):
    monkeypatch.setattr(FactoredReader, "_multiplied", lambda *_: pytest.fail("multiplied out"))
    a, b = (stored_delta(tmp_path / name, seed)[0].only(["w"]) for name, seed in (("a", 0), ("b", 1)))
    assert a.norm() > 0 and abs(a.cosine(b)) < 1 and a.effective_rank("w") > 1
    cut = truncated_svd(a.factored["w"](), rank=2)
    whole = truncated_svd(product(0).matrix, rank=2)
    torch.testing.assert_close(cut.matrix, whole.matrix, rtol=1e-4, atol=1e-5)
    assert cut.explained == pytest.approx(whole.explained, rel=1e-6) and cut.rank == 2


@pytest.mark.parametrize("stored", [
    {"w.lora_A": (3, 20)}, {"w.lora_A": (3, 20), "w.lora_B": (30, 2)},
    {"w": (30, 20), "w.lora_A": (3, 20), "w.lora_B": (30, 3)}, {"w.lora_A": (3, 20), "w.lora_B": (30,)},
])  # fmt: skip
def test_broken_factors_are_told(tmp_path, stored):
    save_file(sample(0, **stored), tmp_path / "delta.safetensors")
    (tmp_path / "shadowlit.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a factor of w|two factors \[out, r\] and \[r, in\] of w"):
        Delta.open(tmp_path)


def test_a_lora_adapter_makes_a_delta_of_factors(tmp_path, pair, capsys):
    """rsLoRA; dense rows, the graft and the adapter cut from it are peft's update."""
    base, _, instruct = pair
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "up_proj", "down_proj"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    start = tensors(base)
    merged = {n: p.detach() for n, p in model.merge_and_unload().named_parameters()}
    assert main(["delta", "make", str(base), str(tmp_path / "adapter"), str(tmp_path / "d")]) == 0
    assert "6 of them as factors in float32" in " ".join(capsys.readouterr().out.split())
    delta = Delta.open(tmp_path / "d")
    assert len(delta.factored) == len(delta.shapes) == 6 and delta.manifest["stored_error"] == 0
    for name in delta.shapes:
        torch.testing.assert_close(delta.tensor(name), merged[name] - start[name].float(), rtol=1e-4, atol=1e-6)
    assert main(["delta", "lora", str(tmp_path / "d"), str(instruct), str(tmp_path / "cut"), "--rank=4",
                 "--dtype=float32"]) == 0  # fmt: skip
    assert "differs from the delta by 0.0% of its norm" in " ".join(capsys.readouterr().out.split())
    assert main(["delta", "apply", str(tmp_path / "d"), str(instruct), str(tmp_path / "out"), "--dtype=float32"]) == 0
    got, goal = tensors(tmp_path / "out"), tensors(instruct)
    for name in delta.shapes:
        torch.testing.assert_close(got[name], goal[name].float() + delta.tensor(name), rtol=1e-6, atol=1e-7)
    assert main(["similarity", str(tmp_path / "d"), str(tmp_path / "d")]) == 0
    assert "1.000" in capsys.readouterr().out


def test_dora_makes_a_dense_delta(tmp_path, pair):
    base, _, _ = pair
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=["q_proj"]),
    )
    model.save_pretrained(tmp_path / "adapter")
    made = Delta.make(base, tmp_path / "adapter")
    assert made.shapes and not made.factored


def test_unequal_shapes_and_unknown_names_are_told():
    with pytest.raises(GraftError, match=r"w \(30, 20\) and \(2, 2\)"):
        Delta.of(A) + Delta.of({"w": torch.ones(2, 2)})
    with pytest.raises(GraftError, match="no tensor 'x'"):
        Delta.of(A).tensor("x")
    with pytest.raises(GraftError, match="one weight for each"):
        weighted_sum([Delta.of(A)], [1.0, 2.0])


def test_ties_of_deltas_asks_those_that_have_the_tensor():
    merged = ties_sum([Delta.of(A), Delta.of(B)], 0.3, [1.0, 2.0])
    assert torch.equal(merged.tensor("w"), ties([A["w"], B["w"]], 0.3, [1.0, 2.0]))
    assert torch.equal(merged.tensor("c"), ties([B["c"]], 0.3, [2.0]))


def test_whole_tensors_are_computed_once_in_a_pass(tmp_path):
    calls = []
    Delta.of(A).map(lambda name, tensor: calls.append(name) or tensor * 2).save(tmp_path / "d", torch.float32)
    assert sorted(calls) == ["b", "s", "w"]
    assert torch.equal(Delta.open(tmp_path / "d").tensor("w"), A["w"] * 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_made_stored_and_applied(tmp_path, pair, dtype, capsys):
    base, tuned, instruct = pair
    made = [f"--base={base}", f"--tuned={tuned}", f"--out={tmp_path / 'd'}", f"--dtype={dtype}", "--shard-size=40KB"]
    assert main(["delta", "make", *made]) == 0
    assert len(list((tmp_path / "d").glob("delta-*.safetensors"))) > 1
    w_base, w_tuned, w_instruct = tensors(base), tensors(tuned), tensors(instruct)
    exact = {n: w_tuned[n].float() - w_base[n].float() for n in w_base}
    stored = tensors(tmp_path / "d", "delta.safetensors")
    assert all(torch.equal(stored[n], exact[n].to(getattr(torch, dtype))) for n in exact)
    lost = math.sqrt(
        sum(float((stored[n].double() - exact[n].double()).square().sum()) for n in exact)
        / sum(float(exact[n].double().square().sum()) for n in exact)
    )
    manifest = read_manifest(tmp_path / "d")
    assert manifest["stored_error"] == pytest.approx(lost, rel=1e-4, abs=1e-9)
    assert manifest["stored_error"] < 0.003 and manifest["kind"] == "delta"
    with pytest.raises(CheckpointError):
        CheckpointReader(tmp_path / "d")  # nobody takes it for a model
    options = [str(tmp_path / "d"), str(instruct), "--out", str(tmp_path / "out"), "--scale=0.5"]
    assert main(["delta", "apply", *options]) == 0
    selected = linear_on_disk(CheckpointReader(instruct).tensors)
    got = tensors(tmp_path / "out")
    for name, w in w_instruct.items():
        wanted = (w.float() + 0.5 * stored[name].float()).to(w.dtype) if name in selected else w
        assert torch.equal(got[name], wanted)
    assert read_manifest(tmp_path / "out")["delta"]["base"]["id"] == str(base)
    if dtype == "float32":
        same = [f"--base={base}", f"--tuned={tuned}", f"--instruct={instruct}", f"--out={tmp_path / 'g'}", "--scale=.5"]
        assert main(["graft", *same]) == 0
        assert all(torch.equal(tensors(tmp_path / "g")[n], got[n]) for n in got)


def test_a_graft_leaves_the_delta_as_it_is(pair):
    *_, instruct = pair
    name = "model.layers.0.mlp.up_proj.weight"
    with CheckpointReader(instruct) as reader:
        update = torch.full(reader.tensors[name].shape, 0.5)
        graft = DiskGraft(Delta.of({name: update}), reader, Scale(0.25))
        parts = {n: [part.copy() for part in streamed.parts] for n, streamed in graft.tensors()}
        got = torch.from_numpy(np.concatenate(parts[name]).view(np.int16)).view(torch.bfloat16)
        assert torch.equal(got, (reader.read(name).float() + 0.125).bfloat16().flatten())
    assert torch.equal(update, torch.full_like(update, 0.5))


def test_only_the_linear_layers(tmp_path, pair):
    base, tuned, _ = pair
    assert main(["delta", "make", str(base), str(tuned), str(tmp_path / "d"), "--select=linear"]) == 0
    assert set(Delta.open(tmp_path / "d").shapes) == linear_on_disk(CheckpointReader(base).tensors)


def test_dry_run_writes_nothing(tmp_path, pair, capsys):
    base, tuned, instruct = pair
    assert main(["delta", "make", str(base), str(tuned), str(tmp_path / "d")]) == 0
    assert main(["delta", "apply", str(tmp_path / "d"), str(instruct), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "the result has" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_chat_vector_is_the_same_command(tmp_path, pair):
    """W_tuned + (W_instruct - W_base), with the files of the model that one talks to."""
    base, tuned, instruct = pair
    (instruct / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (tuned / "chat_template.jinja").unlink(missing_ok=True)
    sides = [f"--base={base}", f"--tuned={instruct}", f"--instruct={tuned}", "--select=all", f"--files-from={instruct}"]
    assert main(["graft", *sides, f"--out={tmp_path / 'chat'}", "--dtype=bfloat16"]) == 0
    w = [tensors(folder) for folder in (base, tuned, instruct)]
    got = tensors(tmp_path / "chat")
    for name in got:
        b, t, i = (side[name].float() for side in w)
        assert torch.equal(got[name], (t + (i - b)).bfloat16())
    assert (tmp_path / "chat/chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"


def test_lore_adapt_is_two_commands(tmp_path, pair, capsys):
    base, _, instruct = pair
    assert main(["delta", "make", str(base), str(instruct), str(tmp_path / "offset"), "--dtype=float32"]) == 0
    cut = ["--method=svd", "--explained_variance=0.5", "--dtype=float32"]
    assert main(["delta", "compress", str(tmp_path / "offset"), str(tmp_path / "cut"), *cut]) == 0
    whole, small = Delta.open(tmp_path / "offset"), Delta.open(tmp_path / "cut")
    name = "model.layers.0.mlp.up_proj.weight"
    energy = torch.linalg.svdvals(whole.tensor(name).double()).square()
    rank = int(torch.linalg.matrix_rank(small.tensor(name).double(), rtol=1e-4))
    assert float(energy[:rank].sum() / energy.sum()) >= 0.5 > float(energy[: rank - 1].sum() / energy.sum())
    error = (small - whole).norm() / whole.norm()
    assert f"changes it by {error:.1%} of its norm" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["magnitude", "dare"])
def test_sparse_ones(tmp_path, pair, method, capsys):
    base, tuned, _ = pair
    assert main(["delta", "make", str(base), str(tuned), str(tmp_path / "d")]) == 0
    keep = [f"--method={method}", "--density=0.1"]
    assert main(["delta", "compress", str(tmp_path / "d"), str(tmp_path / "s"), *keep]) == 0
    assert main(["delta", "compress", str(tmp_path / "d"), str(tmp_path / "s2"), *keep]) == 0
    once, twice = (load_file(tmp_path / n / "delta.safetensors") for n in ("s", "s2"))
    assert all(torch.equal(once[n], twice[n]) for n in once)
    sparse = Delta.open(tmp_path / "s")
    assert sum(t.num_zeros for t in sparse.statistics()) / sparse.num_elements == pytest.approx(0.9, abs=0.02)
    assert read_manifest(tmp_path / "s")["history"][-1]["method"] == method


def test_sum_and_table_of_conflicts(tmp_path, pair, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    base, tuned, instruct = pair
    for name, other in (("a", tuned), ("b", instruct)):
        assert main(["delta", "make", str(base), str(other), str(tmp_path / name), "--dtype=float32"]) == 0
    a, b = Delta.open(tmp_path / "a"), Delta.open(tmp_path / "b")
    both = json.dumps([str(tmp_path / "a"), str(tmp_path / "b")])
    capsys.readouterr()
    assert (
        main(["delta", "sum", f"--deltas={both}", f"--out={tmp_path / 'd'}", "--weights=[1,-1]", "--dtype=float32"])
        == 0
    )
    assert f"{a.cosine(b):+.3f}" in capsys.readouterr().out
    difference = Delta.open(tmp_path / "d")
    assert all(torch.equal(difference.tensor(n), a.tensor(n) - b.tensor(n)) for n in a.shapes)
    assert main(["delta", "show", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    told = capsys.readouterr().out
    assert "conflicts" in told and f"norm {a.norm():.4g}" in told
    merged = [f"--deltas={both}", f"--out={tmp_path / 't'}", "--method=ties", "--density=0.3", "--dtype=float32"]
    assert main(["delta", "sum", *merged]) == 0
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(Delta.open(tmp_path / "t").tensor(name), ties([a.tensor(name), b.tensor(name)], 0.3))


@pytest.mark.parametrize("size", [{"rank": 4}, {"explained_variance": 0.9}, {"rank": 1000}])
def test_as_an_adapter_that_peft_loads(tmp_path, pair, size, capsys):
    base, tuned, instruct = pair
    assert main(["delta", "make", str(base), str(tuned), str(tmp_path / "d"), "--dtype=float32"]) == 0
    options = [f"--{key}={value}" for key, value in size.items()]
    out = tmp_path / "lora"
    assert main(["delta", "lora", str(tmp_path / "d"), str(instruct), str(out), *options, "--dtype=float32"]) == 0
    delta = Delta.open(tmp_path / "d")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32), out)
    merged = model.merge_and_unload().state_dict()
    before = {n: t.float() for n, t in tensors(instruct).items()}
    squares = [0.0, 0.0]
    for name in linear_on_disk(CheckpointReader(instruct).tensors):
        update = delta.tensor(name)
        u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
        if "rank" in size:
            r = size["rank"]
        else:
            cumulated = (s**2).cumsum(0) / (s**2).sum()
            r = int((cumulated >= 0.9).int().argmax()) + 1
        best = u[:, :r] @ torch.diag(s[:r]) @ v[:r]
        got = (merged[name] - before[name]).double()
        assert torch.allclose(got, best, atol=3e-6)
        squares[0] += float((best - update.double()).square().sum())
        squares[1] += float(update.double().square().sum())
    adapted = math.sqrt(squares[0] / squares[1])
    found = read_manifest(out)["svd"]
    assert found["error_of_adapted"] == pytest.approx(adapted, rel=1e-3, abs=1e-6)
    left = delta.norm() ** 2 - squares[1]
    assert found["error"] == pytest.approx(math.sqrt((squares[0] + left) / delta.norm() ** 2), rel=1e-3)
    assert "embed_tokens (1)" in found["left_out"]
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


def test_a_delta_of_some_layers_names_them_whole(tmp_path, pair):
    base, tuned, instruct = pair
    assert main(["delta", "make", str(base), str(tuned), str(tmp_path / "d"), r"--select=layers\.0\.self_attn"]) == 0
    assert main(["delta", "lora", str(tmp_path / "d"), str(instruct), str(tmp_path / "lora"), "--rank=2"]) == 0
    targets = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert "model.layers.0.self_attn.q_proj" in targets
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(instruct), tmp_path / "lora")


def test_errors_leave_nothing(tmp_path, pair, capsys):
    base, tuned, instruct = pair
    assert main(["delta", "make", str(base), str(tuned), str(tmp_path / "d")]) == 0
    d, out = str(tmp_path / "d"), str(tmp_path / "out")
    for args, reason in (
        (["compress", d, out, "--method=magnitude"], "--density is missing; 'magnitude' has density: float"),
        (["compress", d, out, "--method=svd"], "rank is None and explained_variance is None; expected exactly one"),
        (["compress", d, out, "--method=magnitude", "--density=2"], "--method, magnitude: density is 2"),
        (
            ["compress", d, out, "--method=magnitud"],
            "--method is 'magnitud'; expected one of dare, gradfix, magnitude, svd, ties",
        ),
        (["compress", d, out, "--method=magnitude", "--density=0.1", "--rank=2"], "'magnitude' has no such parameter"),
        (["compress", d, out, "--method=dare", "--density=0.1", '--parameters={"density": 0.1}'], "Give it once"),
        (["compress", d, out, "--method=dare", '--parameters={"name": "ties"}'], "--parameters has 'name', which is"),
        (["compress", d, out, "--method=ties", '--parameters={"siz": 1}'], "--parameters.siz is given, but 'ties' has"),
        (["compress", d, out, "--method=ties", '--parameters={"density": []}'], "--parameters.density is []; expected"),
        (["sum", f"--deltas=[{d}, {d}]", f"--out={out}", "--weights=[1]", "--method=ties"], "one weight for each"),
        (["sum", "--deltas=[]", f"--out={out}", "--method=ties"], "0 deltas"),
        (["lora", d, str(instruct), out], "rank is None and explained_variance is None; expected exactly one"),
        (["apply", str(base), str(instruct), out], "delta.safetensors"),
        (["apply", d, str(instruct), out, "--select=nothing_like_it"], "matched"),
        (["make", str(base), str(tuned), d], "is not empty"),
        (["make", str(base), str(tuned), out, "--shard-size=5XB"], "expected a number and KB"),
        (["make", str(base), str(base), out], "the update is zero (24 tensors), so nothing would change. Check"),
        (["apply", d, str(instruct), out, "--scale=0"], "the update is zero (14 of 24 tensors, "),
    ):
        # A wrong transform is wrong usage, found before the delta is opened.
        assert main(["delta", *args]) == (2 if args[0] == "compress" else 1)
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))
    assert main(["delta", "make", str(base), str(base), str(tmp_path / "none"), "--allow-zero"]) == 0
    assert main(["delta", "apply", str(tmp_path / "none"), str(instruct), out, "--allow-zero"]) == 0
    assert "the update is zero" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_told_with_its_tensor(tmp_path, pair, value, capsys):
    """In whatever is made of models or deltas, by the name that the delta's tensor has."""
    base, tuned, instruct = map(str, pair)
    tensors = load_file(f"{tuned}/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(-1)[5] = value
    for folder, file in (("diverged", "model"), ("delta", "delta")):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / f"{file}.safetensors", metadata={"format": "pt"})
    (tmp_path / "delta/shadowlit.json").write_text("{}")
    delta, tuned = str(tmp_path / "delta"), str(tmp_path / "diverged")
    out = ["--out", str(tmp_path / "out")]
    for arguments in (
        ["make", base, tuned, *out],
        ["compress", delta, "--method", "svd", "--explained_variance", "0.9", *out],
        ["lora", delta, instruct, "--rank", "2", *out],
        ["sum", delta, delta, "--method", "ties", *out],
        ["show", delta, "--effective_rank", "true"],
    ):
        assert main(["delta", *arguments]) == 1
        assert re.search(rf"Tensor '{name}' has 1 of \d+ values that are NaN", capsys.readouterr().err), arguments
        assert not (tmp_path / "out").exists()
