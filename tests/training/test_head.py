"""Losses past the logits: the same numbers and gradients as through them, and never where that isn't proven."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from shadowlit.errors import ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training.head import HeadLoss, understand
from shadowlit.training.linear_loss import (
    cross_entropies,
    linear_cross_entropy_sum,
    linear_token_losses,
    recomputed_cross_entropy_sum,
    recomputed_token_losses,
)
from shadowlit.training.metrics import TokenScores
from shadowlit.training.module import ShadowModule
from shadowlit.training.objective import sum_tokens, supervised_positions, token_sums
from shadowlit.training.outputs import Outputs
from tests.distributed import run_ranks
from tests.rounding import require_same_update
from tests.synthetic import RandomData, random_samples
from tests.tiny import ARCHITECTURES, make_config, save_pair

# Beyond those of the other tests: what scales and caps its logits, and a head with a bias.
FINISHED = {
    "gemma2": ({"final_logit_softcapping": 30.0, "head_dim": 8, "query_pre_attn_scalar": 8}, (1.0, 30.0)),
    "cohere": ({"logit_scale": 0.0625}, (0.0625, None)),
    "granite": ({"logits_scaling": 8.0}, (0.125, None)),
    "phi": ({}, (1.0, None)),
}


def make_model(arch, tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    if arch in FINISHED:
        config = AutoConfig.for_model(
            arch, vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, attn_implementation="eager", **FINISHED[arch][0],
        )  # fmt: skip
    else:
        config = make_config(arch, tied=tied)
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def make_batch():
    samples = random_samples(3, seed=1)
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


def loss_and_gradients(model, way, batch=None, factors=None):
    batch = batch or make_batch()
    model.zero_grad()
    losses = HeadLoss(model, way)
    inputs = {name: value for name, value in batch.items() if name not in ("labels",)}
    positions = supervised_positions(batch["labels"])
    targets = batch["labels"].flatten()[positions + 1]
    loss = losses.loss(inputs, positions, targets, factors)
    (loss * 3).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return losses.way, loss.detach(), gradients, losses.token_losses(inputs, positions, targets)


def assert_same(one, other, rtol):
    _, loss, gradients, (losses, correct) = one
    torch.testing.assert_close(loss, other[1], rtol=rtol, atol=0, check_dtype=False)
    assert gradients.keys() == other[2].keys() and gradients
    largest = max(gradient.abs().max().item() for gradient in other[2].values())
    for name, gradient in other[2].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=rtol * largest, check_dtype=False)
    torch.testing.assert_close(losses, other[3][0], rtol=rtol, atol=rtol, check_dtype=False)
    assert torch.equal(correct, other[3][1])


# -- the function -------------------------------------------------------------------------------------------------


def make_inputs(dtype=torch.float64, tokens=13, width=7, vocabulary=31):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, vocabulary, (tokens,))


def plain(hidden, weight, bias, targets, scale=1.0, cap=None, factors=1.0):
    logits = scale * F.linear(hidden, weight, bias)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return (factors * F.cross_entropy(logits, targets, reduction="none")).sum()


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (2.0, 1.5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_are_the_whole(chunk_size, scale, cap, with_bias):
    """To float64's last digits, for the loss and each gradient, weighed or not."""
    hidden, weight, bias, targets = make_inputs()
    bias = bias if with_bias else None
    wanted = [hidden, weight] + ([bias] if with_bias else [])
    options = {"bias": bias, "scale": scale, "cap": cap, "chunk_size": chunk_size}
    for factors in (torch.linspace(0.01, 9, len(targets), dtype=torch.float64), None):
        expected = plain(hidden, weight, bias, targets, scale, cap, 1.0 if factors is None else factors)
        loss = linear_cross_entropy_sum(hidden, weight, targets, factors=factors, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        gradients = torch.autograd.grad(loss * 0.7, wanted)
        for own, whole in zip(gradients, torch.autograd.grad(expected * 0.7, wanted), strict=True):
            torch.testing.assert_close(own, whole, rtol=1e-12, atol=1e-12)
    losses, correct = linear_token_losses(
        hidden, weight, targets, bias=bias, scale=scale, cap=cap, chunk_size=chunk_size
    )
    torch.testing.assert_close(losses.sum(), expected.detach(), rtol=1e-13, atol=0)
    assert torch.equal(correct, F.linear(hidden, weight, bias).argmax(-1) == targets)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_recomputed_chunks_are_the_whole(chunk_size):
    hidden, weight, bias, targets = make_inputs()
    loss = recomputed_cross_entropy_sum(lambda x: F.linear(x, weight, bias), hidden, targets, chunk_size)
    expected = plain(hidden, weight, bias, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    wanted = (hidden, weight, bias)
    for own, whole in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [4, 13, 100])
def test_tokens_of_recomputed_chunks_may_weigh_differently(chunk_size):
    """What a preference makes of an answer's tokens: each with a factor of its own."""
    hidden, weight, bias, targets = make_inputs()
    factors = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    losses = recomputed_token_losses(lambda x: F.linear(x, weight, bias), hidden, targets, chunk_size)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
    wanted = (hidden, weight, bias)
    own = torch.autograd.grad((losses * factors).sum(), wanted)
    for found, whole in zip(own, torch.autograd.grad((expected * factors).sum(), wanted), strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "cohere", "granite", "phi"])
