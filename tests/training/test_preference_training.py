"""Training on preferences: each step against whole logits, however batches are spread, for tuned and grafted alike."""

import json
import math

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.cli.delta import apply, sum_
from shadowlit.data.module import ShadowData
from shadowlit.delta.delta import Delta
from shadowlit.distributed import local, reshard_all, whole
from shadowlit.errors import ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import ASFT, CPO, DPO, KTO, ORPO, SimPO
from tests.distributed import run_ranks
from tests.rounding import Start, require_same_update
from tests.tiny import save_pair

OBJECTIVES = {
    "dpo": lambda: DPO(0.3, label_smoothing=0.1, sft_weight=0.5),
    "kto": lambda: KTO(0.3, 1.5, 0.5),
    "orpo": lambda: ORPO(0.2),
    "simpo": SimPO,
    "cpo": CPO,
    "asft": ASFT,
}
CHARS = "abcdefghijklmnopqrstuvwxyz"


def write_rows(folder, count=8):
    """Pairs and labels of unequal lengths, for training and for validation."""
    for name, first in (("train", 0), ("val", 100)):
        with (folder / f"{name}_pairs.jsonl").open("w") as pairs, (folder / f"{name}_labels.jsonl").open("w") as labels:
            for i in range(first, first + count):
                good, bad = CHARS[i % 20 : i % 20 + 2 + i % 5], CHARS[i % 7 : i % 7 + 1 + i % 4] + "."
                pairs.write(json.dumps({"prompt": f"{i}?", "chosen": good, "rejected": bad}) + "\n")
                row = {"prompt": f"{i}?", "completion": good if i % 3 else bad, "label": bool(i % 3)}
                labels.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    write_rows(folder)
    return save_pair(folder)


def make(folders, objective, kind="full", cls=ShadowModule, **options):
    module = cls(
        ModelPair(*map(str, folders)), LoraConfig(r=4) if kind == "lora" else None, objective,
        lr=1e-2 if kind == "lora" else 1e-3, warmup_ratio=0,
    )  # fmt: skip
    rows = folders[0].parent
    files = {use: str(rows / f"{use}_{objective.samples}.jsonl") for use in ("train", "val")}
    options = {"batch_size": 4, "cache": False, "max_length": 64, **options}
    data = ShadowData(
        module.pair,
        train=files["train"],
        validation=files["val"],
        test=files["val"],
        samples=objective.samples,
        **options,
    )
    return module, data


def fit(module, data, ckpt_path=None, callbacks=None, strategy="auto", devices=1, **options):
    seed_everything(0)
    callbacks = [GraftCallback(select="all", dtype="float32")] if callbacks is None else callbacks
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, inference_mode=False, callbacks=callbacks,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), num_sanity_val_steps=0,
        **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def logged(trainer, *prefixes):
    return {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(prefixes or ("train/", "val/"))}


def parameters(module):
    reshard_all(module.model)
    return {name: whole(local(p), p).detach().clone() for name, p in module.model.named_parameters()}


# -- an independent implementation --------------------------------------------------------------------------------


def sequences_of(data, name):
    """Tokens and loss masks of both answers of every sample, and the labels."""
    dataset = data.dataset(name)
    for index in range(len(dataset)):
        (sample,) = dataset[index]
        yield [(torch.tensor(a["input_ids"]), torch.tensor(a["labels"]) != -100) for a in sample["answers"]], sample


def logp(model, tokens, mask):
    """The summed log-probability of the masked tokens, through whole logits."""
    logprobs = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, tokens[1:, None])[:, 0][mask[1:]].double().sum()


