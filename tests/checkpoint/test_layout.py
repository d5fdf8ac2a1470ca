"""Checkpoints of one model under other names and in other layouts, against the equation and transformers' own forms."""

import copy
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from shadowlit.checkpoint import streaming
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.layout import LayoutReader, in_layout_of_module, repeats_embedding
from shadowlit.checkpoint.names import canonical_key
from shadowlit.cli.main import main
from shadowlit.delta.folders import base_of
from shadowlit.errors import CheckpointError, GraftError
from shadowlit.grafting.disk import linear_on_disk
from shadowlit.grafting.parameters import linear_names
from shadowlit.grafting.tuned import open_update
from tests.tiny import save_model, save_pair, store_head

SIDES = ("base", "tuned", "instruct")
MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
}


def in_layers(wrapper):
    return lambda name: re.sub(r"(layers\.\d+\.)", rf"\1{wrapper}.", name)


PREFIXES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled layers": in_layers("_orig_mod"),
    "DDP": lambda name: f"module.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + in_layers("_fsdp_wrapped_module")(name),
    "checkpointed": in_layers("_checkpoint_wrapped_module"),
    "peft": lambda name: f"base_model.model.{name}",
    "DDP, compiled, peft": lambda name: f"module._orig_mod.base_model.model.{name}",
    "multimodal": lambda name: name.replace("model.", "model.language_model.", 1),
    "older multimodal": lambda name: f"language_model.{name}",
    "body": lambda name: name.removeprefix("model."),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A few rows a part, so that every tensor comes in many."""
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 100)


def graft(root, out="out", **options):
    """Run the command on the three folders below ``root``."""
    given = [f"--{key}={value}" for key, value in options.items()]
    return main(["graft", *(f"--{side}={root / side}" for side in SIDES), f"--out={root / out}", *given])


def tensors(folder):
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def rewrite(folder, change):
    """Replace the tensors of a folder of one file by ``change`` of them."""
    found = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip


def rename(folder, spell):
    rewrite(folder, lambda found: {spell(name): tensor for name, tensor in found.items()})


def equation(base, tuned, instruct, name):
    """Instruct + (tuned - base) in float32, rounded once to the Instruct's dtype."""
    update = tuned[name].float() - base[name].float()
    return (instruct[name].float() + update).to(instruct[name].dtype)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Base and Instruct in bfloat16, tuned in float32, with heads of their own."""
    root = tmp_path_factory.mktemp("dense")
    base, _ = save_pair(root, "qwen3", tied=False, dtype=torch.bfloat16)
    save_model(root / "tuned", "qwen3", tied=False, near=base, seed=5, distance=0.02)
    return root


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spelling", PREFIXES)
def test_names_of_every_wrapper_on_every_side(tmp_path, dense, spelling, side):
    spell = PREFIXES[spelling]
    start, end, goal = (tensors(dense / who) for who in SIDES)
    shutil.copytree(dense, tmp_path, dirs_exist_ok=True)
    rename(tmp_path / side, spell)
    assert graft(tmp_path, select="all") == 0
    written = spell if side == "instruct" else str
    got = tensors(tmp_path / "out")
    assert got.keys() == {written(name) for name in goal}
    assert all(torch.equal(got[written(name)], equation(start, end, goal, name)) for name in goal)


def test_three_spellings_at_once_and_a_tower_that_only_the_instruct_has(tmp_path, dense):
    start, end, goal = (tensors(dense / who) for who in SIDES)
    shutil.copytree(dense, tmp_path, dirs_exist_ok=True)
    rename(tmp_path / "base", PREFIXES["older multimodal"])
    rename(tmp_path / "tuned", PREFIXES["DDP, compiled, peft"])
    spell, tower = PREFIXES["multimodal"], torch.randn(4, 4)
    rewrite(
        tmp_path / "instruct",
        lambda found: {**{spell(n): t for n, t in found.items()}, "model.visual.blocks.0.attn.qkv.weight": tower},
    )
    assert graft(tmp_path) == 0
    got = tensors(tmp_path / "out")
    assert torch.equal(got.pop("model.visual.blocks.0.attn.qkv.weight"), tower)
    linear = linear_on_disk(CheckpointReader(dense / "instruct").tensors)
    for name in goal:
        wanted = equation(start, end, goal, name) if name in linear else goal[name]
        assert torch.equal(got[spell(name)], wanted)


@pytest.mark.parametrize("side", SIDES)
def test_a_head_that_repeats_its_embedding_on_one_side(tmp_path, side):
    """The other sides are tied. transformers would untie a head that had kept its old values."""
    base, _ = save_pair(tmp_path, "qwen3")
    save_model(tmp_path / "tuned", "qwen3", near=base, seed=5, distance=0.02)
    start, end, goal = (tensors(tmp_path / who) for who in SIDES)
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path / side, lambda found: {**found, "lm_head.weight": found[embedding].clone()})
    assert graft(tmp_path, select="all") == 0
    got = tensors(tmp_path / "out")
    assert ("lm_head.weight" in got) == (side == "instruct")
    assert all(torch.equal(got[name], equation(start, end, goal, name)) for name in goal)
    assert torch.equal(got.get("lm_head.weight", got[embedding]), got[embedding])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_instructs_own_head_gets_the_update_of_a_tied_bases_embedding(tmp_path):
    """Which is the Base's head: head + (tuned's embedding - Base's embedding)."""
    base, _ = save_pair(tmp_path, "qwen3")
    save_model(tmp_path / "tuned", "qwen3", near=base, seed=5, distance=0.02)
    embedding = "model.embed_tokens.weight"
    head = torch.randn_like(tensors(base)[embedding])
    rewrite(tmp_path / "instruct", lambda found: {**found, "lm_head.weight": head})
    assert graft(tmp_path, select="all") == 0
    start, end = tensors(base)[embedding], tensors(tmp_path / "tuned")[embedding]
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], head + (end - start))