def test_token_log_probs_are_those_of_the_whole_logits(arch):
    """Heads with a scale, a cap or a bias; in training and without a gradient."""
    model, batch = make_model(arch), make_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    positions = supervised_positions(batch["labels"])
    targets = batch["labels"].flatten()[positions + 1]
    found = {}
    for way in ("auto", "logits"):
        model.zero_grad()
        losses = HeadLoss(model, way)
        logps = -losses.map_logits(inputs, positions, targets, cross_entropies)
        (logps * torch.linspace(0, 1, len(targets))).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            assert torch.equal(-losses.map_logits(inputs, positions, targets, cross_entropies), logps)
        found[way] = logps.detach(), gradients
    torch.testing.assert_close(found["auto"][0], found["logits"][0], rtol=1e-5, atol=1e-6)
    assert found["auto"][1].keys() == found["logits"][1].keys()
    for name, gradient in found["logits"][1].items():
        torch.testing.assert_close(found["auto"][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_the_slope():
    """Against finite differences, not against another gradient."""
    hidden, weight, bias, targets = make_inputs()
    options = {"bias": bias, "scale": 0.5, "cap": 2.0, "chunk_size": 5}
    for tensor, gradient in zip(
        (hidden, weight, bias),
        torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, targets, **options), (hidden, weight, bias)),
        strict=True,
    ):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                tensor += step * direction
                ends.append(linear_cross_entropy_sum(hidden, weight, targets, **options))
            tensor += 1e-6 * direction
        assert ((ends[0] - ends[1]) / 2e-6).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-7)


def test_what_is_frozen_gets_no_gradient():
    hidden, weight, bias, targets = make_inputs()
    weight.requires_grad_(False)
    linear_cross_entropy_sum(hidden, weight, targets, bias=bias, chunk_size=4).backward()
    assert weight.grad is None and hidden.grad is not None and bias.grad is not None


def test_no_supervised_token_gives_gradients_of_zero():
    hidden, weight, bias, _ = make_inputs(tokens=0)
    loss = linear_cross_entropy_sum(hidden, weight, torch.empty(0, dtype=torch.int64), bias=bias)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == hidden.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and torch.equal(bias.grad, torch.zeros_like(bias))
    assert [len(part) for part in linear_token_losses(hidden, weight, torch.empty(0, dtype=torch.int64))] == [0, 0]


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, targets = make_inputs()
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed by an earlier backward pass"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest new tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def test_memory_does_not_grow_with_vocabulary_times_tokens():
    hidden, weight, _, targets = make_inputs(torch.float32, tokens=400, width=8, vocabulary=500)
    with Largest() as ours:
        linear_cross_entropy_sum(hidden, weight, targets, chunk_size=16).backward()
        linear_token_losses(hidden, weight, targets, chunk_size=16)
        recomputed_token_losses(lambda x: F.linear(x, weight), hidden, targets, 16).sum().backward()
    with Largest() as whole:
        plain(hidden, weight, None, targets).backward()
    assert (ours.elements, whole.elements) == (16 * 500, 400 * 500)


