"""The training steps: one loss whatever the batching, masters in float32, exact resume."""

import json
import math
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PromptTuningConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.module import ShadowData
from shadowlit.errors import GraftError, ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training.metrics import TokenScores
from shadowlit.training.module import ShadowModule
from shadowlit.training.objective import token_sums
from shadowlit.training.objectives import SFT, Objective, TokenObjective
from shadowlit.training.parallel import parallelize
from shadowlit.training.schedules import rate
from tests.distributed import Forked
from tests.rounding import require_same_update
from tests.synthetic import RandomData, StreamedData, random_samples
from tests.tiny import ARCHITECTURES, make_config, save_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, instruct = save_pair(tmp_path_factory.mktemp("pair"), "qwen3", dtype=torch.bfloat16)
    return ModelPair(str(base), str(instruct))


def train(module, data=None, ckpt_path=None, callbacks=(), **options):
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=bool(callbacks), enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0, callbacks=list(callbacks),
        **{"max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(module, data or RandomData(), ckpt_path=ckpt_path)
    return trainer


def parameters(module):
    return torch.cat([p.detach().float().flatten() for p in module.model.parameters()])


# -- the objective ------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    """Two positions are supervised; uniform logits over 4 tokens cost log 4, and a margin of log 3 costs log 2."""
    logits = torch.zeros(1, 4, 4)
    logits[0, 1, 2] = math.log(3)  # predicts position 2: probability 3/6 for token 2
    sums = token_sums(logits, torch.tensor([[-100, 3, 2, -100]]))
    assert sums.num_tokens == 2
    assert sums.loss.item() == pytest.approx(math.log(4) + math.log(2))


def test_the_first_label_has_no_prediction_and_the_last_logits_no_label():
    sums = token_sums(torch.randn(1, 3, 5), torch.tensor([[4, -100, -100]]))
    assert (sums.loss.item(), sums.num_tokens.item()) == (0.0, 0)


def test_token_sums_by_hand():
    logits = torch.zeros(3, 3, 2)
    logits[:, :, 1] = 1.0  # token 1 is always the most probable
    labels = torch.tensor([[-100, 1, 1], [-100, 1, 0], [-100, -100, -100]])
    sums = token_sums(logits, labels)
    assert (sums.num_tokens, sums.num_correct, sums.num_samples, sums.num_exact) == (4, 3, 2, 1)


def test_the_first_token_of_every_answer_is_scored_apart():
    """A row of two answers, a packed row of two conversations, and plain text, whose first token has no prediction."""
    logits = torch.zeros(1, 7, 4)
    logits[0, 1, 3], logits[0, 4, 1] = math.log(3), math.log(5)  # of token 3 at position 2, and of token 1 at 5
    labels = torch.tensor([[-100, -100, 3, 2, -100, 1, 1]])
    expected = [math.log(6 / 3), math.log(8 / 5)]  # 3/(3+3), 5/(5+3)
    sums = token_sums(logits, labels)
    assert sums.num_answers == 2 and sums.first_loss.item() == pytest.approx(sum(expected))
    packed = torch.tensor([[-100, -100, 3, 2, 0, 1, 1]])  # the second conversation is text: [0, 1, 1]
    sums = token_sums(logits, packed, torch.tensor([[0, 1, 2, 3, 0, 1, 2]]))
    assert sums.num_answers == 2 and sums.first_loss.item() == pytest.approx(sum(expected))
    scores = TokenScores()
    scores.update(logits, labels)
    scores.update(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]))
    assert scores.compute()["first_token_loss"] == pytest.approx((sum(expected) + math.log(4)) / 3)
    assert math.isnan(TokenScores().compute()["first_token_loss"])


def test_scores_are_no_mean_of_means():
    scores = TokenScores()
    logits = torch.zeros(1, 5, 4)
    logits[0, 0, 1] = 50.0
    scores.update(logits, torch.tensor([[-100, 1, -100, -100, -100]]))  # one token, loss 0
    scores.update(torch.zeros(1, 5, 4), torch.tensor([[-100, 1, 2, 3, 2]]))  # four tokens, loss log 4 each
    assert scores.compute()["loss"] == pytest.approx(4 * math.log(4) / 5)
    assert scores.compute()["perplexity"] == pytest.approx(4 ** (4 / 5))
    assert scores.compute()["sequence_accuracy"] == 0.5
    assert math.isnan(TokenScores().compute()["loss"])


