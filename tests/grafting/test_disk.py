"""The graft from folder to folder, against the equation in float32 rounded once, and against peft's own merge."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint import streaming
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main
from shadowlit.delta.folders import graft
from shadowlit.errors import GraftError
from shadowlit.grafting.disk import DiskGraft, Scale, linear_on_disk
from shadowlit.grafting.manifest import read_manifest
from shadowlit.grafting.parameters import linear_names
from shadowlit.grafting.tuned import open_update
from tests.tiny import ARCHITECTURES, make_config, save_model, save_pair


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A few rows a part, so that every tensor comes in many."""
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 100)


ROOT = Path(__file__).parents[2]


def run(base, tuned, instruct, out, *options):
    return main(["graft", f"--base={base}", f"--tuned={tuned}", f"--instruct={instruct}", f"--out={out}", *options])


def tensors(folder):
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def expected(base, tuned, instruct, selected, scale=1.0):
    """Instruct + scale (tuned - base) in float32, rounded once to the Instruct's dtype."""
    return {
        name: (w.float() + scale * (tuned[name].float() - base[name].float())).to(w.dtype) if name in selected else w
        for name, w in instruct.items()
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_bit_exact_for_every_tensor(tmp_path, arch, tied, dtype):
    """Sharded on one side and single-file on the other, float32 or bfloat16 tuned on a bfloat16 Base."""
    base, instruct = save_pair(tmp_path, arch, tied=tied, dtype=torch.bfloat16)
    tuned = save_model(tmp_path / "tuned", arch, tied=tied, near=base, seed=5, distance=0.02, shard_size="20KB",
                       dtype=dtype)  # fmt: skip
    assert len(list(tuned.glob("*.safetensors"))) > 1
    assert run(base, tuned, instruct, tmp_path / "out", "--shard_size=40KB") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    reader = CheckpointReader(instruct)
    wanted = expected(tensors(base), tensors(tuned), tensors(instruct), linear_on_disk(reader.tensors))
    got = tensors(tmp_path / "out")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) and got[name].dtype == torch.bfloat16 for name in wanted)
    assert not torch.equal(
        got["model.layers.0.mlp.up_proj.weight"], tensors(instruct)["model.layers.0.mlp.up_proj.weight"]
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["coverage"]["num_selected"] == len(linear_on_disk(reader.tensors))
    assert 0.5 < manifest["survival"]["survival"] < 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_linear_told_from_headers_is_linear_told_from_modules(tmp_path, arch):
    folder = save_model(tmp_path / "model", arch, tied=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(arch, tied=False))
    assert linear_on_disk(CheckpointReader(folder).tensors) == linear_names(model)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4},
        {"r": 4, "use_rslora": True, "lora_alpha": 16},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
        {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 4, "bias": "all"},
        {"r": 4, "modules_to_save": ["lm_head"]},
    ],
)
def test_adapters_are_exact(tmp_path, options):
    base, instruct = save_pair(tmp_path, "qwen2", tied=False)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"target_modules": "all-linear", **options})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path / "adapter")
    merged = dict(copy.deepcopy(model).double().merge_and_unload().named_parameters())
    assert run(base, tmp_path / "adapter", instruct, tmp_path / "out", "--select=all", "--scale=0.5") == 0
    start, goal, got = tensors(base), tensors(instruct), tensors(tmp_path / "out")
    for name in goal:
        update = merged[name].detach() - start[name].double()
        torch.testing.assert_close(got[name].double(), goal[name].double() + 0.5 * update, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "whose file lacks the residual"),
        ({"use_qalora": True}, "use_qalora=True can't be grafted exactly"),
    ],
)
def test_adapters_that_can_not_be_exact_are_refused(tmp_path, options, reason, capsys):
    base, instruct = save_pair(tmp_path, "qwen3")
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    assert run(base, tmp_path / "adapter", instruct, tmp_path / "out") == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path):
    base, _ = save_pair(tmp_path, "qwen3")
    larger = AutoModelForCausalLM.from_config(make_config("qwen3", tied=True, layers=3))
    get_peft_model(larger, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(GraftError, match=r"adapts model\.layers\.2.*which .*base doesn't have"):
        open_update(CheckpointReader(base), tmp_path / "adapter")


def test_wrappers_in_names_and_a_repeated_head_are_understood(tmp_path):
    base, instruct = save_pair(tmp_path, "qwen3", tied=True)
    tuned = save_model(tmp_path / "tuned", "qwen3", near=base, seed=5, distance=0.02)
    plain = load_file(tuned / "model.safetensors")
    wrapped = {name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in plain.items()}
    wrapped["lm_head.weight"] = plain["model.embed_tokens.weight"].clone()
    save_file(wrapped, tuned / "model.safetensors", {"format": "pt"})
    assert run(base, tuned, instruct, tmp_path / "out") == 0
    selected = linear_on_disk(CheckpointReader(instruct).tensors)
    wanted = expected(tensors(base), plain, tensors(instruct), selected)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(tmp_path / "out").items())
    wrapped["lm_head.weight"][0, 0] += 1  # a head of its own has no place in a tied model
    save_file(wrapped, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(GraftError, match=r"is tied: its embedding .* is also its output head\. The update changes"):
        graft(base, tuned, instruct, tmp_path / "all", select="all")
    done = graft(base, tuned, instruct, tmp_path / "linear")
    assert "lm_head.weight" in done.coverage.left_out and "lm_head.weight" in done.shares
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(tmp_path / "linear").items())


