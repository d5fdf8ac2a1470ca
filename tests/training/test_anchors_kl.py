"""The divergence from the Instruct in a training: its gradient in float64, by ranks and micro-batches, and resuming."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import shadowlit.training.anchors as anchors_module
from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.module import ShadowData
from shadowlit.data.sampler import epoch_order
from shadowlit.errors import GraftError, ShadowlitError
from shadowlit.evaluation.forgetting import Divergence
from shadowlit.grafting.scales import FitScales, Keep
from shadowlit.training.anchors import Anchors, NeutralRows
from shadowlit.training.head import HeadLoss, Predictions
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import SimPO
from shadowlit.training.objectives.tokens import divergence_sums
from shadowlit.training.outputs import Outputs
from tests.data.templates import talk
from tests.distributed import run_ranks
from tests.rounding import require_same_update
from tests.synthetic import RandomData, random_samples
from tests.training import test_distributed as distributed
from tests.training.test_anchors import (
    Moved,
    NoData,
    Start,
    fit,
    gradients,
    make_module,
    mean_loss,
    pair,
    parameters,
    require_gradients,
    updated,
)

__all__ = ["pair"]  # a fixture
WEIGHT = 20.0  # such that a step is as much the divergence's as the losses'


class Neutral(RandomData):
    """Random tokens with neutral rows next to them, two in every step, whatever the micro-batches are."""

    train_sources, validation_sets, test_sets, seed = (), {}, {}, 3

    def __init__(self, num_train=4, micro=1):
        super().__init__(num_train, 2)
        self.micro, self.neutral = micro, random_samples(5, 9)

    def extra_loader(self, name, source):
        return DataLoader(self.neutral, batch_size=2)

    def overlap(self, name, extra=()):
        return {}

    def train_dataloader(self):
        return DataLoader(random_samples(self.num_train, 0), batch_size=self.micro)


def anchors(instruct, weight=WEIGHT, data="neutral.jsonl", **options):
    return Anchors(instruct, kl=Keep(data, weight), **options)


def update_of(pair, kind, weights):
    """The update of every matrix in float64, and the factors of an adapter."""
    if kind == "full":
        base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float64)
        return {name: weights[name].double() - p.detach() for name, p in base.named_parameters()}, {}
    factors = {n.removeprefix("base_model.model."): w.double() for n, w in weights.items() if "lora_" in n}
    pairs = {
        name.replace(".lora_A.default", ""): (factors[name.replace("lora_A", "lora_B")], down)
        for name, down in factors.items() if "lora_A" in name
    }  # fmt: skip
    return {name: 2 * up @ down for name, (up, down) in pairs.items()}, pairs  # alpha 8 of rank 4


def mean_divergence(folder, update, samples):
    """``KL(W + Δ ‖ W)`` per supervised token in float64, and its gradients."""
    (reference, _), (model, weights) = updated(folder, {}), updated(folder, update)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        inputs = {"input_ids": sample["input_ids"][None], "attention_mask": sample["attention_mask"][None]}
        chosen = sample["labels"][1:] != -100
        with torch.no_grad():
            theirs = reference(**inputs).logits[0, :-1][chosen].log_softmax(-1)
        ours = model(**inputs).logits[0, :-1][chosen].log_softmax(-1)
        total, count = total + (ours.exp() * (ours - theirs)).sum(), count + len(ours)
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in weights.items()}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("weight", "accumulate", "of_base"), [(0.3, 4, 3), (0.0, 1, 4), (1.0, 4, 0)])
def test_the_gradient_is_that_of_the_formula_in_float64(pair, kind, weight, accumulate, of_base):
    """``(1 - α) ∇L(W_B + Δ) + α ∇L(W_I + Δ) + w ∇KL(W_I + Δ ‖ W_I)`` with counts of tokens that all differ."""
    start, module = Start(), make_module(pair, kind, anchors(weight), lr=1e-30)
    trainer = fit(
        module, Neutral(4, 4 // accumulate), [Moved(), start], accumulate_grad_batches=accumulate, max_steps=1
    )
    update, pairs = update_of(pair, kind, start.weights)
    rows, neutral = random_samples(4, 0), random_samples(5, 9)
    kl, expected = mean_divergence(pair.instruct, update, [neutral[i] for i in epoch_order(5, 3)[:2]])
    loss, expected = WEIGHT * kl, {name: WEIGHT * grad for name, grad in expected.items()}
    for folder, part, share in ((pair.base, rows[:of_base], 1 - weight), (pair.instruct, rows[of_base:], weight)):
        if part:
            own, grads = mean_loss(folder, update, part)
            loss, expected = loss + share * own, {name: g + share * grads[name] for name, g in expected.items()}
    assert kl > 0.004
    assert trainer.callback_metrics["train/kl"].item() == pytest.approx(kl, rel=1e-5)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss, rel=1e-5)
    require_gradients(module, expected, pairs if kind == "lora" else {})


@pytest.mark.parametrize(("kind", "precision"), [("full", "32-true"), ("lora", "32-true"), ("lora", "bf16-mixed")])
def test_at_the_instruct_it_is_zero_and_has_no_gradient(pair, kind, precision):
    """Exactly 0 before the first step, with dropout too. Its gradient is rounding: a softmax sums to 1 ± 1e-7."""
    found = []
    for given in (Anchors(0.5), anchors(0.5, weight=1.0)):
        module = make_module(pair, kind, given, lr=1e-30, dropout=0.5)
        trainer = fit(module, Neutral(), max_steps=1, precision=precision)
        found.append((gradients(module), trainer.callback_metrics))
    (expected, plain), (gradient, metrics) = found
    assert metrics["train/kl"] == 0 and metrics["train/loss"] == plain["train/loss"] and "train/kl" not in plain
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in gradient.items():
        assert (grad - expected[name]).abs().max() < (1e-5 if precision == "32-true" else 1e-2) * largest, name


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_number_of_micro_batches_does_not_matter(pair, kind, weight):
    ends, start = [], Start()
    for micro in (1, 2) if weight else (1, 2, 4):
        module = make_module(pair, kind, anchors(weight))
        fit(module, Neutral(16, micro), [start], accumulate_grad_batches=4 // micro)
        ends.append(parameters(module))
    for other in ends[1:]:
        require_same_update(other, ends[0], start.weights)


def test_steps_of_one_model_have_it_too_and_dropout_is_the_same(pair):
    """With a weight so small that nothing is left of it, no bit of a training with dropout changes."""
    found = []
    for given in (Anchors(0.5, last=0.5), anchors(0.5, weight=1e-30, last=0.5), anchors(0.5, last=0.5)):
        module = make_module(pair, "lora", given, dropout=0.1)
        fit(module, Neutral(8, 1), max_epochs=2)
        found.append(parameters(module))
    same = [all(torch.equal(found[0][name], value) for name, value in other.items()) for other in found]
    assert same == [True, True, False]


def test_rows_pass_in_an_order_of_seed_and_step():
    """11 rows, 4 a step: 8 of a permutation, then 8 of the next; two ranks share what one process has."""
    data = SimpleNamespace(seed=5, batch_size=4, extra_loader=lambda *_: DataLoader(range(11), collate_fn=list))

    def rows(batch_size, ranks, rank, steps):
        data.batch_size = batch_size
        each = NeutralRows(SimpleNamespace(datamodule=data, world_size=ranks, global_rank=rank), "x")
        return [each(step) for step in steps]

    one = rows(4, 1, 0, range(4))
    assert one[0] + one[1] == epoch_order(11, 5, 0)[:8].tolist()
    assert one[2] + one[3] == epoch_order(11, 5, 1)[:8].tolist()
    left, right = (rows(2, 2, rank, range(4)) for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(left, right, strict=True)] == [sorted(each) for each in one]
    assert rows(4, 1, 0, [3]) == one[3:]
    assert sorted(rows(64, 1, 0, [7])[0]) == list(range(11))


def test_weights_of_turns_count():
    """2 · KL_0 + 0.5 · KL_1, divided by 2.5."""
    ours, theirs = torch.randn(2, 1, 3, 8).double()
    batch = {"input_ids": torch.zeros(1, 3).long(), "labels": torch.tensor([[-100, 1, 2]])}
    batch["loss_weights"] = torch.tensor([[0.0, 2.0, 0.5]])
    head = HeadLoss(lambda **_: SimpleNamespace(logits=ours), "logits")
    reference = Predictions(theirs[0, :2], lambda states: states)
    total, count = divergence_sums(Outputs(head, batch, predictions=reference))
    p, r = ours[0, :2].log_softmax(-1), theirs[0, :2].log_softmax(-1)
    each = (p.exp() * (p - r)).sum(-1)
    assert total.item() == pytest.approx((2 * each[0] + 0.5 * each[1]).item()) and count == 2.5


# -- trainings on files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for place, name in enumerate(("train", "validation", "neutral")):
        rows = ({"messages": talk(f"{name} {i}", chr(97 + place) * (3 + i % 4))} for i in range(16 - 3 * place))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "neutral")}


def make_data(pair, files, **options):
    options = {"validation": files["validation"], "batch_size": 2, "max_length": 64, "cache": False, **options}
    return ShadowData(pair, train=files["train"], **options)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_is_uninterrupted_bit_for_bit(pair, files, tmp_path, kind):
    """From a checkpoint in the second pass over the neutral rows, with steps of the Base alone before it."""
    given = anchors(0.5, data=files["neutral"], initial=0.0, last=0.75)
    ends = []
    for start in (None, tmp_path / "step=5.ckpt"):
        module = make_module(pair, kind, given, dropout=0.2)
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = fit(
            module, make_data(pair, files), [saver], start, limit_val_batches=1, max_epochs=2, val_check_interval=4
        )
        assert trainer.global_step == 8
        ends.append((module, trainer))
    (module, trainer), (resumed, again) = ends
    found = parameters(resumed)
    assert all(torch.equal(found[name], value) for name, value in parameters(module).items())
    assert trainer.callback_metrics["train/kl"] == again.callback_metrics["train/kl"] > 0


def test_other_rows_when_a_run_resumes_are_reported(pair, files, tmp_path):
    rows, text = tmp_path / "neutral.jsonl", Path(files["neutral"]).read_text()

    def train(text, steps, callbacks=(), start=None):
        rows.write_text(text)
        module = make_module(pair, "lora", anchors(0.0, data=str(rows)))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(module, make_data(pair, files), callbacks, start, accumulate_grad_batches=1, max_steps=steps)
        return ["model.anchors.kl.data has other rows than" in str(each.message) for each in told].count(True)

    assert train(text, 1, [ModelCheckpoint(tmp_path, "first")]) == 0
    assert train(text, 2, start=tmp_path / "first.ckpt") == 0
    assert train(text.replace("neutral", "other"), 2, start=tmp_path / "first.ckpt") == 1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_packed_training_rows_have_the_same_divergence(pair, files, kind):
    ends, start = [], Start()
    for packing in (None, "padding_free"):
        module = make_module(pair, kind, anchors(0.5, data=files["neutral"]))
        trainer = fit(module, make_data(pair, files, packing=packing), [start])
        ends.append((parameters(module), trainer.callback_metrics["train/kl"].item()))
    (expected, kl), (found, other) = ends
    require_same_update(found, expected, start.weights)
    assert other == pytest.approx(kl, rel=1e-3) and kl > 0


def test_an_exception_restores_the_trained_weights(pair, files, monkeypatch):
    def fail(_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(anchors_module, "divergence_sums", fail)
    start, module = Start(), make_module(pair, "full", anchors(0.5, data=files["neutral"]))
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(module, make_data(pair, files), [start])
    after = parameters(module)
    assert all(torch.equal(after[name], value) for name, value in start.weights.items())
    assert all(each.training for each in module.model.modules())


def train_on_ranks(folders, files, kind, strategy, world_size, weight, when="auto"):
    """Weights, what is logged last, and the weights at the start."""
    seed_everything(0)
    given = anchors(weight, data=files["neutral"])
    module, start = distributed.make_module(folders, kind, anchors=given, reduce_gradients=when), Start()
    trainer = distributed.make_trainer(
        strategy, world_size, [start, GraftCallback()], accumulate_grad_batches=2, max_epochs=1, limit_val_batches=0
    )
    trainer.fit(module, make_data(module.pair, files, batch_size=4 // world_size))
    losses = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    return distributed.whole_parameters(module), losses, start.weights


@pytest.mark.parametrize("weight", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_are_one(tmp_path, pair, files, kind, weight):
    folders = pair.base, pair.instruct
    ((expected, losses, start),) = run_ranks(train_on_ranks, 1, folders, files, kind, "auto", 1, weight)
    assert losses["train/kl"] > 0
    for strategy, when in (("ddp", "auto"), ("fsdp2", "micro_batch"), ("fsdp2", "step")):
        for weights, found, _ in run_ranks(train_on_ranks, 2, folders, files, kind, strategy, 2, weight, when):
            require_same_update(weights, expected, start)
            assert found == pytest.approx(losses, **distributed.SAME)


# -- what does not work ---------------------------------------------------------------------------------------------


def test_settings_are_refused(pair):
    with pytest.raises(ShadowlitError, match=r"model\.anchors\.kl\.weight is 0; expected a number above 0"):
        anchors(0.5, weight=0)
    with pytest.raises(GraftError, match=r"SimPO as model\.objective learns from pairs"):
        ShadowModule(pair, anchors={"instruct": 0.5, "kl": {"data": "x"}}, objective=SimPO())


def test_rows_are_refused_before_the_data_are_read(pair, files, monkeypatch):
    class Unread(ShadowData):
        def setup(self, stage=None):
            raise AssertionError("the data were read")

    data = Unread(pair, train=files["train"], validation=files["validation"], cache=False)
    evaluation = EvaluationCallback({"kl": Divergence(files["neutral"])})
    scales = [GraftCallback(fit_scales=FitScales(**each)) for each in (
        {"data": files["neutral"]}, {"data": "x", "keep": Keep(files["neutral"])},
    )]  # fmt: skip
    monkeypatch.setenv("HOME", str(Path(files["train"]).parent))
    for given, callbacks, message in (
        ("nowhere.jsonl", [], "nowhere.jsonl does not exist"),
        (files["validation"], [], r"model\.anchors\.kl\.data is .*, which is data\.validation\.val too"),
        ("~/train.jsonl", [], r"model\.anchors\.kl\.data is ~/train.jsonl, which is data\.train too"),
        (files["neutral"], [evaluation], r"which is evaluation\.evaluators\.kl\.data too"),
        (files["neutral"], scales[:1], r"which is graft\.fit_scales\.data too"),
        (files["neutral"], scales[1:], r"which is graft\.fit_scales\.keep\.data too"),
    ):
        with pytest.raises(ShadowlitError, match=message):
            swaps = not set(scales) & set(callbacks)
            fit(make_module(pair, "lora", anchors(0.5, data=given)), data, callbacks, grafts=swaps)
    with pytest.raises(
        GraftError, match=r"rows of model\.anchors\.kl\.data are read .*, but NoData has no extra_loader"
    ):
        fit(make_module(pair, "lora", anchors(0.5)), NoData())


def test_rows_that_are_validated_or_calibrated_too_are_reported(pair, files, tmp_path):
    lines = [Path(files[name]).read_text().splitlines() for name in ("neutral", "validation")]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0][0], lines[1][0]]))
    (tmp_path / "calibration.jsonl").write_text("\n".join(lines[0][:3]))
    module = make_module(pair, "lora", anchors(0.0, data=str(tmp_path / "rows.jsonl")))
    scales = GraftCallback(fit_scales={"data": str(tmp_path / "calibration.jsonl"), "steps": 1})
    callbacks = [scales, ExportCallback(folder=str(tmp_path / "export"))]
    with pytest.warns(UserWarning, match="shares") as told:
        fit(module, make_data(pair, files), callbacks, grafts=False, accumulate_grad_batches=1, max_steps=1)
    shared = {str(each.message).partition(", so")[0] for each in told if "shares" in str(each.message)}
    assert shared == {
        f"data: {one} shares 1 sample token for token with {other}" for one, other in (
            ("model.anchors.kl.data", "val/val"), ("model.anchors.kl.data", "graft.fit_scales.data"),
            ("graft.fit_scales.data", "model.anchors.kl.data"),
        )
    }  # fmt: skip
