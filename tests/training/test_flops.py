"""Operations counted by hand, and by what torch itself counts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from shadowlit.training.flops import Work, count_pairs, peak_flops
from shadowlit.training.head import HeadLoss
from tests.tiny import make_config


def make_model(arch="llama", tied=True, adapter=None):
    torch.manual_seed(0)
    config = make_config(arch, tied=tied)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).train()
    return get_peft_model(model, LoraConfig(**adapter)) if adapter else model


# Of a layer of width 32 with 4 heads, 2 key-value heads and 64 in the middle.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
FACTORS = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))


@pytest.mark.parametrize("tied", [True, False])
def test_full_tuning_by_hand(tied):
    work = Work.of(make_model(tied=tied))
    assert work.per_token == 6 * 2 * LAYER
    assert work.per_supervised == 6 * 272 * 32
    assert work.attention == (12 * 4 * 8,) * 2 and work.windows == (None, None)


def test_an_adapter_by_hand():
    work = Work.of(make_model(adapter={"r": 4, "target_modules": "all-linear"}))
    assert work.per_token == 2 * (4 * LAYER + 6 * FACTORS)
    assert work.per_supervised == 4 * 272 * 32


@pytest.mark.parametrize("adapter", [None, {"r": 4, "target_modules": "all-linear"}])
def test_it_is_what_torch_counts(adapter):
    """With all pairs, as eager attention computes them; under an adapter nothing needs the first layer's gradient by
    its input, of three products with a weight and its lower factor.
    """
    model = make_model(adapter=adapter)
    ids = torch.arange(12)[None] + 20
    positions = torch.tensor([4, 5, 9])
    losses = HeadLoss(model, "recomputed")  # torch does not count the products that the chunks add in place
    with FlopCounterMode(display=False) as counter:
        losses.loss({"input_ids": ids}, positions, ids[0, positions + 1]).backward()
    tokens, _ = count_pairs({"input_ids": ids}, {None})
    ours = Work.of(model).flops(tokens.item(), 3, {None: 12 * 12})
    spared = 2 * 12 * (32 * 32 + 2 * 32 * 16 + 3 * 4 * 32) if adapter else 0
    assert counter.get_total_flops() == ours - spared


def test_pairs_of_padded_and_packed_rows():
    """Lengths 3 and 2: 6 + 3 pairs; with a window of 2, 5 + 3."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    tokens, pairs = count_pairs({"input_ids": mask, "attention_mask": mask}, {None, 2})
    assert (tokens.item(), pairs[None].item(), pairs[2].item()) == (5, 9, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    tokens, pairs = count_pairs({"input_ids": positions, "position_ids": positions}, {None, 2})
    assert (tokens.item(), pairs[None].item(), pairs[2].item()) == (5, 9, 8)


def test_sliding_windows_are_known_by_layer():
    assert set(Work.of(make_model("gemma3_text")).windows) <= {64, None}
    assert Work.of(make_model("qwen2")).windows == (None, None)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("Tesla T4", None)],
)  # fmt: skip
def test_peaks_of_known_devices(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