def test_heads_of_their_own_under_tied_configs(tmp_path):
    base, _ = save_pair(tmp_path, "qwen3")
    save_model(tmp_path / "tuned", "qwen3", near=base, seed=5, distance=0.02)
    for side in SIDES:
        store_head(tmp_path / side, own=True)
    start, end, goal = (tensors(tmp_path / who) for who in SIDES)
    assert graft(tmp_path, select="all") == 0
    got = tensors(tmp_path / "out")
    assert all(torch.equal(got[name], equation(start, end, goal, name)) for name in goal)
    assert not torch.equal(got["lm_head.weight"], goal["lm_head.weight"])
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "instruct/config.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, got["lm_head.weight"])


def test_a_missing_head_is_the_embedding_only_where_the_model_is_known_to_be_tied(tmp_path):
    reader = CheckpointReader(save_model(tmp_path / "model", tied=True))
    shapes = {name: info.shape for name, info in reader.tensors.items()}
    embedding = "model.embed_tokens.weight"
    shapes["lm_head.weight"] = shapes[embedding]
    assert "lm_head.weight" not in in_layout_of_module(reader, shapes).tensors
    reader.tied = True
    presented = in_layout_of_module(reader, shapes)
    assert presented.tied and torch.equal(presented.read("lm_head.weight"), reader.read(embedding))


def test_a_head_repeats_its_embedding_if_all_values_are_equal(tmp_path):
    """By torch.equal, as transformers compares the two when it loads them."""
    embedding = torch.randn(50, 4).bfloat16()
    embedding[0, 0] = 0.0
    minus, other = embedding.clone(), embedding.clone()
    minus[0, 0], other[-1, -1] = -0.0, 9.0
    cases = [(embedding, True), (minus, True), (embedding.float(), True), (other, False), (embedding[:-1], False)]
    for name in ("model.embed_tokens", "model.language_model.embed_tokens", "transformer.word_embeddings"):
        for head, expected in [*cases, (None, None)]:
            stored = {f"{name}.weight": embedding} | ({} if head is None else {"lm_head.weight": head.clone()})
            save_file(stored, tmp_path / "model.safetensors")
            assert repeats_embedding(CheckpointReader(tmp_path)) is expected


