"""Mixtures of experts: fused in memory, one by one in most files; the live graft, the graft on disk, the equation."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from shadowlit.checkpoint import streaming
from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.layout import in_layout_of_module, single_experts
from shadowlit.cli.main import main
from shadowlit.delta.delta import Delta, write_delta
from shadowlit.errors import GraftError
from shadowlit.grafting.disk import DiskGraft, Scale, linear_on_disk
from shadowlit.grafting.export import export_adapter, export_folder
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.subject import BASE, INSTRUCT
from shadowlit.grafting.tuned import open_update
from shadowlit.pair.pair import ModelPair
from tests.grafting.test_live import IDS, effective_weights, grafted, load, logits, open_graft, train_a_bit, truth
from tests.reloading import reload_logits
from tests.rounding import require_same_logits
from tests.tiny import MIXTURES, save_pair

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def fuse(folder, target):
    """The folder's model in the layout in which transformers holds it in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    shutil.copytree(folder, target)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, target / "model.safetensors", {"format": "pt"})
    assert any(name.endswith(".experts.gate_up_proj") for name in state)
    return target


def pair_in(root, arch, form, dtype=torch.float32):
    """Base and Instruct, both as transformers saves them (``single``), both fused, or one of each."""
    folders = save_pair(root, arch, tied=False, dtype=dtype)
    assert any(".experts.3." in name for name in load_file(folders[0] / "model.safetensors"))
    fused = {"single": (), "fused": (0, 1), "base fused": (0,), "instruct fused": (1,)}[form]
    return [fuse(f, root / f"fused{i}") if i in fused else f for i, f in enumerate(folders)]


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize("form", ["single", "fused", "base fused", "instruct fused"])
def test_models_are_filled_swapped_and_put_back(tmp_path, arch, form):
    folders = pair_in(tmp_path, arch, form, torch.bfloat16)
    base, instruct = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    model = load(folders[0])
    assert all(torch.equal(p, base.get_parameter(name)) for name, p in model.named_parameters())
    assert torch.equal(logits(model), logits(base))
    graft = open_graft(model, folders, dtype=torch.float32)
    assert graft.on_base
    train_a_bit(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = truth(folders, model, 0.5, graft.selected)
    with graft.applied(grafted(0.5)):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), expected.get_parameter(name), rtol=0, atol=1e-6)
    for subject, like in ((INSTRUCT, instruct), (BASE, base)):
        with graft.applied(subject):
            assert torch.equal(logits(model), logits(like))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    exported = dict(graft.grafted_tensors(0.5))
    assert exported.keys() == CheckpointReader(folders[1]).tensors.keys()


SELECTIONS = {"linear": "linear", "all": "all", "patterns": ["o_proj", r"\.experts\."], "router": [r"\.gate\."]}


