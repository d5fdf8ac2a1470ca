"""One update learned on the Base and on the Instruct: its gradient in float64, both ends bit for bit, and resuming."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.module import ShadowData
from shadowlit.errors import GraftError, ShadowlitError
from shadowlit.grafting.subject import ANCHORED, TUNED
from shadowlit.pair.pair import ModelPair
from shadowlit.training.anchors import Anchors, mixed_sums, parts_of_step
from shadowlit.training.module import ShadowModule
from tests.rounding import require_same_update
from tests.synthetic import RandomData, StreamedData, random_samples
from tests.tiny import save_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, instruct = save_pair(tmp_path_factory.mktemp("pair"), "qwen3", dtype=torch.bfloat16, distance=0.5)
    return ModelPair(str(base), str(instruct))


def make_module(pair, kind, anchors, **options):
    dropout = options.pop("dropout", 0.0)
    adapter = LoraConfig(r=4, lora_dropout=dropout) if kind == "lora" else None
    options = {"lr": 1e-2 if adapter else 1e-3, "warmup_ratio": 0, **options}
    return ShadowModule(pair, adapter, anchors=anchors, **options)


def fit(module, data=None, callbacks=(), ckpt_path=None, grafts=True, **options):
    seed_everything(0)
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=saves, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=[*callbacks, *([GraftCallback()] if grafts else [])],
        **{"max_epochs": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0, **options},
    )  # fmt: skip
    trainer.fit(module, data or RandomData(), ckpt_path=ckpt_path)
    return trainer


def parameters(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def require_gradients(module, expected, pairs):
    """The module's gradients are the expected ones: of the weights, or of LoRA's factors B, A by the weight's name."""
    if pairs:
        whole, expected = expected, {}
        for name, (up, down) in pairs.items():  # d(2 B A): 2 dW A^T for B, 2 B^T dW for A
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            expected[f"{layer}.lora_B.default.weight"] = 2 * whole[name] @ down.T
            expected[f"{layer}.lora_A.default.weight"] = 2 * up.T @ whole[name]
    found = gradients(module)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, grad in found.items():
        torch.testing.assert_close(grad.double(), expected[name], rtol=0, atol=4e-5 * expected[name].abs().max().item())


def gradients(module):
    return {name: p.grad.clone() for name, p in module.model.named_parameters() if p.requires_grad}


# -- the weights of the two models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("anchors", "expected"), [
    (Anchors(0.3), [0.3] * 10),
    (Anchors(0.3, last=0.2), [0] * 8 + [0.3] * 2),
    (Anchors(0.9, initial=0.0), [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    (Anchors(0.2, initial=1.0, last=0.5), [0] * 5 + [1.0, 0.8, 0.6, 0.4, 0.2]),
    (Anchors(0.5, initial=0.0, last=0.01), [0] * 9 + [0.5]),  # a single step is the end of the line
])  # fmt: skip
def test_the_weight_follows_the_steps(anchors, expected):
    assert [anchors.weight(step, 10) for step in range(10)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("weight", "micro_batches", "expected"), [
    (0.0, 1, (1, 0)), (1.0, 1, (0, 1)), (1.0, 3, (0, 3)), (0.5, 4, (2, 2)), (0.3, 5, (3, 2)), (0.3, 10, (7, 3)),
    (0.01, 4, (3, 1)), (0.99, 4, (1, 3)),
])  # fmt: skip
def test_the_micro_batches_are_divided_by_the_weight(weight, micro_batches, expected):
    assert parts_of_step(weight, micro_batches) == (*expected, weight)


def test_sums_are_mixed_by_their_means():
    """0.75 · 6/3 + 0.25 · 10/1 = 4, over 4 tokens; a part without any has no loss."""
    base, instruct = ({"loss": torch.tensor(a), "count": torch.tensor(b)} for a, b in ((6.0, 3.0), (10.0, 1.0)))
    assert mixed_sums(base, instruct, 0.25) == {"loss": 16.0, "count": 4.0}
    nothing = {"loss": torch.tensor(0.0), "count": torch.tensor(0.0)}
    assert mixed_sums(nothing, instruct, 0.25) == {"loss": 2.5, "count": 1.0}
    counted = ({**one, "tokens": torch.tensor(tokens)} for one, tokens in ((base, 30.0), (instruct, 7.0)))
    assert mixed_sums(*counted, 0.25) == {"loss": 16.0, "count": 4.0, "tokens": 37.0}  # and not 4 · (7.5 + 1.75)