def test_another_models_checkpoint_is_refused(tmp_path):
    base, _ = save_pair(tmp_path, "qwen3")
    other = save_model(tmp_path / "llama", "llama")
    with pytest.raises(GraftError, match=r"was not tuned from .*only in the Base: .*q_norm"):
        open_update(CheckpointReader(base), other)


def test_scales_by_pattern(tmp_path):
    base, instruct = save_pair(tmp_path, "qwen3")
    tuned = save_model(tmp_path / "tuned", "qwen3", near=base, seed=5)
    assert run(base, tuned, instruct, tmp_path / "out", r"--scale=0.5;layers\.1\.=0;q_proj=2") == 0
    start, end, goal, got = map(tensors, (base, tuned, instruct, tmp_path / "out"))
    for name, scale in (("model.layers.0.self_attn.q_proj.weight", 2.0), ("model.layers.0.mlp.up_proj.weight", 0.5),
                        ("model.layers.1.self_attn.q_proj.weight", 0.0)):  # fmt: skip
        assert torch.equal(got[name], goal[name] + scale * (end[name] - start[name]))
    with pytest.raises(GraftError, match="scale has 'half'"):
        Scale.parse("half")
    with pytest.raises(GraftError, match="matches none of the 14 grafted tensors"):
        DiskGraft(open_update(CheckpointReader(base), tuned), CheckpointReader(instruct), Scale.parse(r"layers\.9=1"))


def test_another_dtype_and_what_survives_in_it(tmp_path):
    base, instruct = save_pair(tmp_path, "qwen3")
    tuned = save_model(tmp_path / "tuned", "qwen3", near=base, seed=5, distance=1e-3)
    for dtype in ("float32", "bfloat16"):
        assert run(base, tuned, instruct, tmp_path / dtype, f"--dtype={dtype}") == 0
        assert {str(t.dtype) for t in tensors(tmp_path / dtype).values()} == {f"torch.{dtype}"}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    survival = [read_manifest(tmp_path / dtype)["survival"]["survival"] for dtype in ("float32", "bfloat16")]
    assert survival[0] > 0.999 > 0.5 > survival[1]
    with pytest.raises(GraftError, match="dtype is 'bf16'; expected float32, bfloat16 or float16, or None"):
        graft(base, tuned, instruct, tmp_path / "none", dtype="bf16")


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    base, instruct = save_pair(tmp_path, "qwen3")
    assert run(base, instruct, instruct, tmp_path / "out", "--dry_run=true") == 0
    shown = capsys.readouterr().out
    assert "14 of 24 tensors" in shown and "; left out, trained or not: embed_tokens, input_layernorm (2)" in shown
    assert not (tmp_path / "out").exists()