def loss_of(objective, model, reference, data, name, kl=None):
    """Ten lines for each formula: the mean loss of a set, and KTO's distance."""
    rows, losses = [], []
    for answers, sample in sequences_of(data, name):
        w, l = (logp(model, *one) for one in answers)  # noqa: E741
        with torch.no_grad():
            rw, rl = (logp(reference, *one) for one in answers)
        rows.append((w, l, rw, rl, *(int(mask[1:].sum()) for _, mask in answers), sample["desirable"]))
    own = sum((row[1] - row[3]).detach() for row in rows) / len(rows)
    kl = own.clamp(min=0) if kl is None else kl
    s = torch.nn.functional.logsigmoid
    for w, l, rw, rl, nw, nl, good in rows:  # noqa: E741
        h, odds = 0.3 * ((w - rw) - (l - rl)), [m - torch.log(1 - torch.exp(m)) for m in (w / nw, l / nl)]
        losses.append({
            "DPO": -0.9 * s(h) - 0.1 * s(-h) - 0.5 * w / nw,
            "KTO": 1.5 * (1 - torch.sigmoid(0.3 * (w - rw - kl))) if good
            else 0.5 * (1 - torch.sigmoid(0.3 * (kl - w + rw))),
            "ORPO": -w / nw - 0.2 * s(odds[0] - odds[1]),
            "SimPO": -s(2 * w / nw - 2 * l / nl - 1),
            "CPO": -s(0.1 * (w - l)) - w / nw,
            "ASFT": -w / nw - 0.1 * (s(odds[0]) + s(-odds[1])),
        }[type(objective).__name__])  # fmt: skip
    return sum(losses) / len(losses), own.clamp(min=0)


class Recording(ShadowModule):
    """Keeps the weights and the gradients of every step."""

    def on_before_optimizer_step(self, optimizer):
        kl = getattr(self.objective, "kl", 0.0)
        super().on_before_optimizer_step(optimizer)
        named = dict(self.model.named_parameters())
        self.steps = [
            *getattr(self, "steps", []),
            (
                {n: p.detach().clone() for n, p in named.items()},
                {n: p.grad.clone() for n, p in named.items()},
                float(kl),
            ),
        ]