# -- batching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_accumulated_is_the_whole_batch(pair, kind):
    """1 × 8, 4 × 2 and 8 × 1 samples of unequal lengths: the gradient and loss of one batch."""
    results = {}
    for batch_size, accumulate in ((8, 1), (2, 4), (1, 8)):
        module = ShadowModule(pair, LoraConfig(r=4, bias="all") if kind == "lora" else None, lr=1e-3, warmup_ratio=0)
        trainer = train(module, RandomData(8, batch_size), accumulate_grad_batches=accumulate)
        results[batch_size] = parameters(module), trainer.callback_metrics["train/loss"].item()
    start = ShadowModule(pair, module.adapter, lr=1e-3)
    before = initial(start)
    assert (results[8][0] - before).abs().max() > 5e-4
    for batch_size in (1, 2):
        require_same_update({"": results[batch_size][0]}, {"": results[8][0]}, {"": before})
        assert results[batch_size][1] == pytest.approx(results[8][1], rel=1e-6)


def initial(module):
    trainer = train(module, max_steps=0)
    del trainer
    return parameters(module)


def cross_entropy(logits, labels):
    """Summed over the supervised tokens, and their number."""
    logprobs, targets = logits[:, :-1].log_softmax(-1), labels[:, 1:]
    chosen = logprobs.gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
    return -chosen.sum(), torch.tensor(len(chosen))


def test_the_logged_loss_is_that_of_the_whole_effective_batch(pair):
    module = ShadowModule(pair)
    trainer = train(module, RandomData(4, 1), accumulate_grad_batches=4)
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    loss, tokens = 0.0, 0
    for sample in random_samples(4, 0):
        batch = {name: value[None] for name, value in sample.items()}
        logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
        own, number = cross_entropy(logits, batch["labels"])
        loss, tokens = loss + own.item(), tokens + number.item()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss / tokens, rel=1e-6)
    assert trainer.callback_metrics["train/tokens"].item() == tokens