@pytest.mark.parametrize("side", SIDES)
def test_buffers_that_older_versions_stored(tmp_path, dense, side):
    shutil.copytree(dense, tmp_path, dirs_exist_ok=True)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0)}
    rewrite(tmp_path / side, lambda found: found | buffer)
    assert graft(tmp_path, select="all") == 0
    got = tensors(tmp_path / "out")
    start, end, goal = (tensors(dense / who) for who in SIDES)
    assert got.keys() == goal.keys() | (buffer.keys() if side == "instruct" else set())
    assert all(torch.equal(got[name], equation(start, end, goal, name)) for name in goal)


@pytest.mark.parametrize("side", ["base", "instruct"])
def test_an_adapter_on_a_base_under_other_names(tmp_path, side):
    base, instruct = save_pair(tmp_path, "qwen3", tied=False)
    # A pattern of a whole path: strengths go by the names that the adapter was trained under.
    config = LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=["lm_head"],
        alpha_pattern={"model.layers.1.self_attn.q_proj": 64},
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path / "tuned")
    merged = dict(copy.deepcopy(model).double().merge_and_unload().named_parameters())
    start, goal = tensors(base), tensors(instruct)
    spell = PREFIXES["multimodal"]
    rename(tmp_path / side, spell)
    assert graft(tmp_path, select="all") == 0
    got = tensors(tmp_path / "out")
    written = spell if side == "instruct" else str
    for name in goal:
        update = merged[name].detach() - start[name].double()
        torch.testing.assert_close(got[written(name)].double(), goal[name].double() + update, rtol=0, atol=1e-6)


# --- experts ---


def mixture(arch):
    return AutoConfig.for_model(
        arch, vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_experts_per_tok=2, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, **MIXTURES[arch],
    )  # fmt: skip


@pytest.fixture(scope="module", params=MIXTURES)
def moe(request, tmp_path_factory):
    """``root / side / form``, form is ``single`` (as transformers saves) or ``fused`` (as it holds them in memory).

    Also the config and the in-memory tensors of each side.
    """
    root, held = tmp_path_factory.mktemp(request.param), {}
    config = mixture(request.param)
    for seed, side in enumerate(SIDES):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
        model.to(torch.float32 if side == "tuned" else torch.bfloat16)
        held[side] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(root / side / "single")
        (root / side / "fused").mkdir()
        shutil.copy(root / side / "single" / "config.json", root / side / "fused")
        save_file(held[side], root / side / "fused" / "model.safetensors", {"format": "pt"})
        names = load_file(root / side / "single" / "model.safetensors")
        assert any(".experts.3." in name for name in names) and not any("gate_up_proj" in name for name in names)
        assert any(name.endswith(".experts.gate_up_proj") for name in held[side])
    return root, config, held


FORMS = ("single", "fused")


@pytest.mark.parametrize("forms", [(b, t, i) for b in FORMS for t in FORMS for i in FORMS])
def test_experts_in_every_layout_on_every_side(tmp_path, moe, forms):
    root, config, held = moe
    for side, form in zip(SIDES, forms, strict=True):
        (tmp_path / side).symlink_to(root / side / form)
    assert graft(tmp_path) == 0
    written = CheckpointReader(tmp_path / "out").tensors
    assert written.keys() == CheckpointReader(tmp_path / "instruct").tensors.keys()
    linear = re.compile(r"layers\.\d+\.(self_attn\.\w_proj\.weight|mlp\.experts\.\w+)$")
    wanted = {
        name: equation(held["base"], held["tuned"], held["instruct"], name) if linear.search(name) else tensor
        for name, tensor in held["instruct"].items()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    got = loaded.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    reference.load_state_dict(wanted)
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, reference(ids).logits)
    manifest = json.loads((tmp_path / "out" / "shadowlit.json").read_text())
    assert manifest["coverage"]["num_parameters"] == sum(tensor.numel() for tensor in wanted.values())