def test_a_zero_update_is_an_error_unless_it_is_allowed(tmp_path, capsys):
    """TUNED is BASE, an adapter that has learned nothing, a scale of 0; no survival is claimed of it."""
    base, instruct = save_pair(tmp_path, "qwen3")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    for tuned, options, found in (
        (base, [], "14 of 24 tensors, 18.43 k of 27.33 k parameters)"),
        (tmp_path / "adapter", [], "2 of 24 tensors, "),
        (instruct, ["--scale=0"], "; trained but left out: embed_tokens, input_layernorm (2)"),
    ):
        assert run(base, tuned, instruct, tmp_path / "out", *options) == 1
        told = capsys.readouterr().err
        assert "error: the update is zero (" in told and found in told
        assert "so nothing would change. Check that tuned is the trained model" in told and "--allow-zero" in told
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))
    with pytest.raises(GraftError, match="the update is zero"):
        graft(base, base, instruct, tmp_path / "out")
    assert run(base, base, instruct, tmp_path / "out", "--allow-zero") == 0
    shown = capsys.readouterr().out
    assert "the update is zero" in shown and "survives" not in shown and "left out" not in shown
    assert read_manifest(tmp_path / "out")["survival"] == {"survival": "nan"}
    left, right = tensors(tmp_path / "out"), tensors(instruct)
    assert all(torch.equal(left[name], tensor) for name, tensor in right.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_changed_is_listed_as_left_out(tmp_path, capsys, dtype):
    """Stored as the Base or in another dtype: of the embedding only the last row has changed, of the norms one."""
    base, instruct = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    tuned = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.no_grad():
        for parameter in (tuned.model.layers[0].mlp.up_proj.weight, tuned.model.norm.weight,
                          tuned.model.embed_tokens.weight[-1]):  # fmt: skip
            parameter.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    assert run(base, tmp_path / "tuned", instruct, tmp_path / "out") == 0
    assert "parameters; trained but left out: embed_tokens, norm\n" in capsys.readouterr().out
    listed = read_manifest(tmp_path / "out")["coverage"]["left_out"]
    assert listed == ["model.embed_tokens.weight", "model.norm.weight"]


def test_bad_values_and_taken_targets_leave_nothing(tmp_path, capsys):
    base, instruct = save_pair(tmp_path, "qwen3")
    tuned = save_model(tmp_path / "tuned", "qwen3", near=base, seed=5)
    broken = load_file(tuned / "model.safetensors")
    broken["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(broken, tuned / "model.safetensors", {"format": "pt"})
    before = sorted(tmp_path.iterdir())
    assert run(base, tuned, instruct, tmp_path / "out") == 1
    assert "model.layers.1.mlp.up_proj.weight' has 1 of" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert run(base, base, instruct, instruct) == 1
    assert "Nothing was written" in capsys.readouterr().err
    assert run(base, base, instruct, tmp_path / "out", "--shard_size=big") == 1
    assert "shard_size is 'big'" in capsys.readouterr().err
    assert run(base, tmp_path / "none", instruct, tmp_path / "out") == 1
    assert "none" in capsys.readouterr().err


def test_unequal_vocabularies(tmp_path, capsys):
    base = save_model(tmp_path / "base", "qwen3", vocab_size=272)
    tuned = save_model(tmp_path / "tuned", "qwen3", vocab_size=272, near=base, seed=5)
    instruct = save_model(tmp_path / "instruct", "qwen3", vocab_size=280, seed=1)
    assert run(base, tuned, instruct, tmp_path / "out") == 0
    assert torch.equal(tensors(tmp_path / "out")["model.embed_tokens.weight"],
                       tensors(instruct)["model.embed_tokens.weight"])  # fmt: skip
    assert run(base, tuned, instruct, tmp_path / "all", "--select=all") == 1
    assert "differ in the shapes of model.embed_tokens.weight (272, 32) and (280, 32)" in capsys.readouterr().err


def test_the_command_needs_no_torch():
    """Start-up is part of its speed; a transform is what needs torch."""
    demo = "shadowlit/demo/pair"
    args = ["graft", f"{demo}/base", f"{demo}/instruct", f"{demo}/instruct", "unused", "--dry-run"]
    code = f"import sys; from shadowlit.cli.main import main; main({args!r}); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.splitlines()[-1] == "False"