@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["single", "instruct fused"])
def test_the_graft_on_disk_is_the_live_one_bit_for_bit(tmp_path, arch, dtype, form):
    """With a scale for the experts and another one for the rest, for every selection."""
    folders = pair_in(tmp_path, arch, form, dtype)
    model = load(folders[0])
    train_a_bit(model, 0.002)
    model.save_pretrained(tmp_path / "tuned")
    assert any(".experts.3." in name for name in tensors(tmp_path / "tuned"))
    for number, select in enumerate(SELECTIONS.values()):
        graft = open_graft(model, folders, select=select)
        live = {scale: dict(graft.grafted_tensors(scale)) for scale in (1.0, 0.3)}
        out = tmp_path / f"disk{number}"
        scale = "0.3" if select == SELECTIONS["router"] else r"0.3;\.experts\.=1"
        options = [
            f"--select={select if isinstance(select, str) else json.dumps(select)}",
            f"--scale={scale}",
            f"--out={out}",
        ]
        assert main(["graft", f"--base={folders[0]}", f"--tuned={tmp_path / 'tuned'}", f"--instruct={folders[1]}",
                     *options]) == 0  # fmt: skip
        disk, start = tensors(out), tensors(folders[1])
        assert disk.keys() == live[1.0].keys() == start.keys()
        changed = {name for name in disk if not torch.equal(disk[name], start[name])}
        assert any(".experts." in name for name in changed) is (select != SELECTIONS["router"])
        assert any(".gate." in name for name in changed) is (select in ("all", SELECTIONS["router"]))
        for name, tensor in disk.items():
            assert torch.equal(tensor, live[1.0 if ".experts." in name else 0.3][name]), name


ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "one kind of experts": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "everything": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 16},
    "patterns": {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": {"down_proj": 2},
                 "alpha_pattern": {"gate_up_proj": 32}},
    "gaussian": {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_exact(tmp_path, arch, kind):
    warnings.simplefilter("ignore")
    folders = pair_in(tmp_path, arch, "single")
    model = load(folders[0], LoraConfig(r=4, **ADAPTERS[kind]))
    train_a_bit(model, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    graft = open_graft(model, folders, select="all")
    expected, tuned = truth(folders, model, 0.5, graft.selected), logits(model)
    expected.set_experts_implementation("eager")  # the others know no float64
    with graft.applied(grafted(0.5)):
        got = logits(model)
    instruct = AutoModelForCausalLM.from_pretrained(folders[1])
    wanted = expected(IDS).logits
    require_same_logits(got, wanted, wanted - logits(instruct))
    adapted = {
        name for name, p in expected.named_parameters() if not torch.equal(p.float(), instruct.get_parameter(name))
    }
    assert any("experts" in name for name in adapted) is (kind != "attention")
    exported = dict(graft.grafted_tensors(0.5))
    export_folder(tmp_path / "out", folders[1], exported.items())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(reloaded.get_parameter(name), parameter, rtol=0, atol=1e-6)
    with graft.applied(INSTRUCT):
        assert torch.equal(logits(model), logits(instruct))
    assert torch.equal(logits(model), tuned)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_start_of_an_adapter_of_experts_is_pefts(tmp_path):
    """Spread of a gaussian start 1 / rank, not 1 / (rank * experts); the Base's own weights beneath, in float32."""
    folders = pair_in(tmp_path, "qwen3_moe", "single", torch.bfloat16)
    model = load(folders[0], LoraConfig(r=4, **ADAPTERS["gaussian"]))
    factors = [p for name, p in model.named_parameters() if "experts" in name and "lora_A" in name]
    assert torch.cat([p.flatten() for p in factors]).std().item() == pytest.approx(1 / 4, rel=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert open_graft(model, folders).on_base


@pytest.mark.parametrize("kind", ["attention", "experts"])
def test_an_exported_adapter_on_the_instruct_is_the_graft(tmp_path, kind):
    warnings.simplefilter("ignore")
    folders = pair_in(tmp_path, "qwen3_moe", "single")
    adapter = LoraConfig(r=4, **ADAPTERS[kind])
    model = load(folders[0], adapter)
    train_a_bit(model)
    graft = open_graft(model, folders)
    state = get_peft_model_state_dict(model, state_dict=graft.adapter_tensors(0.5))
    export_adapter(tmp_path / "adapter", ModelPair(*map(str, folders)), adapter, state)
    with graft.applied(grafted(0.5)):
        expected = logits(model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[1]), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(folders[1]))).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("arch", "form", "kind"),
    [
        ("qwen3_moe", "single", "experts"),
        ("qwen3_moe", "single", "one kind of experts"),
        ("qwen3_moe", "single", "rslora"),
        ("mixtral", "single", "patterns"),
        ("mixtral", "single", "everything"),
        ("mixtral", "fused", "everything"),
        ("mixtral", "base fused", "experts"),
        ("qwen3_moe", "instruct fused", "everything"),
    ],
)
def test_an_adapter_on_experts_is_grafted_on_disk_as_live(tmp_path, monkeypatch, arch, form, kind):
    warnings.simplefilter("ignore")
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 100)  # a few rows a part
    folders = pair_in(tmp_path, arch, form)
    model = load(folders[0], LoraConfig(r=4, **ADAPTERS[kind]))
    train_a_bit(model)
    model.save_pretrained(tmp_path / "adapter")
    live = dict(open_graft(model, folders, select="all").grafted_tensors(0.5))
    options = [f"--tuned={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}", "--scale=0.5", "--select=all"]
    assert main(["graft", f"--base={folders[0]}", f"--instruct={folders[1]}", *options]) == 0
    disk, start = tensors(tmp_path / "out"), tensors(folders[1])
    assert disk.keys() == live.keys()
    for name, tensor in disk.items():
        torch.testing.assert_close(tensor, live[name], rtol=0, atol=1e-6)
        if "down" in name or "w2" in name:
            assert (tensor - start[name]).abs().max() > 1e-4