def test_bfloat16_products_and_a_float32_softmax():
    """Under autocast: as near to float32 as the plain way, with gradients in the dtype of the masters."""
    hidden, weight, _, targets = make_inputs(torch.float32, tokens=64, width=32, vocabulary=300)
    exact = torch.autograd.grad(plain(hidden, weight, None, targets), (hidden, weight))
    errors = []
    for chunked in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if chunked:
                loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_size=10)
            else:
                loss = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert [g.dtype for g in gradients] == [torch.float32] * 2
        errors.append([(g - e).norm() / e.norm() for g, e in zip(gradients, exact, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert 1e-4 < ours < 1.2 * theirs


# -- the models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, *FINISHED])
def test_every_way_gives_the_loss_and_all_gradients_of_whole_logits(arch, tied):
    model = make_model(arch, tied and arch != "phi", torch.float64)
    expected = loss_and_gradients(model, "logits")
    chunked = loss_and_gradients(model, "auto")
    assert chunked[0] == "chunked"
    assert_same(chunked, expected, rtol=1e-12)
    assert_same(loss_and_gradients(model, "recomputed"), expected, rtol=1e-12)
    assert_same(loss_and_gradients(model.float(), "auto"), expected, rtol=2e-5)


@pytest.mark.parametrize("arch", FINISHED)
def test_scale_and_cap_are_read_and_proven(arch):
    head, why = understand(make_model(arch))
    assert (head.scale, head.cap) == FINISHED[arch][1], why
    assert (head.module.bias is not None) == (arch == "phi")


class Sharper(Qwen3ForCausalLM):
    """Does to its logits what no config tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


class Shifted(Qwen3ForCausalLM):
    """Gives its head something else than the decoder's output."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


@pytest.mark.parametrize(
    ("cls", "reason"), [(Sharper, "changes its logits"), (Shifted, "something other than its decoder's last")]
)
def test_what_is_not_proven_goes_through_its_own_logits(cls, reason):
    torch.manual_seed(0)
    model = cls(make_config("qwen3", tied=False)).train()
    way, loss, *_ = loss_and_gradients(model, "auto")
    assert way == "logits"
    batch = make_batch()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, own.detach())
    with pytest.raises(ShadowlitError, match=f"model.head_loss is 'chunked', but {cls.__name__} .*{reason}.*Use auto"):
        HeadLoss(model, "chunked")


def test_the_proof_leaves_no_trace():
    model = make_model("qwen3")
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert understand(model)[0] is not None
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head._forward_hooks and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"], "bias": "all"},
    ],
)
def test_an_adapted_head_is_recomputed(adapter):
    """Whatever peft did to the head, all trained gradients are those of whole logits."""
    model = get_peft_model(make_model("qwen2"), LoraConfig(r=4, init_lora_weights=False, **adapter)).double()
    expected = loss_and_gradients(model, "logits")
    ours = loss_and_gradients(model, "auto")
    adapted = "lm_head" in adapter["target_modules"] or "modules_to_save" in adapter
    assert ours[0] == ("recomputed" if adapted else "chunked")
    assert_same(ours, expected, rtol=1e-12)
    if adapted:
        with pytest.raises(ShadowlitError, match=r"needs an nn\.Linear as output head"):
            HeadLoss(model, "chunked")


@pytest.mark.parametrize("arch", ["qwen3", "gemma2"])
def test_every_way_weighs_the_tokens(arch):
    """Also where the model itself scales or caps its logits; torch's own function is not called, which is reported."""
    model = make_model(arch, dtype=torch.float64)
    factors = torch.linspace(0.01, 9, int((make_batch()["labels"][:, 1:] != -100).sum()))
    expected = loss_and_gradients(model, "logits", factors=factors)
    assert not torch.isclose(expected[1], loss_and_gradients(model, "logits")[1], rtol=0.1)
    ways = ["chunked", "recomputed", *(["torch"] if arch == "qwen3" and hasattr(F, "linear_cross_entropy") else [])]
    for way in ways:
        told = (
            pytest.warns(UserWarning, match="'torch', which doesn't support weights")
            if way == "torch"
            else nullcontext()
        )
        with told:
            found = loss_and_gradients(model, way, factors=factors)
        assert found[0] == way
        assert_same(found, expected, rtol=1e-12)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
def test_torchs_own_chunks():
    model = make_model("qwen3", tied=True)
    assert_same(loss_and_gradients(model, "torch"), loss_and_gradients(model, "auto"), rtol=1e-5)
    with pytest.raises(ShadowlitError, match="can't scale or cap logits as this model does"):
        HeadLoss(make_model("gemma2"), "torch")


def test_liger_needs_a_gpu():
    with pytest.raises(ShadowlitError, match="needs the package liger-kernel and a model on a GPU"):
        HeadLoss(make_model("qwen3"), "liger")


# -- packed rows and sums -----------------------------------------------------------------------------------------


def test_the_first_token_of_a_packed_conversation_is_not_predicted_from_the_one_before():
    labels = torch.tensor([[7, 7, -100, 7, 7, 7]])
    assert supervised_positions(labels).tolist() == [0, 2, 3, 4]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert supervised_positions(labels, positions).tolist() == [0, 3, 4]