# -- one step -------------------------------------------------------------------------------------------------------


class Moved(Callback):
    """Moves everything that is trained away from the start, so that Δ is not zero."""

    def on_train_start(self, trainer, module):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in module.model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=generator))


class Start(Callback):
    """Keeps the trained parameters as the first step begins with them."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.weights = parameters(module)


def updated(folder, update):
    """A model in float64 with an update of its weights, and its parameters by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in update.items():
            weights[name].add_(change)
    return model, weights


def mean_loss(folder, update, samples):
    """The mean loss per supervised token of a model in float64 with an update of its weights, and its gradients."""
    model, weights = updated(folder, update)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        logits = model(input_ids=sample["input_ids"][None], attention_mask=sample["attention_mask"][None]).logits[0]
        chosen = sample["labels"][1:] != -100
        logprobs = logits[:-1][chosen].log_softmax(-1).gather(1, sample["labels"][1:][chosen, None])
        total, count = total - logprobs.sum(), count + len(logprobs)
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in weights.items()}


@pytest.mark.parametrize(("kind", "samples", "accumulate", "parts"), [
    ("full", 5, 5, (3, 2)), ("lora", 5, 5, (3, 2)), ("full", 5, 3, (1, 1)),  # the last: of a step of two micro-batches
])  # fmt: skip
def test_the_gradient_is_that_of_both_losses_in_float64(pair, kind, samples, accumulate, parts):
    """``(1 - α) ∇L(W_B + Δ) + α ∇L(W_I + Δ)``, with samples of unequal lengths, where α · 5 is no whole number."""
    weight, start, of_base = 0.3, Start(), parts[0]
    module = make_module(pair, kind, Anchors(weight), lr=1e-30)
    trainer = fit(module, RandomData(samples, 1), [Moved(), start], accumulate_grad_batches=accumulate)
    assert trainer.global_step == math.ceil(samples / accumulate)
    base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float64)
    if kind == "full":
        update = {name: start.weights[name].double() - p.detach() for name, p in base.named_parameters()}
    else:
        factors = {n.removeprefix("base_model.model."): w.double() for n, w in start.weights.items() if "lora_" in n}
        pairs = {
            name.replace(".lora_A.default", ""): (factors[name.replace("lora_A", "lora_B")], down)
            for name, down in factors.items() if "lora_A" in name
        }  # fmt: skip
        update = {name: 2 * up @ down for name, (up, down) in pairs.items()}  # alpha 8 of rank 4
    rows = random_samples(samples, 0)[samples - sum(parts) :]
    left, of_left = mean_loss(pair.base, update, rows[:of_base])
    right, of_right = mean_loss(pair.instruct, update, rows[of_base:])
    metrics = trainer.callback_metrics
    assert metrics["train/loss_base"].item() == pytest.approx(left, rel=1e-6)
    assert metrics["train/loss_instruct"].item() == pytest.approx(right, rel=1e-6)
    assert metrics["train/loss"].item() == pytest.approx((1 - weight) * left + weight * right, rel=1e-6)
    expected = {name: (1 - weight) * grad + weight * of_right[name] for name, grad in of_left.items()}
    require_gradients(module, expected, pairs if kind == "lora" else {})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_recomputed_activations_are_those_of_the_same_weights(pair, kind):
    found = []
    for checkpointing in ("none", "full"):
        module = make_module(pair, kind, Anchors(0.5), activation_checkpointing=checkpointing)
        fit(module)
        found.append(parameters(module))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


# -- trainings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_without_a_weight_of_the_instruct_no_bit_changes(pair, kind):
    found = []
    for anchors in (None, Anchors(0.0), Anchors(1.0, last=0.01)):
        module = make_module(pair, kind, anchors, dropout=0.1)
        fit(module, max_steps=3)
        found.append(parameters(module))
    same = [all(torch.equal(found[0][name], value) for name, value in other.items()) for other in found]
    assert same == [True, True, False]  # the last step of the third is on the Instruct


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_with_the_whole_weight_an_adapter_trains_as_on_the_instruct_bit_for_bit(pair, precision):
    """In float32 the frozen weights are copied, since the files hold bfloat16; in bfloat16 they are swapped."""
    module = make_module(pair, "lora", Anchors(1.0), dropout=0.1)
    fit(module, precision=precision)
    other = make_module(ModelPair(pair.instruct, pair.instruct), "lora", None, dropout=0.1)
    fit(other, grafts=False, precision=precision)
    expected = parameters(other)
    learned = {name: value for name, value in parameters(module).items() if "lora_" in name}
    assert len(learned) > 10 and all(torch.equal(value, expected[name]) for name, value in learned.items())
    assert all(learned[name].any() for name in learned)