def test_factors_of_experts_that_do_not_fit_the_base(tmp_path):
    base, _ = pair_in(tmp_path, "qwen3_moe", "single")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    stem = "base_model.model.model.layers.0.mlp.experts.lora_"
    for factors in ({"A": (8, 24), "B": (33, 8)}, {"A": (6, 24), "B": (32, 6)}, {"A": (8, 24), "B": (32, 6)}):
        found = {f"{stem}{letter}.weight": torch.randn(shape) for letter, shape in factors.items()}
        save_file(found, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(GraftError, match=r"adapts model\.layers\.0\.mlp\.experts by factors of the shapes"):
            open_update(CheckpointReader(base), tmp_path / "adapter")


@pytest.mark.parametrize("arch", MIXTURES)
def test_an_export_reloads_as_it_was_validated(tmp_path, arch):
    folders = pair_in(tmp_path, arch, "single")
    model = load(folders[0])
    train_a_bit(model)
    graft = open_graft(model, folders)
    with graft.applied(grafted(1.0)):
        validated = logits(model)
    export_folder(tmp_path / "out", folders[1], graft.grafted_tensors())
    assert torch.equal(reload_logits(tmp_path / "out", IDS, torch.ones_like(IDS)), validated)


@pytest.mark.parametrize("form", ["single", "fused"])
def test_a_delta_lies_as_the_files_do(tmp_path, form):
    folders = pair_in(tmp_path, "mixtral", form, torch.bfloat16)
    model = load(folders[0])
    train_a_bit(model)
    graft = open_graft(model, folders)
    write_delta(tmp_path / "delta", graft.delta_tensors(), torch.float32)
    delta, instruct = Delta.open(tmp_path / "delta"), CheckpointReader(folders[1])
    assert set(delta.shapes) == linear_on_disk(instruct.tensors)
    plan = DiskGraft(delta, instruct, Scale())
    export_folder(tmp_path / "out", folders[1], plan.tensors())
    written = tensors(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in graft.grafted_tensors())


def test_statistics_count_the_experts(tmp_path):
    folders = pair_in(tmp_path, "qwen3_moe", "single")
    model = load(folders[0])
    train_a_bit(model)
    graft = open_graft(model, folders)
    start = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float64)
    tuned = effective_weights(model)
    updates = [tuned[name] - start.get_parameter(name) for name in graft.selected]
    assert sum(name.split(".")[-2] == "experts" for name in graft.selected) == 4
    norm = torch.cat([update.flatten() for update in updates]).norm().item()
    assert graft.statistics()["delta_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_shard_reads_its_own_experts_and_no_others(tmp_path):
    base, instruct = pair_in(tmp_path, "qwen3_moe", "single")
    stored = CheckpointReader(base)
    sizes = []
    read, stored.read_into = stored.read_into, lambda *args: (sizes.append(len(args[0])), read(*args))
    model = AutoModelForCausalLM.from_pretrained(base)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    reader = in_layout_of_module(AlignedReader(stored, CheckpointReader(instruct)), shapes)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = model.get_parameter(name)
    for start, stop in ((0, 2), (2, 4), (3, 3)):
        sizes.clear()
        part = reader.read_slice(name, (slice(start, stop), slice(0, 48), slice(0, 32)))
        assert torch.equal(part, whole[start:stop])
        assert sum(sizes) == part.nbytes


# --- selection ---


def test_the_report_names_experts_and_routers_apart(tmp_path):
    folders = pair_in(tmp_path, "qwen3_moe", "single")
    model = load(folders[0])
    told = str(open_graft(model, folders).coverage)
    assert "of the mixtures of experts 4 of 4 tensors of experts, 0 of 2 of routers" in told
    assert "trained but left out: " in told and "gate (2)" in told
    assert "4 of 4 tensors of experts, 2 of 2 of routers" in str(open_graft(model, folders, select="all").coverage)
    instruct = CheckpointReader(folders[1])
    on_disk = DiskGraft(Delta.open(write_all(model, folders, tmp_path / "d")), instruct, Scale()).coverage
    assert "24 of 24 tensors of experts, 0 of 2 of routers" in str(on_disk)


def write_all(model, folders, target):
    return write_delta(target, open_graft(model, folders, select="all").delta_tensors())


@pytest.mark.parametrize("form", ["single", "fused"])
def test_patterns_mean_what_they_mean_for_the_files(tmp_path, form):
    folders = pair_in(tmp_path, "mixtral", form)
    model = load(folders[0])
    both = {f"model.layers.{i}.mlp.experts.{kind}" for i in range(2) for kind in ("gate_up_proj", "down_proj")}
    up = {name for name in both if "up" in name}

    def chosen(*patterns):
        return open_graft(model, folders, select=list(patterns)).selected

    assert chosen("experts") == both
    assert chosen(r"experts\.gate_up_proj") == up  # no name in single files, but a parameter's
    if form == "single":
        assert chosen("w1", "w3") == up
        assert chosen(r"\.w2\.") == both - up
        for torn in (["w1"], [r"experts\.(0|3)\."], ["w1", "w2"]):
            with pytest.raises(GraftError, match=r"some of the matrices that the module holds in .*Choose all"):
                chosen(*torn)
    else:
        with pytest.raises(GraftError, match=r"matched selection 'w1'"):
            chosen("w1")


def test_experts_that_the_instruct_lacks_are_an_error(tmp_path):
    base, _ = pair_in(tmp_path, "mixtral", "single")
    (tmp_path / "other").mkdir()
    dense, _ = save_pair(tmp_path / "other", "mistral", tied=False)
    with pytest.raises(GraftError, match=r"Instruct's checkpoint .* has no tensor .*experts\.gate_up_proj"):
        LiveGraft(load(base), AlignedReader.open(base, base), CheckpointReader(dense))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_from_weights_that_are_no_modules_are_refused(tmp_path, start):
    base, _ = pair_in(tmp_path, "qwen3_moe", "single")
    for options in ({"target_modules": "all-linear"}, ADAPTERS["experts"]):
        with pytest.raises(GraftError, match=r"experts are bare parameters\. Use plain LoRA"):
            load(base, LoraConfig(r=4, init_lora_weights=start, **options))


def test_single_experts_are_the_file_that_transformers_writes(tmp_path):
    for arch in MIXTURES:
        (tmp_path / arch).mkdir()
        base, instruct = pair_in(tmp_path / arch, arch, "instruct fused")
        readers = (CheckpointReader(folder) for folder in (base, instruct))
        single, cut = (in_layout_of_module(reader, single_experts(reader)) for reader in readers)
        assert single.tensors.keys() == CheckpointReader(base).tensors.keys()
        assert len(cut.tensors) == len(single.tensors)
        model = AutoModelForCausalLM.from_pretrained(instruct)
        gate, up = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[3].chunk(2)
        assert torch.equal(cut.read("model.layers.1.mlp.experts.3.gate_proj.weight"), gate)
        assert torch.equal(cut.read("model.layers.1.mlp.experts.3.up_proj.weight"), up)
        assert AutoConfig.from_pretrained(instruct).model_type == arch
