"""Derivatives by scales against finite differences, in float64, and what the pass leaves behind: nothing."""

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shadowlit.data.collate import Collate
from shadowlit.delta.delta import Delta
from shadowlit.errors import GraftError
from shadowlit.grafting.parameters import host_parameters
from shadowlit.grafting.scales import FitScales, Keep
from shadowlit.training.fit_scales import Calibration, MemoryScaledGraft, fit_scales
from shadowlit.training.gradients import deterministic, gradients_of
from shadowlit.training.head import HeadLoss
from tests.synthetic import random_samples
from tests.tiny import save_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3", tied=False)


def load(folders):
    """The Instruct in float64, in its norms too, which transformers computes in float32."""
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(norm, module)
    return model


def norm(module, x):
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def update_of(model, only="proj"):
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in host_parameters(model).items()
        if only in name
    }


def rows(count, seed):
    """Rows of unequal lengths, cut at their padding."""
    found = []
    for sample in random_samples(count, seed):
        used = int(sample["attention_mask"].sum())
        found.append({name: sample[name][:used].tolist() for name in ("input_ids", "labels")})
    return found


def mean_loss(model, samples):
    total, count = 0.0, 0
    with torch.no_grad():
        for one in samples:
            logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0]
            labels = torch.tensor(one["labels"])[1:]
            chosen = labels != -100
            total -= logits[:-1].log_softmax(-1)[chosen].gather(1, labels[chosen][:, None]).sum().item()
            count += int(chosen.sum())
    return total / count


def mean_kl(model, other, samples):
    total, count = 0.0, 0
    with torch.no_grad():
        for one in samples:
            ids, chosen = torch.tensor([one["input_ids"]]), torch.tensor(one["labels"])[1:] != -100
            p, r = (m(input_ids=ids).logits[0, :-1][chosen].log_softmax(-1) for m in (model, other))
            total += (p.exp() * (p - r)).sum().item()
            count += int(chosen.sum())
    return total / count


@pytest.mark.parametrize("groups", ["layer", "kind", "tensor", "all"])
def test_slopes_are_those_of_finite_differences(folders, groups):
    """Of the loss by hand, with every tensor set to W_I + λ Δ by hand; float64."""
    model, instruct, hand = load(folders), load(folders), load(folders)
    update = update_of(model)
    options = FitScales("", groups=groups, keep=Keep("", 0.7), batch_size=2)
    task, neutral = rows(5, 1), rows(3, 2)
    host = MemoryScaledGraft(model, update)

    batches = [[Collate(0)(part[i : i + 2]) for i in range(0, len(part), 2)] for part in (task, neutral)]
    measure = Calibration(host, options, *batches, HeadLoss(model), move=dict)
    by_group = {group: 0.8 + 0.05 * n for n, group in enumerate(dict.fromkeys(measure._groups.values()))}
    found = measure(by_group)

    def by_hand(scales):
        hand.load_state_dict(instruct.state_dict())
        with torch.no_grad():
            for name, p in host_parameters(hand).items():
                if name in update:
                    p += scales[measure._groups[name]] * update[name]
        return mean_loss(hand, task), mean_kl(hand, instruct, neutral)

    loss, kl = by_hand(by_group)
    assert found.loss == pytest.approx(loss, rel=1e-10)
    assert found.kl == pytest.approx(kl, rel=1e-8)
    assert found.slopes.keys() == by_group.keys()
    step = 1e-5
    for group in list(by_group)[:4] + list(by_group)[-1:]:
        ends = [by_hand({**by_group, group: by_group[group] + sign * step}) for sign in (1, -1)]
        slope = sum(w * (ends[0][i] - ends[1][i]) / (2 * step) for i, w in ((0, 1.0), (1, 0.7)))
        assert found.slopes[group] == pytest.approx(slope, rel=1e-6, abs=1e-10), group