def test_packed_sums_are_those_of_the_conversations():
    """Of three conversations in two rows one is wrong, one unsupervised."""
    torch.manual_seed(0)
    logits = torch.zeros(2, 5, 4)
    logits[..., 1] = 2.0
    labels = torch.tensor([[-100, 1, 1, -100, 2], [-100, -100, -100, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    packed = token_sums(logits, labels, positions)
    assert [getattr(packed, f"num_{what}").item() for what in ("tokens", "correct", "samples", "exact")] == [5, 4, 3, 2]
    whole = token_sums(logits, labels)
    assert [getattr(whole, f"num_{what}").item() for what in ("tokens", "correct", "samples", "exact")] == [5, 4, 2, 1]
    assert packed.loss.item() == whole.loss.item()


def test_scores_count_every_supervised_token_once():
    model, batch = make_model("qwen3"), make_batch()
    weights = torch.rand(batch["labels"].shape)
    plain, weighed = (Outputs(HeadLoss(model), one) for one in (batch, {**batch, "loss_weights": weights}))
    for name, value in vars(plain.token_sums()).items():
        assert torch.equal(getattr(weighed.token_sums(), name), value)
    assert not torch.isclose(weighed.loss(), plain.loss(), rtol=0.1)


# -- in the module ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen2", tied=False)


def run(folders, cls=ShadowModule, strategy="auto", world_size=1, **options):
    seed_everything(0)
    module = cls(ModelPair(*map(str, folders)), lr=1e-3, **options)
    if strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, inference_mode=False,
        num_sanity_val_steps=0, max_epochs=1, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, RandomData())
    return module, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("way", ["auto", "recomputed"])
def test_a_run_is_the_run_through_whole_logits(folders, way):
    start = dict(AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).named_parameters())
    plain_module, plain_metrics = run(folders, head_loss="logits")
    module, metrics = run(folders, head_loss=way)
    assert metrics == pytest.approx(plain_metrics, rel=2e-4, abs=1e-5)
    weights = [dict(one.model.named_parameters()) for one in (module, plain_module)]
    require_same_update(*weights, start)


class Plain(TokenScores):
    """Overrides update, as metrics of logits do."""

    def update(self, logits, labels):
        assert logits.shape == (*labels.shape, 272)
        super().update(logits, labels)


class WithLogits(ShadowModule):
    def configure_scores(self):
        return Plain()


def test_a_metric_of_logits_gets_them(folders):
    metrics = run(folders)[1]
    assert run(folders, WithLogits)[1] == pytest.approx(metrics, rel=1e-5)
    assert "val/tuned/left/loss" in metrics


class Counting(ShadowModule):
    passes = 0

    def validation_step(self, *args):
        before = self.model.lm_head.weight.shape  # the module is built

        def count(*_):
            Counting.passes += 1

        assert before
        hook = self.model.model.norm.register_forward_hook(count)
        super().validation_step(*args)
        hook.remove()


def test_several_sets_share_one_forward_pass(folders):
    Counting.passes = 0
    run(folders, Counting)
    assert Counting.passes == 4 + 2  # 8 and 4 rows, two to a batch


def test_scores_read_in_between_forget_nothing():
    scores = TokenScores()
    sums = sum_tokens(torch.tensor([1.0]), torch.tensor([True]), torch.tensor([0]), torch.tensor([[-100, 5]]))
    scores.add(sums)
    assert scores.compute()["loss"] == 1.0
    scores.add(sum_tokens(torch.tensor([2.0]), torch.tensor([True]), torch.tensor([0]), torch.tensor([[-100, 5]])))
    assert scores.compute()["loss"] == 1.5


def adapted_head(folders, strategy, world_size):
    options = {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    module, metrics = run(folders, ShadowModule, strategy, world_size, adapter=LoraConfig(r=4, **options))
    return module._head_loss.way, metrics


def test_an_adapted_head_under_fsdp(folders):
    """The recomputed head finds its gathered weight in the backward pass too."""
    (one,) = run_ranks(adapted_head, 1, folders, "auto", 1)
    for rank in run_ranks(adapted_head, 2, folders, "fsdp2", 2):
        assert rank[0] == one[0] == "recomputed"
        assert rank[1] == pytest.approx(one[1], rel=2e-4, abs=1e-5)


def test_the_first_token_of_a_packed_sample_is_not_predicted():
    """It would be predicted by the last token of the sample before it, whatever its label says."""
    labels, positions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]])
    assert supervised_positions(labels).tolist() == [0, 1, 2]
    assert supervised_positions(labels, positions).tolist() == [0, 2]
