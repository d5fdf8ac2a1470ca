"""Where what a training starts from comes from."""

import pytest
import torch
from peft import LoraConfig

from shadowlit.training.loading import _adapter_start


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("name", ["q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight",
                                  "embed_tokens.lora_embedding_B.default"])  # fmt: skip
def test_factors_start_alike_on_every_device(name, start):
    """Lightning configures the model under its device's context, where tensors are made on that device."""
    parameter, adapter = torch.empty(4, 8), LoraConfig(init_lora_weights=start)
    expected = _adapter_start(name, parameter, adapter, seed=0, rank=4)
    with torch.device("meta"):  # stands for any other device
        found = _adapter_start(name, parameter, adapter, seed=0, rank=4)
    assert found.device.type == "cpu" and torch.equal(found, expected)