def test_the_best_scale_of_a_useless_update_is_low(folders):
    """A random update hurts: every scale falls, the loss too, and the model has the Instruct's weights afterwards."""
    model = load(folders)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    update = Delta.of(update_of(model))
    fitted = fit_scales(model, update, rows(6, 1), FitScales("", groups="kind", steps=6, pull=0.0, batch_size=4))
    losses = [entry["loss"] for entry in fitted.history]
    assert min(losses) == losses[fitted.step] < losses[0]
    assert fitted.by_tensor.keys() == update.shapes.keys()
    after = dict(model.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert model.training is False and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_updates_must_be_of_the_model(folders):
    model = load(folders)
    name = next(iter(update_of(model)))
    with pytest.raises(GraftError, match=r"has .*q_proj.*expected parameters of Qwen3ForCausalLM"):
        fit_scales(model, {name: torch.zeros(2, 2)}, rows(2, 1), FitScales(""))
    with pytest.raises(GraftError, match="keep has rows without a weight"):
        fit_scales(model, {}, rows(2, 1), FitScales(""), keep=rows(1, 2))


# -- the gradients --------------------------------------------------------------------------------------------------


def loss_of(model, samples):
    batch = Collate(0)(samples)
    return model(**batch).loss


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_a_backward_pass(folders, recomputed):
    """Of parameters that are frozen too, and of no other; one at a time, and none is left."""
    model = load(folders)
    samples = rows(3, 1)
    loss_of(model, samples).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.lm_head.weight.grad = kept = torch.ones_like(model.lm_head.weight)
    chosen = {name: p for name, p in host_parameters(model).items() if "layers.1" in name}
    seen = {}

    def take(name, gradient):
        assert not torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
        seen[name] = gradient.clone()

    with gradients_of(model, chosen, take):
        assert not model.lm_head.training and not model.lm_head.weight.requires_grad
        loss_of(model, samples).backward()
    assert seen.keys() == chosen.keys() != set()
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert model.lm_head.weight.grad is kept
    loss_of(model, samples).backward()  # the hooks are gone
    assert len(seen) == len(chosen)


@pytest.mark.parametrize(("arch", "options"), [
    ("opt", {"dropout": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 16}), ("falcon", {"hidden_dropout": 0.5}),
    ("gpt_neox", {"hidden_dropout": 0.5}),
])  # fmt: skip
def test_layers_with_dropout_of_their_own_are_deterministic_too(arch, options):
    config = AutoConfig.for_model(
        arch, vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.activation_checkpointing_enable({"use_reentrant": False})
    tokens = {"input_ids": torch.arange(8)[None], "use_cache": False}
    expected = model.eval()(**tokens).logits
    model.train()
    assert not torch.equal(model(**tokens).logits, expected)
    with deterministic(model):
        assert torch.equal(model(**tokens).logits, expected)
    assert all(module.training for module in model.modules())


def test_an_exception_leaves_nothing(folders):
    model = load(folders)
    model.model.requires_grad_(False)
    parameters = host_parameters(model)

    def fail(name, gradient):
        raise KeyError(name)

    with pytest.raises(KeyError), gradients_of(model, parameters, fail):
        loss_of(model, rows(2, 1)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_callers_autocast_sees_the_weights_of_each_pass(folders):
    """Its cache holds casts of parameters until its context ends, and would keep those of the first pass."""
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    update = {name: 5 * delta.float() for name, delta in update_of(model).items()}
    options = FitScales("", groups="kind", steps=8, pull=0.0, keep=Keep(""))
    with torch.autocast("cpu", torch.bfloat16):
        found = fit_scales(model, update, rows(4, 1), options, rows(2, 2))
        host = MemoryScaledGraft(model, update)
        with host.scaled(found.by_tensor):
            torch.clear_autocast_cache()
            loss = mean_loss(model, rows(4, 1))
    assert found.step > 0 and found.history[found.step]["loss"] == pytest.approx(loss, rel=2e-3)
    assert found.history[0]["loss"] - loss > 0.02 and found.history[0]["kl"] > 0.01