def test_with_the_whole_weight_full_tuning_is_that_of_the_instruct_up_to_rounding(pair):
    """The first gradient is the same bit for bit. What is kept is W_B + Δ, whose last bits are not those of W_I + Δ."""
    found = []
    for one, anchors in ((pair, Anchors(1.0)), (ModelPair(pair.instruct, pair.instruct), None)):
        module, start = make_module(one, "full", anchors), Start()
        fit(module, callbacks=[start], grafts=anchors is not None, max_steps=1)
        first = gradients(module)
        fit(module := make_module(one, "full", anchors), grafts=anchors is not None)
        update = {name: value - start.weights[name] for name, value in parameters(module).items()}
        found.append((first, update))
    (first, update), (expected_first, expected) = found
    assert all(torch.equal(first[name], value) for name, value in expected_first.items())
    require_same_update(update, expected, {name: torch.zeros_like(value) for name, value in expected.items()})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_is_uninterrupted_bit_for_bit(pair, tmp_path, kind):
    """From a checkpoint between two steps of both anchors, with validations between, and a weight that rises."""
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "x" * (i % 5 + 1)}]}
            for i in range(16)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    anchors, steps = Anchors(0.5, initial=0.0, last=0.75), {"max_epochs": 2, "val_check_interval": 4}
    ends = []
    for start in (None, tmp_path / "step=5.ckpt"):
        module = make_module(pair, kind, anchors, dropout=0.2)
        file = str(tmp_path / "rows.jsonl")
        data = ShadowData(pair, train=file, validation=file, batch_size=2, max_length=64)
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = fit(module, data, [saver], start, limit_val_batches=1, **steps)
        assert trainer.global_step == 8
        ends.append((module, trainer))
    (module, trainer), (resumed, again) = ends
    found = parameters(resumed)
    assert all(torch.equal(found[name], value) for name, value in parameters(module).items())
    times = ("graft/seconds", "graft/swap_seconds", "graft/time_share")
    for name, value in trainer.callback_metrics.items():
        assert name in times or again.callback_metrics[name] == value, name


class Fail(Callback):
    """Fails while the Instruct's weights are loaded, and keeps what a checkpoint holds then."""

    def on_after_backward(self, trainer, module):
        (graft,) = (one for one in trainer.callbacks if isinstance(one, GraftCallback))
        if graft.graft.subject == ANCHORED:
            self.graft, self.state = graft.graft, {n: t.clone() for n, t in module.state_dict().items()}
            graft.graft.apply(ANCHORED)
            raise RuntimeError("in the middle")


@pytest.mark.parametrize(("kind", "precision"), [("full", "32-true"), ("lora", "32-true"), ("lora", "bf16-mixed")])
def test_an_exception_or_a_checkpoint_between_finds_the_trained_weights(pair, kind, precision):
    fail, start, module = Fail(), Start(), make_module(pair, kind, Anchors(0.5))
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(module, callbacks=[start, fail], precision=precision)
    assert fail.graft.subject == TUNED
    after = parameters(module)
    assert all(torch.equal(after[name], value) for name, value in start.weights.items())
    saved = {name.removeprefix("model."): value for name, value in fail.state.items()}
    assert saved and all(torch.equal(value, after[name]) for name, value in saved.items() if name in after)


