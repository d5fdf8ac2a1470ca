import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint.names import canonical_name
from shadowlit.errors import GraftError
from shadowlit.grafting.parameters import host_parameters, linear_names
from shadowlit.grafting.selection import coverage, resolve
from tests.tiny import ARCHITECTURES, make_config

NAMES = ["model.embed.weight", "model.layers.0.wqkv.weight", "model.layers.0.norm.weight"]
LINEAR = frozenset({"model.layers.0.wqkv.weight"})


def test_linear_all_and_patterns():
    assert resolve("linear", NAMES, LINEAR, "x") == LINEAR
    assert resolve("all", NAMES, LINEAR, "x") == frozenset(NAMES)
    assert resolve("norm|embed", NAMES, LINEAR, "x") == {NAMES[0], NAMES[2]}
    assert resolve(["wqkv", r"norm\.weight$"], NAMES, LINEAR, "x") == {NAMES[1], NAMES[2]}


def test_a_selection_without_a_match_names_what_there_is():
    with pytest.raises(GraftError, match=r"0 of 3 tensors matched selection 'q_proj'.*'internlm2'.*embed, wqkv, norm"):
        resolve("q_proj", NAMES, LINEAR, "internlm2")
    with pytest.raises(GraftError, match="0 of 3 tensors matched selection 'linear'"):
        resolve("linear", NAMES, frozenset(), "x")
    with pytest.raises(GraftError, match="0 of 3"):  # one of two patterns is dead: almost surely a typo
        resolve(["wqkv", "q_porj"], NAMES, LINEAR, "x")
    with pytest.raises(GraftError, match="0 of 3"):
        resolve([], NAMES, LINEAR, "x")


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(GraftError, match=r"'\(q_proj'.*not a regular expression.*Expected 'linear'"):
        resolve("(q_proj", NAMES, LINEAR, "x")


def test_coverage_counts_and_names_what_is_left_out():
    report = coverage(LINEAR, frozenset(NAMES), {NAMES[0]: 1_000_000, NAMES[1]: 500_000, NAMES[2]: 10})
    assert report.left_out == (NAMES[0], NAMES[2])
    assert str(report) == "1 of 3 tensors, 500.00 k of 1.50 M parameters; trained but left out: embed, norm"


@pytest.mark.parametrize(
    ("wrapped", "stored"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("model.layers.3._orig_mod.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.layers.3._checkpoint_wrapped_module.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
    ],
)
def test_canonical_name(wrapped, stored):
    assert canonical_name(wrapped) == stored


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("adapted", [False, True])
def test_linear_is_every_linear_layer_but_the_head(arch, adapted):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(arch, tied=False))
        plain = set(dict(model.named_parameters()))
        if adapted:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), low_cpu_mem_usage=True)
    chosen = linear_names(model)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert chosen == {name for name in plain if name.split(".")[-2] in projections}
    assert set(host_parameters(model)) == plain
