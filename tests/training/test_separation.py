"""Models that keep packed samples apart are told from those that don't."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from shadowlit.errors import ShadowlitError
from shadowlit.training.separation import _influence, require_separation
from tests.tiny import ARCHITECTURES, make_config

SIZE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None}  # fmt: skip


def build(config, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_with_borders_is_accepted(arch, kernel, dtype):
    """In half precision too, where rounding is as large as a weak leak: the second sample doesn't move by a bit."""
    model = build(make_config(arch, tied=True), attn_implementation=kernel, dtype=dtype)
    before = torch.get_rng_state()
    require_separation(model)
    assert _influence(model, restart=True) == 0 < _influence(model, restart=False)
    assert torch.equal(before, torch.get_rng_state()) and model.training


def test_an_adapter_and_its_dropout_change_nothing():
    model = get_peft_model(
        build(make_config("llama", tied=True)), LoraConfig(lora_dropout=0.5, init_lora_weights=False)
    )
    require_separation(model)


def test_compiled_layers_are_asked_uncompiled():
    model = build(make_config("llama", tied=True))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    require_separation(model)
    assert not torch._dynamo.utils.counters["stats"]


LEAKING = {
    "falcon": {"alibi": True, "num_kv_heads": 2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}  # position biases and positions that come from the attention mask alone


@pytest.mark.parametrize("arch", LEAKING)
def test_attention_without_borders_is_refused(arch):
    model = build(AutoConfig.for_model(arch, **SIZE, **LEAKING[arch]), attn_implementation="eager")
    with pytest.raises(
        ShadowlitError,
        match=rf"in '{arch}' with attn_implementation='eager' a packed sample changes the logits of the next one by "
        r"\d+% of what.*expected 0 %.*Set data\.packing=null, and data\.group_by_length=true",
    ):
        require_separation(model)


RECURRENT = {
    "mamba": {"intermediate_size": 64, "state_size": 4},
    "lfm2": {"intermediate_size": 64, "num_key_value_heads": 2, "full_attn_idxs": [1]},
    "falcon_h1": {
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
}


@pytest.mark.parametrize("arch", RECURRENT)
def test_recurrent_and_convolutional_layers_are_refused(arch):
    model = build(AutoConfig.for_model(arch, **SIZE, **RECURRENT[arch]))
    with pytest.raises(ShadowlitError, match=rf"but '{arch}' has recurrent or convolutional layers, which carry"):
        require_separation(model)
    assert _influence(model, restart=True) > 0  # rightly so