@pytest.mark.parametrize("source", FORMS)
def test_rows_of_experts_are_read_and_no_others(moe, source):
    root, _, _ = moe
    other = "single" if source == "fused" else "fused"
    stored, like = (CheckpointReader(root / "tuned" / form) for form in (source, other))
    reader, whole = LayoutReader(stored, like), tensors(root / "tuned" / other)
    assert reader.tensors.keys() == whole.keys()
    sizes = []
    read, stored.read_into = stored.read_into, lambda *args: (sizes.append(len(args[0])), read(*args))
    for name, tensor in whole.items():
        assert (reader.tensors[name].shape, reader.tensors[name].name) == (tensor.shape, name)
        for start, stop in ((0, 1), (1, 3), (2, len(tensor)), (1, 1)):
            sizes.clear()
            assert torch.equal(reader.read_slice(name, (slice(start, stop),)), tensor[start:stop])
            assert sum(sizes) == tensor[start:stop].nbytes
    assert reader.fingerprint() == like.fingerprint()


def test_linear_holds_the_experts_in_either_layout_and_no_router(moe):
    """On disk and in memory, where transformers 5 keeps them in bare parameters."""
    root, config, _ = moe
    single, fused = (linear_on_disk(CheckpointReader(root / "base" / form).tensors) for form in FORMS)
    attention = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"}
    assert fused == attention | {
        f"model.layers.{i}.mlp.experts.{kind}" for i in range(2) for kind in ("gate_up_proj", "down_proj")
    }
    assert attention < single and len(single) == len(attention) + 2 * 4 * 3
    assert not any(re.search(r"\.gate\.weight$", name) for name in single | fused)
    with torch.device("meta"):
        assert linear_names(AutoModelForCausalLM.from_config(config)) == fused


def test_an_adapter_on_single_experts_needs_a_base_with_single_experts(tmp_path, moe):
    root, _, held = moe
    inner = held["base"]["model.layers.0.mlp.experts.down_proj"].shape[2]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    module = "base_model.model.model.layers.0.mlp.experts.2.down_proj"
    factors = {f"{module}.lora_A.weight": torch.randn(2, inner), f"{module}.lora_B.weight": torch.randn(32, 2)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(GraftError, match=r"adapts .*experts\.2\.down_proj\.weight, which .* merge the adapter into it"):
        open_update(CheckpointReader(root / "base" / "fused"), tmp_path / "adapter")
    assert len(open_update(CheckpointReader(root / "base" / "single"), tmp_path / "adapter").shapes) == 1


# --- errors ---


def write(folder, **found):
    folder.mkdir()
    save_file({name.replace("__", "."): tensor for name, tensor in found.items()}, folder / "model.safetensors")
    return CheckpointReader(folder)


def numbered(numbers, kinds=("gate_proj", "up_proj", "down_proj"), dtype=torch.float32):
    return {
        f"layers__0__experts__{n}__{kind}__weight": torch.zeros((6, 4) if kind == "down_proj" else (4, 6), dtype=dtype)
        for n in numbers
        for kind in kinds
    }


def fused(up, down):
    return {"layers__0__experts__gate_up_proj": torch.zeros(up), "layers__0__experts__down_proj": torch.zeros(down)}


FUSED = fused((2, 8, 6), (2, 6, 4))


def test_two_names_of_one_tensor(tmp_path):
    both = write(tmp_path / "both", model__norm__weight=torch.ones(3), module__model__norm__weight=torch.ones(3))
    plain = write(tmp_path / "plain", model__norm__weight=torch.ones(3))
    for pair in ((both, plain), (plain, both)):
        with pytest.raises(CheckpointError, match=r"both holds model\.norm\.weight and module\.model\.norm\.weight"):
            LayoutReader(*pair)


@pytest.mark.parametrize(
    "name",
    ["q_proj.lora_A.default.weight", "q_proj.base_layer.weight", "modules_to_save.default.weight"],
)
def test_adapters_that_were_not_merged(tmp_path, name):
    left = write(tmp_path / "left", **{f"base_model.model.model.layers.0.{name}": torch.ones(3, 3)})
    plain = write(tmp_path / "plain", model__norm__weight=torch.ones(3))
    for pair in ((left, plain), (plain, left)):
        with pytest.raises(CheckpointError, match=r"left holds adapters next to .*merge_and_unload"):
            LayoutReader(*pair)


@pytest.mark.parametrize(
    "name",
    [
        "q_proj.weight_scale", "q_proj.weight_scale_inv", "q_proj.qweight", "q_proj.SCB", "q_proj.weight.absmax",
        "q_proj.weight.quant_state.bitsandbytes__nf4", "q_proj.weight_packed", "mlp.experts.gate_up_proj_blocks",
    ],
)  # fmt: skip
def test_quantised_weights(tmp_path, name):
    folder = tmp_path / "quantised"
    folder.mkdir()
    save_file({f"model.layers.0.{name}": torch.ones(3)}, folder / "model.safetensors")
    plain = write(tmp_path / "plain", model__norm__weight=torch.ones(3))
    for pair in ((CheckpointReader(folder), plain), (plain, CheckpointReader(folder))):
        with pytest.raises(CheckpointError, match=r"quantised holds quantised weights .*Give the model in bfloat16"):
            LayoutReader(*pair)


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (numbered([0, 2]), FUSED, CheckpointError, r"lacks down_proj of the experts 1 of layers\.0\.experts, which"),
        (FUSED, numbered([1]), CheckpointError, r"lacks down_proj of the experts 0 of"),
        (numbered([10**12]), FUSED, CheckpointError, r"experts 0, 1, 2, 3, 4 and 999999999995 more of"),
        (
            numbered([0, 1], ["gate_proj", "up_proj"]) | numbered([0], ["down_proj"]),
            FUSED,
            CheckpointError,
            r"lacks down_proj of the experts 1 of .* has experts 0 to 1\. Finish",
        ),
        (numbered([0, 1, 2]), FUSED, GraftError, "first has 3 experts in .*second has 2; expected equal"),
        (numbered([0, 1, 2]), numbered([0, 1]), GraftError, "first has 3 experts in .*second has 2"),
        (fused((2, 6, 8), (2, 4, 6)), numbered([0, 1]), GraftError, r"lie in gate_up_proj \[2, 6, 8\].*transposed"),
        (numbered([0, 1]), fused((2, 6, 8), (2, 4, 6)), GraftError, "lie in 2 single matrices in .*transposed"),
        (FUSED, fused((2, 6, 8), (2, 4, 6)), GraftError, r"and in gate_up_proj \[2, 6, 8\] and down_proj"),
        # Square: the shape of gate_up_proj alone wouldn't tell.
        (fused((2, 6, 6), (2, 6, 3)), fused((2, 6, 6), (2, 3, 6)), GraftError, "transposed, or in an unknown order"),
        (
            numbered([0]) | numbered([1], dtype=torch.bfloat16),
            FUSED,
            CheckpointError,
            r"experts of layers\.0\.experts in several dtypes or shapes",
        ),
    ],
)  # fmt: skip
def test_experts_that_can_not_be_brought_together(tmp_path, first, second, error, message):
    with pytest.raises(error, match=message):
        LayoutReader(write(tmp_path / "first", **first), write(tmp_path / "second", **second))


