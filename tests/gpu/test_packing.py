"""Packed rows on the device: attention by sample is attention under a mask, and no sample sees another."""

import pytest
import torch
import torch.nn.functional as F

from shadowlit.data.collate import PackCollate
from shadowlit.training.separation import _influence, require_separation
from shadowlit.training.varlen import NAME, borders_of, varlen_attention
from tests.data.test_packing import make_model
from tests.gpu.conftest import DEVICE, ON_CPU

LENGTHS = (130, 1, 64, 257, 3, 57)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_by_sample_is_attention_under_a_mask(dtype, window):
    """Output and gradients, two key heads for eight of queries, rounded no more than the masked kernel's own."""
    generator = torch.Generator().manual_seed(0)
    length = POSITIONS.shape[1]
    query = torch.randn(1, 8, length, 64, generator=generator)
    key, value = torch.randn(2, 1, 2, length, 64, generator=generator)
    weight = torch.randn(1, length, 8, 64, generator=generator)
    positions = POSITIONS.to(DEVICE)
    sample = (positions == 0).cumsum(1)
    places = torch.arange(length, device=DEVICE)
    behind = places[:, None] - places
    mask = ((sample[:, :, None] == sample[:, None]) & (behind >= 0) & (behind < (window or length)))[:, None]

    def outcome(attend, dtype):
        inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (query, key, value)]
        output = attend(*inputs)
        gradients = torch.autograd.grad((output.float() * weight.to(DEVICE)).sum(), inputs)
        return [output.detach().double(), *(g.double() for g in gradients)]

    def masked(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)

    def alone(q, k, v):
        borders = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in borders_of(POSITIONS).items()}
        return varlen_attention(torch.nn.Module(), q, k, v, None, sliding_window=window, **borders)[0]

    exact = outcome(masked, torch.float64)
    for expected, other, found in zip(exact, outcome(masked, dtype), outcome(alone, dtype), strict=True):
        assert (found - expected).norm() <= 1.5 * (other - expected).norm() + 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("kernel", [NAME, "sdpa", "eager"])
def test_no_sample_moves_the_next_by_a_bit(arch, kernel, dtype):
    model = make_model(arch, kernel).to(DEVICE, dtype)
    require_separation(model)
    assert _influence(model, restart=True) == 0 < _influence(model, restart=False)


def test_compiled_layers_take_rows_of_any_length():
    """Compiled for one length, then for all: no third time."""
    model = make_model("qwen3", NAME).to(DEVICE, torch.bfloat16)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager" if ON_CPU else "inductor")
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    counts = []
    for lengths in ((40, 24), (30, 20, 11), (17, 50), (9, 8, 7, 60, 3)):
        rows = [torch.randint(1, 256, (n,), generator=generator).tolist() for n in lengths]
        samples = [{"input_ids": row, "labels": row} for row in rows]
        batch = PackCollate(0, flatten=True)(samples)
        batch |= borders_of(batch["position_ids"])
        batch = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels")
        F.cross_entropy(model(**batch, use_cache=False).logits[0, :-1].float(), labels[0, 1:]).backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[1] == counts[2] == counts[3], counts
    torch._dynamo.reset()
