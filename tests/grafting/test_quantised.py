"""A Base in 4 bits: what it computes, and grafts that are exact on the Instruct's own weights."""

import copy
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.errors import GraftError
from shadowlit.grafting import live
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.quantised import FourBitLinear, quantised_layers
from shadowlit.grafting.subject import BASE, INSTRUCT, Subject
from shadowlit.pair.check import check_pair
from shadowlit.pair.pair import ModelPair
from shadowlit.training import quantisation
from shadowlit.training.loading import load_for_training
from shadowlit.training.module import ShadowModule
from shadowlit.training.quantisation import require_quantisable
from tests.grafting.test_live import IDS, logits, train_a_bit
from tests.tiny import save_pair

needs_package = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
GRAFTED, GRAFTED_4BIT = Subject("grafted", 0.5), Subject("grafted_4bit", 0.5)


def load(folder, **adapter):
    adapter = LoraConfig(**{"r": 4, "target_modules": "all-linear", **adapter})
    return load_for_training(
        AlignedReader.open(folder, folder), AutoConfig.from_pretrained(folder), adapter=adapter,
        device=torch.device("cpu"), mesh=None, parallelize=lambda model: None, four_bits=True,
    )  # fmt: skip


def open_graft(model, folders, **options):
    return LiveGraft(model, AlignedReader.open(*folders), CheckpointReader(folders[1]), **options)


def served_in_4_bits(folder):
    """A model as transformers loads it with QLoRA's usual settings.

    On CPUs with bfloat16 instructions, inference has a kernel of its own, which rounds otherwise; it is switched off.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=config, device_map="cpu")
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def dense(model):
    """The same model with ordinary linear layers, which hold the dequantised weights."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, FourBitLinear):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight = torch.nn.Parameter(layer.dequantised(), requires_grad=False)
                plain.bias = layer.bias
                setattr(parent, name, plain)
    return twin


@pytest.fixture
def folders(tmp_path):
    return save_pair(tmp_path, "qwen2", tied=False, dtype=torch.bfloat16, hidden=64)  # with biases


@needs_package
def test_the_base_is_what_transformers_computes_in_4_bits(folders):
    model = load(folders[0])
    assert torch.equal(logits(model), logits(served_in_4_bits(folders[0])))
    assert quantised_layers(model).keys() == {
        f"model.layers.{i}.{name}.weight"
        for i in range(2)
        for name in (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
    }


@needs_package
@pytest.mark.parametrize("installed", [True, False])
def test_a_quantised_base_is_one_error(folders, tmp_path, monkeypatch, installed):
    """As transformers saves it, whose tensors have other names and shapes; with and without the package."""
    quantised = shutil.copytree(folders[0], tmp_path / "quantised")
    served_in_4_bits(folders[0]).save_pretrained(quantised)
    if not installed:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for pair, who in (((quantised, folders[1]), "base"), ((folders[0], quantised), "instruct")):
        errors = [one for one in check_pair(ModelPair(*map(str, pair))) if one.severity == "error"]
        assert [one.subject for one in errors] == [f"{who} quantised"]
        assert "quantization_config (bitsandbytes)" in errors[0].found
        assert f"set pair.{who} to the unquantised original" in errors[0].remedy


@needs_package
def test_a_weight_takes_four_bits_and_an_eighth():
    layer = FourBitLinear(torch.nn.Linear(256, 256))
    table = layer.scales_table
    held = [layer.weight, *(b for b in layer.buffers() if b is not table)]
    num_bytes = sum(t.numel() * t.element_size() for t in held)
    assert num_bytes == 256 * 256 * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 4  # and the mean scale


@needs_package
def test_gradients_are_those_of_the_dequantised_weights(folders):
    model = load(folders[0], bias="all")
    train_a_bit(model)
    model, twin = model.float(), dense(model).float()
    for one in (model, twin):
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
    expected = dict(twin.named_parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("q_proj.base_layer.bias" in name for name in gradients)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name].grad), name


