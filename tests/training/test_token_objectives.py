"""Re-weighted fine-tuning and distances from a reference: each step against whole logits in float64."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.module import ShadowData
from shadowlit.distributed import local, reshard_all, whole
from shadowlit.errors import ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training import linear_loss
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import DFT, EAFT, SFT, TokenObjective
from shadowlit.training.rehearsal import rehearse
from tests.distributed import run_ranks
from tests.rounding import Start, require_same_update
from tests.synthetic import RandomData, random_samples
from tests.tiny import save_pair

WEIGHTS = (0.5, 2.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(8):
            turns = ({"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "abcdefgh"[: 1 + i % 7]})
            file.write(json.dumps({"messages": turns}) + "\n")
    return save_pair(folder, "qwen3", dtype=torch.bfloat16)


class Weighed(RandomData):
    """Four samples, each with a weight."""

    def _loader(self, count, seed):
        samples = random_samples(4, seed)
        for sample, weight in zip(samples, WEIGHTS, strict=True):
            sample["loss_weights"] = torch.full(sample["labels"].shape, weight)
        return DataLoader(samples, batch_size=self.batch_size)


class Recording(ShadowModule):
    """Keeps the trained weights and their gradients of the last step, and what it logged."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.before = {name: p.detach().clone() for name, p in trained}
        self.gradients = {name: p.grad.clone() for name, p in trained}


def make(folders, objective, kind="full", cls=ShadowModule, **options):
    adapter = LoraConfig(r=4, bias="all") if kind == "lora" else None
    lr = 3e-2 if kind == "lora" else 3e-3
    return cls(ModelPair(*map(str, folders)), adapter, objective, lr=lr, schedule="constant", warmup_ratio=0, **options)


def fit(module, data, ckpt_path=None, callbacks=None, strategy="auto", devices=1, **options):
    seed_everything(0)
    callbacks = [GraftCallback(baselines=False), *([] if callbacks is None else callbacks)]
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=callbacks, limit_val_batches=0,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), log_every_n_steps=1,
        **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


def parameters(module):
    reshard_all(module.model)
    return {name: whole(local(p), p).detach().clone() for name, p in module.model.named_parameters()}


# -- an independent implementation --------------------------------------------------------------------------------


def losses_of(objective, logits, reference, targets):
    """Loss, cross entropy, entropy and divergence of each token, from whole logits."""
    p, r = logits.log_softmax(-1), reference.log_softmax(-1)
    cross_entropy, entropy = F.cross_entropy(logits, targets, reduction="none"), -(p.exp() * p).sum(-1)
    factor = torch.ones_like(cross_entropy)
    if isinstance(objective, DFT):
        factor = p.gather(1, targets[:, None])[:, 0].exp()
    elif isinstance(objective, EAFT):
        most = p.sort(descending=True).values[:, : objective.top_k].exp()
        most = most / most.sum(-1, keepdim=True)
        factor = (-(most * most.log()).sum(-1) / math.log(objective.top_k)) ** objective.alpha
    forward, reverse = F.kl_div(p, r, log_target=True, reduction="none").sum(-1), (p.exp() * (p - r)).sum(-1)
    distance = {"forward": forward, "reverse": reverse, "both": 0.5 * forward + 0.5 * reverse}[objective.kl]
    total = factor.detach() * cross_entropy + objective.kl_weight * distance
    return torch.stack([total, cross_entropy, entropy, distance])


OBJECTIVES = {
    "dft": DFT,
    "eaft": lambda: EAFT(0.7, top_k=5),
    "start": lambda: SFT(0.5),
    "instruct": lambda: SFT(2.0, "reverse", "instruct"),
    "both": lambda: DFT(0.5, "both", "start"),
    "eaft to the instruct": lambda: EAFT(kl_weight=0.5, kl="both", kl_to="instruct"),
}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_whole_logits(folders, name, kind, monkeypatch):
    """The second step, away from the start: two micro-batches, in chunks, whose samples have weights."""
    monkeypatch.setattr(linear_loss, "_CHUNK_ELEMENTS", {"cpu": 1})  # 16 tokens a chunk
    objective = OBJECTIVES[name]()
    module = make(folders, objective, kind, Recording)
    logged = fit(module, Weighed(4, 2), accumulate_grad_batches=2)
    model, base, instruct = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (folders[0], *folders)
    )
    if kind == "lora":
        model = get_peft_model(model, module.adapter)
    model.load_state_dict({name: p.double() for name, p in module.before.items()}, strict=False)
    sums, divisor = 0.0, 0.0
    for sample, weight in zip(random_samples(4, 0), WEIGHTS, strict=True):
        ids, chosen = sample["input_ids"][None], sample["labels"][1:] != -100
        with torch.no_grad():
            reference = (instruct if objective.kl_to == "instruct" else base)(input_ids=ids).logits[0, :-1][chosen]
        logits = model(input_ids=ids).logits[0, :-1][chosen]
        sums = sums + weight * losses_of(objective, logits, reference, sample["labels"][1:][chosen]).sum(1)
        divisor += weight * int(chosen.sum())
    loss, *others = sums / divisor
    loss.backward()
    for what, value in zip(("loss", "cross_entropy", "entropy", "kl"), (loss, *others), strict=True):
        assert what != "kl" or bool(objective.kl_weight) == ("train/kl" in logged)
        assert logged.get(f"train/{what}", value.item()) == pytest.approx(value.item(), rel=1e-5, abs=1e-5)
    assert others[-1] > 1e-3  # a distance that no rounding makes
    gradients = dict(model.named_parameters())
    for name, gradient in module.gradients.items():
        expected = gradients[name].grad
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=5e-5 * expected.abs().max().item())