def open_model(folder, weights=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_step_is_the_formula_and_so_are_the_scores(folders, name):
    """Losses and gradients of three steps on the whole set; scores of tuned and grafted, each against its own start."""
    objective = OBJECTIVES[name]()
    module, data = make(folders, objective, cls=Recording, batch_size=3, packing="padding_free")
    trainer = fit(module, data, max_epochs=3, accumulate_grad_batches=3)
    base, instruct = map(open_model, folders)
    distance = torch.zeros(())
    for weights, gradients, kl in module.steps:
        model = open_model(folders[0], weights)
        if isinstance(objective, KTO):
            assert kl == pytest.approx(distance.item(), abs=1e-5)
        loss, distance = loss_of(objective, model, base, data, "train", kl)
        loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    metrics = logged(trainer)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    tuned = open_model(folders[0], parameters(module))
    grafted = open_model(folders[1])
    with torch.no_grad():
        for name, p in grafted.named_parameters():
            p += dict(tuned.named_parameters())[name] - dict(base.named_parameters())[name]
        for who, model, start in (
            ("tuned", tuned, base),
            ("grafted", grafted, instruct),
            ("instruct", instruct, instruct),
        ):
            expected = loss_of(objective, model, start, data, "val")[0].item()
            assert metrics[f"val/{who}/loss"] == pytest.approx(expected, rel=1e-4), who


def test_what_is_logged_by_hand(folders):
    """Against the start the untouched models have no margin, and the loss of a coin."""
    module, data = make(folders, DPO(0.3))
    trainer = fit(module, data, max_epochs=4)
    metrics = logged(trainer)
    for who in ("base", "instruct"):
        assert metrics[f"val/{who}/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics[f"val/{who}/margin"] == pytest.approx(0, abs=1e-5)
        assert 0 <= metrics[f"val/{who}/likelier"] <= 1
    for who in ("tuned", "grafted"):
        own = {
            what: metrics[f"val/{who}/{what}"] for what in ("margin", "reward_chosen", "reward_rejected", "accuracy")
        }
        assert own["margin"] == pytest.approx(own["reward_chosen"] - own["reward_rejected"], abs=1e-6)
    assert metrics["train/margin"] > 0 and metrics["train/loss"] < math.log(2) and metrics["train/tokens"] > 0
    (before,) = trainer.validate(module, data, verbose=False)
    assert before["val/tuned/loss"] == metrics["val/tuned/loss"]
    # The test set wasn't known before the training: its references are the start all the same.
    (after,) = trainer.test(module, data, verbose=False)
    for who in ("tuned", "grafted", "base"):
        for what in ("loss", "margin", "accuracy"):
            assert after[f"test/{who}/{what}"] == pytest.approx(metrics[f"val/{who}/{what}"], abs=1e-6), (who, what)


SPREADS = [
    {"batch_size": 8}, {"batch_size": 2, "accumulate": 4}, {"batch_size": 1, "accumulate": 8},
    {"batch_size": 4, "accumulate": 2, "packing": "padding_free"},
    {"batch_size": 8, "packing": "best_fit", "pack_length": 140},
    {"batch_size": 3, "accumulate": 3, "pad_to_multiple_of": 16},
]  # fmt: skip


@pytest.mark.parametrize("name", ["dpo", "kto", "asft"])
def test_accumulated_and_packed_are_the_whole_batch(folders, name):
    results = []
    for spread in SPREADS:
        options = dict(spread)
        accumulate = options.pop("accumulate", 1)
        module, data = make(folders, OBJECTIVES[name](), **options)
        trainer = fit(module, data, accumulate_grad_batches=accumulate, max_epochs=3)
        assert trainer.global_step == 3
        results.append((parameters(module), logged(trainer)))
    start = dict(open_model(folders[0]).named_parameters())
    assert max((results[0][0][n] - p).abs().max().item() for n, p in start.items()) > 1e-3
    for weights, metrics in results[1:]:
        require_same_update(weights, results[0][0], start)
        assert metrics == pytest.approx(results[0][1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("dpo", "lora"), ("kto", "full")])
def test_resumed_is_uninterrupted(folders, tmp_path, name, kind):
    """The reference is the start and not what the checkpoint holds; KTO's distance comes from the checkpoint."""
    ends = []
    for ckpt_path in (None, tmp_path / "step=2.ckpt"):
        module, data = make(folders, OBJECTIVES[name](), kind)
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        graft = GraftCallback()
        trainer = fit(module, data, ckpt_path, [graft, checkpoint], max_epochs=3)
        ends.append((parameters(module), logged(trainer)))
    assert ends[0][1] == ends[1][1]
    assert ends[0][1]["train/loss"] != pytest.approx(math.log(2), abs=1e-3)
    for parameter, value in ends[0][0].items():
        assert torch.equal(ends[1][0][parameter], value), parameter


def test_the_callback_changes_no_bit_of_a_training_without_reference(folders):
    ends = []
    for callbacks in ([], None):
        module, data = make(folders, SimPO(), "lora")
        fit(module, data, callbacks=callbacks)
        ends.append(parameters(module))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def stored_error(first, second, weight):
    """Each update was rounded to the 8 bits of bfloat16, by up to 2^-8 of it; four sums in float32 by 2^-24 each."""
    return 2**-8 * (first.abs() + second.abs()) + 2**-22 * (weight.abs() + first.abs() + second.abs())


def test_two_updates_are_grafted_together(folders, tmp_path):
    """Fine-tuned and preferred apart: the Instruct with both, rounded once, and scored as the sum of the two."""
    talks = folders[0].parent / "talks.jsonl"
    rows = (
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ab"}]} for i in range(4)
    )
    talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = {}
    for name in ("sft", "dpo"):
        module, data = make(folders, DPO(0.3))
        if name == "sft":
            module = ShadowModule(module.pair, lr=1e-3, warmup_ratio=0)
            data = ShadowData(module.pair, train=str(talks), batch_size=4, cache=False, max_length=64)
        export = ExportCallback(parts=["delta"], folder=str(tmp_path / name))
        fit(module, data, callbacks=[GraftCallback(select="all", dtype="float32"), export])
        tuned[name] = parameters(module)
    deltas = [Delta.open(tmp_path / name / "delta") for name in tuned]
    both = deltas[0] + deltas[1]
    base, instruct = (dict(open_model(folder).named_parameters()) for folder in folders)
    assert all(max(delta.tensor(name).abs().max() for name in base) > 1e-3 for delta in deltas)
    assert abs(deltas[0].cosine(deltas[1])) < 0.9
    for name, start in base.items():
        updates = [tuned[which][name] - start for which in tuned]
        error = stored_error(*updates, instruct[name])
        assert ((instruct[name] + both.tensor(name)) - (instruct[name] + sum(updates))).abs().le(error).all()
    sum_([str(tmp_path / name / "delta") for name in tuned], str(tmp_path / "both"), dtype="float32")
    apply(str(tmp_path / "both"), str(folders[1]), str(tmp_path / "model"), select="all", dtype="float32")
    written = dict(open_model(tmp_path / "model").named_parameters())
    for name, start in base.items():
        updates = [tuned[which][name] - start for which in tuned]
        error = stored_error(*updates, instruct[name])
        assert (written[name] - (instruct[name] + sum(updates))).abs().le(error).all()


# -- several processes --------------------------------------------------------------------------------------------


def spread_over_ranks(folders, name, kind, strategy, world_size):
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    module, data = make(folders, OBJECTIVES[name](), kind, batch_size=4 // world_size, eval_batch_size=4 // world_size)
    start = Start()
    callbacks = [GraftCallback(select="all", dtype="float32"), start]
    trainer = fit(module, data, None, callbacks, strategy, world_size, limit_train_batches=2, gradient_clip_val=1.0)
    return parameters(module), logged(trainer), start.weights


@pytest.mark.parametrize(("name", "kind", "strategy"), [("dpo", "lora", "fsdp2"), ("kto", "full", "ddp")])
def test_two_processes_are_one(tmp_path, name, kind, strategy):
    """Seven rows: the last batch of one rank holds a filler, in training, validation and for the reference."""
    write_rows(tmp_path, 7)
    folders = save_pair(tmp_path)
    (one,) = run_ranks(spread_over_ranks, 1, folders, name, kind, "auto", 1)
    for weights, metrics, _ in run_ranks(spread_over_ranks, 2, folders, name, kind, strategy, 2):
        assert metrics == pytest.approx(one[1], rel=2e-4, abs=2e-4, nan_ok=True)
        require_same_update(weights, one[0], one[2])


# -- what can't work ----------------------------------------------------------------------------------------------


def test_a_reference_needs_the_graft(folders):
    module, data = make(folders, DPO())
    with pytest.raises(ShadowlitError, match="Expected a GraftCallback, which holds the start"):
        fit(module, data, callbacks=[], limit_val_batches=0)


@pytest.mark.parametrize(("objective", "samples"), [(DPO, "conversations"), (None, "pairs"), (KTO, "pairs")])
def test_data_of_another_objective_are_refused(folders, objective, samples):
    pair, rows = ModelPair(*map(str, folders)), folders[0].parent / "talks.jsonl"
    talk = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    rows.write_text(json.dumps({"messages": talk}) + "\n")
    source = rows if samples == "conversations" else folders[0].parent / "train_pairs.jsonl"
    module = ShadowModule(pair, None, objective and objective())
    with pytest.raises(ShadowlitError, match=f"model.objective is .*but the data module gives {samples}"):
        fit(module, ShadowData(pair, train=str(source), samples=samples, cache=False))