@needs_package
@pytest.mark.parametrize("offload", [False, True])
def test_the_graft_is_exact_on_the_instructs_own_weights(folders, offload, tmp_path):
    model = load(folders[0], bias="lora_only")
    train_a_bit(model)
    tuned, stored = logits(model), {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    graft = open_graft(model, folders, select="all", offload=offload)
    squares = {}
    with graft.applied(GRAFTED, squares):
        validated = logits(model)
        with graft.applied(GRAFTED_4BIT):
            in_4_bits = logits(model)
        with graft.applied(INSTRUCT):
            assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folders[1], dtype="auto")))
        with graft.applied(BASE):
            assert torch.equal(logits(model), logits(served_in_4_bits(folders[0])))
        assert torch.equal(logits(model), validated)
    assert torch.equal(logits(model), tuned)
    assert all(torch.equal(t, stored[n]) for n, t in [*model.named_parameters(), *model.named_buffers()])
    assert graft.statistics(0.5, squares) == graft.statistics(0.5)

    exported = dict(graft.grafted_tensors(0.5))
    instruct = AutoModelForCausalLM.from_pretrained(folders[1], dtype="auto")
    for prefix, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            name = prefix.removeprefix("base_model.model.") + ".weight"
            a, b = (f["default"].weight.double() for f in (layer.lora_A, layer.lora_B))
            exact = instruct.get_parameter(name).double() + 0.5 * layer.scaling["default"] * b @ a
            # Rounded once to bfloat16, which has 8 bits; before it, six roundings of numbers below 1 to 24 bits.
            assert ((exported[name].double() - exact).abs() <= exact.abs() * 2**-8 + 6 * 2**-24).all(), name
    assert exported.keys() == instruct.state_dict().keys()
    instruct.load_state_dict(exported)
    assert torch.equal(logits(instruct), validated)
    instruct.save_pretrained(tmp_path / "exported")
    assert torch.equal(logits(served_in_4_bits(tmp_path / "exported")), in_4_bits)
    assert not torch.equal(in_4_bits, validated)
    with CheckpointReader(tmp_path / "exported") as files, graft.loaded(files):
        assert torch.equal(logits(model), validated)
    assert torch.equal(logits(model), tuned)


@needs_package
def test_an_interrupt_leaves_the_stored_weights(folders, monkeypatch):
    model = load(folders[0])
    train_a_bit(model)
    tuned, graft, calls = logits(model), open_graft(model, folders), iter([None] * 5)

    def interrupted(weight):
        if next(calls, 1):
            raise KeyboardInterrupt
        return weight

    monkeypatch.setattr(live, "four_bits", interrupted)
    with pytest.raises(KeyboardInterrupt), graft.applied(GRAFTED_4BIT):
        raise AssertionError("all layers were swapped")
    assert torch.equal(logits(model), tuned)


@needs_package
def test_another_base_in_4_bits_is_an_error(folders):
    with pytest.raises(GraftError, match=r"weight is frozen in the trained module, but is not the Base's"):
        open_graft(load(folders[1]), folders)


@pytest.mark.parametrize(("adapter", "compiled", "reason"), [
    (None, False, "in full tuning, but weights in 4 bits can't be trained. Set model.adapter"),
    ({"use_dora": True}, False, "adapter.use_dora=True, which needs or trains whole weights. Use LoRA"),
    ({"init_lora_weights": "pissa"}, False, "adapter.init_lora_weights='pissa', which needs"),
    ({"target_parameters": ["experts.down_proj"]}, False, "adapter.target_parameters"),
    ({"modules_to_save": ["lm_head"]}, False, "adapter.modules_to_save=['lm_head']"),
    ({}, True, "model.compile_layers=true"),
    ({}, False, "Run 'pip install bitsandbytes'"),
])  # fmt: skip
def test_what_can_not_be_trained_in_4_bits_is_refused_with_the_cure(adapter, compiled, reason, monkeypatch):
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    with pytest.raises(GraftError) as error:
        require_quantisable(None if adapter is None else LoraConfig(**adapter), compiled)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_full_tuning_in_4_bits_is_refused_before_anything_is_read():
    with pytest.raises(GraftError, match="full tuning"):
        ShadowModule(ModelPair("no/base", "no/instruct"), quantization="nf4")


def test_experts_are_refused(tmp_path):
    with pytest.raises(GraftError, match=r"the experts of this model are bare parameters \(model\.layers\.0\.mlp"):
        load(save_pair(tmp_path, "qwen3_moe")[0])