# -- however a batch is spread ------------------------------------------------------------------------------------


def rows(folders, **options):
    return ShadowData(
        ModelPair(*map(str, folders)), train=str(folders[0].parent / "rows.jsonl"), cache=False, max_length=64,
        num_workers=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_accumulated_and_packed_are_the_whole_batch(folders, kind):
    found = []
    whole, single, packed = {"batch_size": 4}, {"batch_size": 1}, {"batch_size": 4, "packing": "padding_free"}
    for options, accumulate in ((whole, 1), (single, 4), (packed, 1)):
        start = Start()
        module = make(folders, EAFT(kl_weight=0.5, kl="both", kl_to="instruct"), kind)
        logged = fit(module, rows(folders, **options), callbacks=[start], accumulate_grad_batches=accumulate)
        found.append((parameters(module), logged, start.weights))
    for weights, logged, start in found[1:]:
        require_same_update(weights, found[0][0], start)
        assert logged == pytest.approx(found[0][1], rel=1e-5)


def spread_over_ranks(folders, kind, kl_to, strategy, world_size):
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    module, start = make(folders, EAFT(kl_weight=0.5, kl="both", kl_to=kl_to), kind), Start()
    data, accumulate = rows(folders, batch_size=2 // world_size), {"accumulate_grad_batches": 2}
    return fit(module, data, None, [start], strategy, world_size, **accumulate), parameters(module), start.weights


@pytest.mark.parametrize(
    ("kind", "kl_to", "strategy"),
    [
        ("lora", "instruct", "fsdp2"),
        pytest.param("full", "start", "fsdp2", marks=pytest.mark.slow),
        pytest.param("lora", "start", "fsdp2", marks=pytest.mark.slow),
        pytest.param("full", "instruct", "ddp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one(folders, kind, kl_to, strategy):
    """Two micro-batches a step, whose gradients FSDP2 keeps, with LoRA, while the reference predicts the next."""
    (one,) = run_ranks(spread_over_ranks, 1, folders, kind, kl_to, "auto", 1)
    for logged, weights, _ in run_ranks(spread_over_ranks, 2, folders, kind, kl_to, strategy, 2):
        assert logged == pytest.approx(one[0], rel=1e-4)
        require_same_update(weights, one[1], one[2])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_is_uninterrupted(folders, tmp_path, kind):
    """The reference of a resumed run is the Base, not what the checkpoint holds; at the Base the distance is 0."""
    whole, half, again = (make(folders, SFT(0.5), kind) for _ in range(3))
    assert fit(make(folders, SFT(0.5), kind), rows(folders, batch_size=4), max_steps=1)["train/kl"] == 0
    expected = fit(whole, rows(folders, batch_size=4))
    saved = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2)
    fit(half, rows(folders, batch_size=4), callbacks=[saved], max_steps=2)
    assert fit(again, rows(folders, batch_size=4), str(tmp_path / "half.ckpt")) == expected
    assert all(torch.equal(one, parameters(again)[name]) for name, one in parameters(whole).items())


# -- what can't work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make_one", "message"), [
    (lambda: SFT(-1.0), r"SFT's kl_weight is -1.0; expected a number of at least 0"),
    (lambda: DFT(kl="reverse"), r"DFT's kl is 'reverse' .* but kl_weight=0 leaves the divergence out"),
    (lambda: EAFT(kl_to="instruct"), r"kl_to is 'instruct', but kl_weight=0"),
    (lambda: EAFT(-1.0), r"EAFT's alpha is -1.0 and its top_k is 20; expected"),
    (lambda: EAFT(top_k=1), r"its top_k is 1; expected an alpha of at least 0 and a top_k of at least 2"),
])  # fmt: skip
def test_options_out_of_range(make_one, message):
    with pytest.raises(ShadowlitError, match=message):
        make_one()


def test_a_distance_needs_the_graft(folders):
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, max_steps=1
    )
    with pytest.raises(ShadowlitError, match=r"SFT with a distance from the base.*Expected a GraftCallback"):
        trainer.fit(make(folders, SFT(0.1)), rows(folders, batch_size=4))


class Pull(TokenObjective):
    """One's own: the squared distance from the Instruct's logits."""

    token_reference = "instruct"

    def token_losses(self, logits, targets, reference):
        return (logits - reference).square().mean(-1)


def test_one_s_own_objective_gets_the_reference(folders):
    module = make(folders, Pull())
    first = fit(make(folders, Pull()), rows(folders, batch_size=8), max_steps=1)["train/loss"]
    assert fit(module, rows(folders, batch_size=8), max_epochs=20)["train/loss"] < 0.5 * first
    wrong = Pull()
    wrong.token_reference = "base"
    with pytest.raises(ShadowlitError, match=r"Pull, whose token_reference is 'base'; expected 'start', 'instruct'"):
        fit(make(folders, wrong), rows(folders, batch_size=8))
    rehearse(Pull(), Pull().configure_scores, {}, 16)  # with random logits for both