@pytest.mark.parametrize(("kind", "precision", "copies"), [
    ("full", "32-true", True), ("lora", "32-true", True), ("lora", "bf16-mixed", False),
])  # fmt: skip
def test_the_anchor_is_the_instruct_with_everything_that_is_trained(pair, kind, precision, copies):
    """Whatever the graft's selection, dtype and transforms are: the graft that is trained has none."""
    module = make_module(pair, kind, Anchors(0.5))
    options = {"dtype": "float16", "select": "q_proj", "transforms": [{"name": "magnitude", "density": 0.5}]}
    graft = GraftCallback(**options)
    fit(module, callbacks=[graft], grafts=False, precision=precision)
    module.model = module.model.eval()
    before, live = parameters(module), graft.build(module)
    instruct = AutoModelForCausalLM.from_pretrained(pair.instruct, dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32).state_dict()
    live.apply(ANCHORED)
    assert any(host.saved is not None for host in live._hosts) == copies
    for name, value in parameters(module).items():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" in name:
            assert torch.equal(value, before[name])
        else:
            expected = instruct[own] + (before[name] - base[own]) if kind == "full" else instruct[own]
            assert torch.equal(value.float(), expected), name
    live.restore()
    assert all(torch.equal(value, before[name]) for name, value in parameters(module).items())


# -- what does not work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"instruct": 1.5}, "instruct and initial between 0 and 1"),
    ({"instruct": 0.5, "initial": -0.1}, "instruct and initial between 0 and 1"),
    ({"instruct": 0.5, "last": 0}, "last above 0"),
])  # fmt: skip
def test_weights_out_of_range(options, message):
    with pytest.raises(ShadowlitError, match=message):
        Anchors(**options)


@pytest.mark.parametrize(("options", "message"), [
    ({"adapter": {"r": 4, "use_dora": True}}, "use_dora=True, whose update depends"),
    ({"adapter": {"r": 4, "init_lora_weights": "pissa"}}, "init_lora_weights='pissa', whose update depends"),
    ({"adapter": {"r": 4, "modules_to_save": ["norm"]}}, "modules_to_save=.*, whose update depends"),
    ({"objective": {"class_path": "shadowlit.training.objectives.DPO"}}, "DPO as model.objective"),
    ({"objective": {"class_path": "shadowlit.training.objectives.SFT", "init_args": {"kl_weight": 0.1}}}, "SFT as"),
])  # fmt: skip
def test_what_means_something_else_on_the_other_model_is_refused(pair, options, message):
    with pytest.raises(GraftError, match=message):
        ShadowModule(pair, anchors={"instruct": 0.5}, **options)


class NoData(RandomData):
    def prepare_data(self):
        raise AssertionError("the data were read")


@pytest.mark.parametrize(("anchors", "options", "message"), [
    (Anchors(0.5), {"accumulate_grad_batches": 1}, "Set trainer.accumulate_grad_batches=2 or more"),
    (Anchors(1.0, initial=0.0), {"accumulate_grad_batches": 1}, "Set trainer.accumulate_grad_batches=2 or more"),
    (Anchors(0.5, last=0.2), {"max_epochs": -1}, "the number of steps, which is unknown"),
    (Anchors(0.5), {"grafts": False}, "GraftCallback holds, but the trainer has none"),
])  # fmt: skip
def test_trainers_that_can_not_divide_a_step_are_refused_before_the_data_are_read(pair, anchors, options, message):
    with pytest.raises(ShadowlitError, match=message):
        fit(make_module(pair, "lora", anchors, schedule="constant"), NoData(), **options)


def test_a_weight_follows_no_number_of_steps_that_is_unknown(pair):
    """Lightning says -1 for data without a length: every step would be after the last one."""
    with pytest.raises(ShadowlitError, match=r"which is unknown\. Set trainer\.max_steps"):
        fit(make_module(pair, "lora", Anchors(1.0, last=0.5), schedule="constant"), StreamedData())
    fit(make_module(pair, "lora", Anchors(1.0), schedule="constant"), StreamedData(4))


def test_an_epoch_that_ends_with_one_micro_batch_is_refused(pair):
    with pytest.raises(ShadowlitError, match=r"an epoch has 5 micro-batches.*trainer.limit_train_batches=4"):
        fit(make_module(pair, "lora", Anchors(0.5)), RandomData(5, 1))
    with pytest.raises(ShadowlitError, match=r"a single micro-batch.*lower data\.batch_size"):
        fit(make_module(pair, "lora", Anchors(0.5)), RandomData(2, 2))
    fit(make_module(pair, "lora", Anchors(0.5)), RandomData(5, 1), limit_train_batches=4)
    for given, micro in ((Anchors(1.0), 2), (Anchors(1.0, last=0.5), 2), (Anchors(1.0, last=0.5), 1)):  # never both
        fit(make_module(pair, "lora", given), RandomData(5, 1), accumulate_grad_batches=micro)