def test_transposed_experts_on_both_sides_stay_as_they_are(tmp_path):
    columns = {name: torch.randn(t.shape) for name, t in fused((2, 6, 8), (2, 4, 6)).items()}
    reader = LayoutReader(write(tmp_path / "a", **columns), write(tmp_path / "b", **columns))
    assert all(torch.equal(reader.read(name.replace("__", ".")), tensor) for name, tensor in columns.items())


def test_layouts_that_are_unknown_on_both_sides_are_refused(tmp_path):
    base = write(tmp_path / "base", model__layers__0__wqkv__weight=torch.ones(3, 3))
    instruct = write(tmp_path / "instruct", model__layers__0__q_proj__weight=torch.ones(3, 3))
    with pytest.raises(GraftError, match=r"base has .*wqkv\.weight, .*instruct has .*q_proj\.weight instead"):
        base_of(instruct, base)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("model.layers.1.block_sparse_moe.experts.7.w3.weight", "layers.1.mlp.experts.7.up_proj.weight"),
        ("model.layers.1.block_sparse_moe.gate.weight", "layers.1.mlp.gate.weight"),
        ("model.layers.0.mlp.shared_expert.w1.weight", "layers.0.mlp.shared_expert.w1.weight"),
        ("model.vision_tower.blocks.0.my_module.weight", "vision_tower.blocks.0.my_module.weight"),
    ],
)
def test_canonical_keys(name, key):
    assert canonical_key(name) == key
