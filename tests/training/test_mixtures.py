"""Mixtures of experts in training: the ways through the experts, padding and packing, the loss, the operations."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig

from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.training.flops import Work
from shadowlit.training.head import HeadLoss
from shadowlit.training.loading import load_for_training
from shadowlit.training.objective import supervised_positions
from shadowlit.training.separation import require_separation
from tests.synthetic import random_samples
from tests.tiny import MIXTURES, save_model

WAYS = ["eager", "batched_mm", "grouped_mm"]


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp(request.param), request.param, tied=False)


def build(folder, adapter=None, way=None, **changes):
    return load_for_training(
        AlignedReader.open(folder, folder), AutoConfig.from_pretrained(folder, **changes), adapter=adapter,
        device=torch.device("cpu"), mesh=None, parallelize=lambda model: None, experts_implementation=way,
    )  # fmt: skip


def padded(samples):
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def packed(samples):
    lengths = [int(sample["attention_mask"].sum()) for sample in samples]
    row = {
        name: torch.cat([sample[name][:n] for sample, n in zip(samples, lengths, strict=True)])[None]
        for name in ("input_ids", "labels")
    }
    return row | {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def losses_of(model, batch):
    positions = supervised_positions(batch["labels"], batch.get("position_ids"))
    targets = batch["labels"].flatten()[positions + 1]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return HeadLoss(model).token_losses(inputs, positions, targets)[0], inputs, positions, targets


def gradients_of(model, batch):
    _, inputs, positions, targets = losses_of(model, batch)
    loss = HeadLoss(model).loss(inputs, positions, targets)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


ADAPTERS = {
    "full": None,
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_implementation_of_the_experts_has_the_same_gradients(folder, kind):
    batch, found = padded(random_samples(4, seed=0)), {}
    for way in WAYS:
        options = ADAPTERS[kind]
        model = build(folder, None if options is None else LoraConfig(r=4, init_lora_weights=False, **options), way)
        assert model.config._experts_implementation == way
        found[way] = gradients_of(model, batch)
    loss, gradients = found["eager"]
    assert any("experts" in name for name in gradients)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for way in WAYS[1:]:
        assert found[way][0] == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[way][1][name], gradient, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("way", WAYS)
def test_padded_and_packed_is_separate(folder, way):
    """Experts see single tokens: what stands beside a sample changes none of its losses."""
    model, samples = build(folder, way=way).eval(), random_samples(4, seed=2)
    require_separation(model)
    alone = torch.cat([losses_of(model, packed([sample]))[0] for sample in samples])
    for batch in (padded(samples), packed(samples)):
        torch.testing.assert_close(losses_of(model, batch)[0], alone, rtol=0, atol=1e-5)


def test_the_routers_auxiliary_loss_is_no_part_of_the_loss(folder, caplog):
    """Also where the model's config asks for it; said when the model is loaded."""
    batch, losses = padded(random_samples(4, seed=0)), {}
    for asked in (False, True):
        with caplog.at_level(logging.INFO, "shadowlit.training.loading"):
            model = build(folder, output_router_logits=asked, router_aux_loss_coef=10.0)
        losses[asked] = gradients_of(model, batch)
        assert ("auxiliary loss; it is not part of the loss here" in caplog.text) is asked
    assert losses[True][0] == losses[False][0]
    assert all(torch.equal(losses[True][1][name], gradient) for name, gradient in losses[False][1].items())


def test_operations_are_those_of_the_chosen_experts(tmp_path):
    """Two of four experts, by hand: hidden 32, 4 heads and 2 key-value heads of 8, experts of 24, rank 4."""
    folder = save_model(tmp_path, "qwen3_moe", tied=False)
    attention, router, experts = 2 * 32 * 32 + 2 * 16 * 32, 4 * 32, 2 * (3 * 32 * 24)
    assert Work.of(build(folder)).per_token == 6 * 2 * (attention + router + experts)
    assert Work.of(build(folder)).per_supervised == 6 * 272 * 32
    adapted = build(folder, LoraConfig(r=4, **ADAPTERS["experts"]))
    factors = 4 * (32 + 32) + 2 * 4 * ((32 + 48) + (24 + 32))
    assert Work.of(adapted).per_token == 2 * (4 * (attention + router + experts) + 6 * factors)