class Steps(Callback):
    """Collects the loss and the norm of the gradient of every optimizer step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.found):
            norm = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
            self.found.append((float(trainer.callback_metrics["train/loss"]), float(norm)))


@pytest.mark.parametrize("anchors", [None, {"instruct": 0.25}])
def test_an_epoch_begins_without_what_the_data_did_not_fill(pair, tmp_path, anchors):
    """Six micro-batches of eight that are expected: four make a step, and the next epoch repeats it."""
    steps, options = Steps(), {"lr": 1e-12, "warmup_ratio": 0, "schedule": "constant", "anchors": anchors}
    with pytest.warns(match=r"after 6 micro-batches.*although 8.*last 2 are not.*trainer.limit_train_batches=6"):
        train(
            ShadowModule(pair, **options), StreamedData(6, 1), callbacks=[steps, GraftCallback()], max_epochs=2,
            limit_train_batches=8, accumulate_grad_batches=4, default_root_dir=tmp_path,
        )  # fmt: skip
    first, second = steps.found
    assert second == pytest.approx(first, rel=1e-6)


def test_rates_follow_no_number_of_steps_that_is_unknown(pair):
    """Lightning says -1 for data without a length, after which a cosine would be at its end."""
    with pytest.raises(ShadowlitError, match=r"max_epochs is 2.*the training data have no length.*trainer.max_steps"):
        train(ShadowModule(pair), StreamedData(), max_epochs=2)
    train(ShadowModule(pair, schedule="constant", warmup_ratio=0), StreamedData(4), max_epochs=1)
    trainer = train(ShadowModule(pair), StreamedData(4), max_epochs=2, max_steps=3)
    assert trainer.callback_metrics["train/lr"] > 0


class Weighed(RandomData):
    """Three samples of which each has a weight, and a fourth without any: 1."""

    weights = (0.5, 2.0, 0.0, 1.0)

    def _loader(self, count, seed):
        samples = random_samples(4, seed)[: self.num_train]
        for sample, weight in zip(samples, self.weights, strict=False):
            sample["loss_weights"] = torch.full(sample["labels"].shape, weight)
        return DataLoader(samples, batch_size=self.batch_size)


class Focal(TokenObjective):
    def token_losses(self, logits, targets):
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (1 - torch.exp(-losses)) ** 2 * losses


@pytest.mark.parametrize(("objective", "scale"), [(SFT, 1.0), (SFT, 1e-3), (Focal, 1.0)])
def test_weights_are_those_of_the_equation(pair, objective, scale):
    """``Σ w loss / Σ w`` in float64, of four samples in as many micro-batches, and so the gradient."""
    data = Weighed(4, 1)
    data.weights = [scale * weight for weight in Weighed.weights]
    module = ShadowModule(pair, objective=objective())
    trainer = train(module, data, accumulate_grad_batches=4)
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float64)
    total, divisor, tokens = 0.0, 0.0, 0
    for sample, weight in zip(random_samples(4, 0), data.weights, strict=True):
        logits = model(input_ids=sample["input_ids"][None], attention_mask=sample["attention_mask"][None]).logits[0]
        chosen = sample["labels"][1:] != -100
        logprobs = logits[:-1][chosen].log_softmax(-1).gather(1, sample["labels"][1:][chosen, None])[:, 0]
        losses = -logprobs * (1 if objective is SFT else (1 - logprobs.exp()) ** 2)
        total, divisor = total + weight * losses.sum(), divisor + weight * len(losses)
        tokens += len(losses)
    loss = total / divisor
    loss.backward()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert trainer.callback_metrics["train/tokens"].item() == tokens
    gradients = dict(model.named_parameters())
    for name, parameter in module.model.named_parameters():
        expected = gradients[name].grad
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


class Heedless(Objective):
    def step(self, outputs):
        return {"loss": outputs.loss(), "count": len(outputs.targets)}


def test_an_objective_that_ignores_weights_is_refused(pair):
    train(ShadowModule(pair, objective=Heedless()), max_steps=1)
    with pytest.raises(ShadowlitError, match=r"with a weight, but model\.objective is .*Heedless.*total_weight\(\)"):
        train(ShadowModule(pair, objective=Heedless()), Weighed(4, 1))


def test_clipping_sees_the_mean_gradient(pair):
    """A bound far above the mean gradient's norm, but below the sum's, changes nothing."""
    free, bound = (ShadowModule(pair, lr=1e-3) for _ in range(2))
    train(free)
    train(bound, gradient_clip_val=30.0)
    assert torch.equal(parameters(free), parameters(bound))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_packed_row_is_its_conversations(tmp_path, arch):
    """Two conversations in one row, told apart by their positions alone: the logits of each by itself."""
    base, instruct = save_pair(tmp_path, arch)
    module = ShadowModule(ModelPair(str(base), str(instruct)))
    train(module, max_steps=0)
    left, right = (s["input_ids"][None, :length] for s, length in zip(random_samples(2, 0), (9, 12), strict=True))
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    with torch.no_grad():
        packed = module({"input_ids": torch.cat([left, right], 1), "position_ids": positions})
        apart = [module({"input_ids": row, "attention_mask": torch.ones_like(row)}) for row in (left, right)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=0, atol=2**-18 * packed.abs().max().item())


# -- precision and adapters ---------------------------------------------------------------------------------------


def test_what_learns_is_float32_and_what_is_frozen_is_so_where_float32_is_computed(pair):
    full, lora, mixed = ShadowModule(pair), ShadowModule(pair, LoraConfig(r=2)), ShadowModule(pair, LoraConfig(r=2))
    train(full, max_steps=1)
    train(lora, max_steps=1)
    train(mixed, max_steps=1, precision="bf16-mixed")
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert {p.dtype for p in lora.model.parameters()} == {torch.float32}
    assert {p.dtype for p in mixed.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in mixed.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    adapted = {n.split(".")[-4] for n, _ in lora.model.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_bf16_mixed_computes_in_bfloat16_and_keeps_the_masters(pair):
    module = ShadowModule(pair, lr=1e-3)
    trainer = train(module, precision="bf16-mixed")
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    assert math.isfinite(trainer.callback_metrics["train/loss"].item())


@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_cpu_without_kernels_for_bfloat16_is_named_before_the_first_step(pair, monkeypatch, recwarn, has_kernels):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_kernels)
    train(ShadowModule(pair), max_steps=1)
    assert not [w for w in recwarn if "no kernels" in str(w.message)]
    train(ShadowModule(pair), max_steps=1, precision="bf16-mixed")
    told = [str(w.message) for w in recwarn if "no kernels" in str(w.message)]
    assert len(told) == (not has_kernels)
    assert has_kernels or ("bfloat16" in told[0] and "trainer.precision to 32-true" in told[0])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_are_refused_with_the_reason(pair, precision):
    with pytest.raises(ShadowlitError, match=f"trainer.precision is '{precision}'; expected '32-true' or 'bf16-mixed'"):
        train(ShadowModule(pair), precision=precision)


def test_an_adapter_that_can_not_be_grafted_is_refused_at_once(pair):
    with pytest.raises(GraftError, match="use_qalora"):
        ShadowModule(pair, LoraConfig(use_qalora=True))
    with pytest.raises(GraftError, match=r"PromptTuningConfig.*adds to the prompt"):
        ShadowModule(pair, PromptTuningConfig())


@pytest.mark.parametrize(("options", "message"), [({"lr": 0}, "model.lr is 0"), ({"warmup_ratio": 3}, "warmup_ratio")])
def test_values_out_of_range(pair, options, message):
    with pytest.raises(ShadowlitError, match=message):
        ShadowModule(pair, **options)


@pytest.mark.parametrize("adapter", [None, {"r": 4, "lora_dropout": 0.1}])
def test_activation_checkpointing_changes_no_bit(pair, adapter):
    runs = []
    for checkpointing in (False, True, "none", "full", "selective"):
        module = ShadowModule(pair, adapter and LoraConfig(**adapter), lr=1e-3, activation_checkpointing=checkpointing)
        train(module, max_steps=3)
        runs.append(parameters(module))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


class Operations(TorchDispatchMode):
    """Counts products of matrices and forward passes of attention."""

    def __init__(self):
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function == torch.ops.aten.mm.default
        self.attentions += "attention" in str(function) and "backward" not in str(function)
        return function(*args, **(kwargs or {}))


def test_what_checkpointing_computes_again():
    """Of the seven products and one attention of each of two layers: all but the last one, or what widens."""
    counts = {}
    for kind in ("none", "full", "selective"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config("qwen3", tied=True)).train()
        parallelize(model, None, activation_checkpointing=kind)
        with Operations() as counted:
            model(input_ids=torch.arange(12)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
        counts[kind] = counted.products, counted.attentions
    products, attentions = counts["none"]
    assert attentions == 2
    assert counts["full"] == (products + 2 * 6, 4)
    assert counts["selective"] == (products + 2 * 2, 2)


def test_schedule():
    rates = [rate(step, total=10, warmup=2, schedule="cosine") for step in range(11)]
    assert rates[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert rates[6] == pytest.approx(0.5) and rates[10] == pytest.approx(0)
    assert rate(6, total=10, warmup=2, schedule="linear") == pytest.approx(0.5)
    assert rate(9, total=10, warmup=2, schedule="constant") == 1.0


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_an_adapters_checkpoint_holds_the_factors_only(pair, tmp_path):
    train(ShadowModule(pair, LoraConfig(r=2)), callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fit_or_die(pair, data, root, kind, kill_at):
    """Train from the last checkpoint, if there is one; leave weights, moments and metrics in ``end.pt``."""
    seed_everything(0)
    torch.set_num_threads(1)
    adapter = LoraConfig(r=4, lora_dropout=0.2) if kind == "lora" else None
    module = ShadowModule(pair, adapter, lr=1e-2 if adapter else 1e-3)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_progress_bar=False, val_check_interval=4,
        enable_model_summary=False, use_distributed_sampler=False, accumulate_grad_batches=2, gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        callbacks=[GraftCallback(), Kill(kill_at), ModelCheckpoint(root, save_last=True, every_n_train_steps=1)],
    )  # fmt: skip
    last = root / "last.ckpt"
    samples = ShadowData(pair, train=str(data), validation=str(data), batch_size=2, max_length=64)
    trainer.fit(module, samples, ckpt_path=last if last.exists() else None)
    moments = [s["exp_avg"] for s in trainer.optimizers[0].state.values()]
    metrics = {k: v for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k}
    torch.save([list(module.model.parameters()), moments, metrics], root / "end.pt")


def run_killable(pair, data, root, kind, kill_at):
    root.mkdir(exist_ok=True)
    log = root / "log.txt"
    return Forked(fit_or_die, pair, data, root, kind, kill_at, out=log).wait(180), log.read_text()


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(pair, tmp_path, kind):
    """SIGKILL in the second of three epochs, between two checkpoints; with dropout and a grafted validation."""
    data = tmp_path / "data.jsonl"
    rows = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "x" * (i % 5 + 1)}]
            for i in range(18)]  # fmt: skip
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    for root, kill_at, expected in (("whole", -1, 0), ("killed", 7, -signal.SIGKILL), ("killed", -1, 0)):
        status, log = run_killable(pair, data, tmp_path / root, kind, kill_at)
        assert status == expected, log
    ends = [torch.load(tmp_path / run / "end.pt", weights_only=False) for run in ("whole", "killed")]
    for left, right in zip(ends[0][0] + ends[0][1], ends[1][0] + ends[1][1], strict=True):
        assert torch.equal(left, right)
    assert ends[0][2] == ends[1][2]
