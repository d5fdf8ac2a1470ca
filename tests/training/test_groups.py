"""Parameter groups by pattern and by a file of multipliers, Muon on shards, optimizers that average, schedules."""

import copy
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.errors import ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training.groups import ParameterGroup, group_parameters, read_multipliers
from shadowlit.training.module import ShadowModule
from shadowlit.training.optimizer import ShardedMuon, make_optimizer
from tests.distributed import run_ranks
from tests.synthetic import RandomData
from tests.tiny import save_pair
from tests.training.test_module import train

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return ModelPair(*map(str, save_pair(tmp_path_factory.mktemp("pair"), "qwen3")))


class Unread(RandomData):
    """Data that must not be read."""

    def prepare_data(self):
        raise AssertionError("the data were read")


def test_groups_by_hand():
    """The first group that matches counts; the factors of pattern, file and LoRA+ are multiplied."""
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    lora = "model.base_model.model.model.layers.0.mlp.up_proj.lora_{}.default.weight"
    named = {lora.format("A"): matrix, lora.format("B"): matrix.clone(), f"model.{NORM}": vector}
    groups = [ParameterGroup("lora_A", lr_scale=0.5), ParameterGroup("up_proj|norm", weight_decay=0.3)]
    options = {"lr": 0.1, "loraplus_lr_ratio": 8.0, "multipliers": {UP: 3.0}}
    found = group_parameters(named.items(), weight_decay=0.2, groups=groups, **options)
    assert found == [
        {"params": [named[lora.format("A")]], "weight_decay": 0.2, "lr": pytest.approx(0.15)},
        {"params": [named[lora.format("B")]], "weight_decay": 0.3, "lr": pytest.approx(2.4)},
        {"params": [vector], "weight_decay": 0.3},
    ]
    (matrices, vectors) = group_parameters({UP: matrix, NORM: vector}.items(), lr=0.1, weight_decay=None)
    assert (matrices, vectors) == ({"params": [matrix]}, {"params": [vector], "weight_decay": 0.0})


class Recording(ShadowModule):
    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}


def test_a_step_of_gradient_descent(pair, tmp_path):
    """``w - lr · scale · g``, with scales by pattern and by file, on a schedule at half of its peak."""
    (tmp_path / "scales.json").write_text(json.dumps({UP: 4}))
    module = Recording(
        pair, optimizer=partial(torch.optim.SGD, lr=0.5), schedule="constant", warmup_ratio=1.0,
        parameter_groups=[ParameterGroup("self_attn", lr_scale=0.25)], lr_multipliers=str(tmp_path / "scales.json"),
    )  # fmt: skip
    train(module, max_steps=1)
    seen = set()
    for name, parameter in module.model.named_parameters():
        scale = 4.0 if name == UP else 0.25 if "self_attn" in name else 1.0
        expected = module.before[name] - 0.5 * 0.5 * scale * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)
        seen.add(scale)
    assert seen == {4.0, 0.25, 1.0}


@pytest.mark.parametrize(("group", "message"), [
    ({"match": "nowhere"}, r"match='nowhere', which matches none of the \d+ trained parameters: model.*Write a"),
    ({"match": "("}, r"match='\(', which is not a regular expression"),
    ({"match": "norm", "lr_scale": 0.0}, r"lr_scale=0.0.*; expected an lr_scale above 0"),
    ({"match": "norm", "weight_decay": -1.0}, r"expected an lr_scale above 0 and a weight_decay of at least 0"),
], ids=lambda _: "")  # fmt: skip
def test_groups_that_do_not_fit(pair, group, message):
    with pytest.raises(ShadowlitError, match=message):
        train(ShadowModule(pair, parameter_groups=[ParameterGroup(**group)]), max_steps=1)


@pytest.mark.parametrize(("text", "message"), [
    (None, r"none\.json, which can't be read as JSON \(.*Expected an object of positive numbers by tensor name"),
    ("{", "can't be read as JSON"),
    ("[1]", "can't be read as JSON"),
    (json.dumps({UP: 0.0}), rf"in which {UP} is not a positive number. Correct or remove it"),
    (json.dumps({UP: "2"}), "is not a positive number"),
    (json.dumps({UP: 1, "model.up.weight": 1}), r"in which model\.up\.weight is not a tensor of pair\.base"),
], ids=lambda _: "")  # fmt: skip
def test_files_of_multipliers_that_do_not_fit(pair, tmp_path, text, message):
    """Refused before the data are read."""
    file = tmp_path / ("none.json" if text is None else "scales.json")
    if text is not None:
        file.write_text(text)
    with pytest.raises(ShadowlitError, match=message):
        train(ShadowModule(pair, lr_multipliers=str(file)), Unread())


def test_multipliers_of_what_is_frozen_are_refused(pair, tmp_path):
    (tmp_path / "scales.json").write_text(json.dumps({NORM: 2}))
    with pytest.raises(ShadowlitError, match=r"names none of the \d+ trained parameters, such as .*lora_A.weight"):
        train(ShadowModule(pair, LoraConfig(r=2), lr_multipliers=str(tmp_path / "scales.json")))


def test_the_documented_file(pair, tmp_path):
    """The example in the documentation, whose file a training takes: the mean is 1 where nothing is cut off."""
    text = (Path(__file__).parents[2] / "docs/reference/optimizers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(code, names)
    names["write_multipliers"](pair.base, pair.instruct, tmp_path / "scales.json")
    before, after = pair.readers()
    found = read_multipliers(str(tmp_path / "scales.json"), pair)
    changes = {name: (after.read(name) - before.read(name)).float().abs().mean() for name in found}
    assert all(name in found for name in (UP, "model.embed_tokens.weight")) and NORM not in found
    assert found[UP] == pytest.approx(float(changes[UP] / torch.stack(list(changes.values())).mean()), rel=1e-5)
    train(ShadowModule(pair, lr_multipliers=str(tmp_path / "scales.json")), max_steps=1)


# -- Muon on shards -----------------------------------------------------------------------------------------------


def sharded_muon_is_whole():
    mesh, equal = init_device_mesh("cpu", (2,)), []
    torch.manual_seed(0)
    for shape in ((8, 6), (7, 16), (1, 5)):
        start, *gradients = torch.randn(3, *shape)
        whole, sharded = (torch.nn.Parameter(x) for x in (start.clone(), distribute_tensor(start, mesh, [Shard(0)])))
        optimizers = torch.optim.Muon([whole], lr=0.1), ShardedMuon([sharded], lr=0.1)
        for gradient in gradients:
            whole.grad, sharded.grad = gradient.clone(), distribute_tensor(gradient, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        states = whole, *optimizers[0].state[whole].values(), sharded, *optimizers[1].state[sharded].values()
        equal += [torch.equal(one, other.full_tensor()) for one, other in zip(states[:2], states[2:], strict=True)]
    return equal


def test_muon_of_shards_is_muon_of_the_whole():
    """Bit for bit: weights and momentum of matrices that divide evenly, unevenly, and have fewer rows than ranks."""
    assert run_ranks(sharded_muon_is_whole, 2) == [[True] * 6] * 2


def named_parameters(mesh=None):
    """A matrix, a norm, an embedding and a matrix with a rate of its own, the same on every call."""
    torch.manual_seed(0)
    shapes = {UP: (8, 6), NORM: (6,), "model.embed_tokens.weight": (10, 6), "model.layers.1.mlp.up_proj.weight": (7, 6)}
    values = {f"model.{name}": torch.randn(3, *shape) for name, shape in shapes.items()}
    placed = (lambda x: x) if mesh is None else (lambda x: distribute_tensor(x, mesh, [Shard(0)]))
    return {n: (torch.nn.Parameter(placed(v[0].clone())), *map(placed, v[1:])) for n, v in values.items()}


def muon_of(named):
    groups = [ParameterGroup(r"layers\.1", lr_scale=0.5), ParameterGroup("embed", weight_decay=0.3)]
    choice = partial(torch.optim.Muon, momentum=0.9, weight_decay=0.2)
    return make_optimizer(
        choice, [(n, p) for n, (p, *_) in named.items()], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0,
        groups=groups,
    )  # fmt: skip


def stepped(named, optimizers, start=0):
    for number in range(start, 2):
        for parameter, *gradients in named.values():
            parameter.grad = gradients[number].clone()
        for optimizer in optimizers:
            optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p, *_ in named.values()]


def test_muon_of_all_weights_is_adamw_of_what_is_no_matrix_of_a_layer():
    """Each weight as its own optimizer alone steps it; a state that is loaded goes on bit for bit."""
    one, other, third = named_parameters(), named_parameters(), named_parameters()
    whole = stepped(one, [muon_of(one)])
    up, norm, embedding, second = (p for p, *_ in other.values())
    adamw = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    alone = [
        torch.optim.Muon([up], 0.1, momentum=0.9, weight_decay=0.2),
        torch.optim.AdamW([norm], weight_decay=0.0, **adamw),
        torch.optim.AdamW([embedding], weight_decay=0.3, **adamw),
        torch.optim.Muon([second], 0.05, momentum=0.9, weight_decay=0.2),
    ]
    for found, expected in zip(whole, stepped(other, alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # AdamW's kernels differ in their last bits

    first = muon_of(third)
    for parameter, gradient, _ in third.values():
        parameter.grad = gradient.clone()
    first.step()
    again = muon_of(third)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(stepped(third, [again], start=1), whole, strict=True))


def sharded_full_muon():
    mesh = init_device_mesh("cpu", (2,))
    one, two = named_parameters(), named_parameters(mesh)
    return [torch.equal(a, b) for a, b in zip(stepped(one, [muon_of(one)]), stepped(two, [muon_of(two)]), strict=True)]


def test_muon_of_all_weights_on_shards():
    assert run_ranks(sharded_full_muon, 2) == [[True] * 4] * 2


def test_full_tuning_with_muon(pair):
    options = {"optimizer": partial(torch.optim.Muon, lr=1e-2), "warmup_ratio": 0}
    first = train(ShadowModule(pair, **options), max_steps=1)
    last = train(ShadowModule(pair, **options), max_epochs=4)
    assert last.callback_metrics["train/loss"] < first.callback_metrics["train/loss"] - 0.1
    assert type(last.optimizers[0]).__name__ == "MuonAndAdamW"


# -- optimizers of other packages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "kind"), [
    ("bitsandbytes.optim.AdEMAMix", "lora"), ("bitsandbytes.optim.AdamW8bit", "full"),
    ("bitsandbytes.optim.Lion", "full"), ("torchao.optim.AdamW8bit", "lora"), ("torchao.optim.AdamW4bit", "full"),
])  # fmt: skip
def test_optimizers_of_other_packages_train(pair, path, kind):
    """The first step of each has the size of its rate: lr * sign(gradient), where the gradient is not small."""
    package, _, name = path.partition(".optim.")
    factory = getattr(pytest.importorskip(f"{package}.optim"), name)
    module = Recording(
        pair, LoraConfig(r=2) if kind == "lora" else None, optimizer=partial(factory, lr=1e-3),
        schedule="constant", warmup_ratio=0,
    )  # fmt: skip
    train(module, max_steps=1)
    moved = 0
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad and (large := parameter.grad.abs() > 1e-5).any():
            step = (parameter.detach() - module.before[name])[large]
            decayed = 1e-3 * 0.01 * module.before[name][large]  # torchao's decay by default, and bitsandbytes'
            assert ((step + 1e-3 * parameter.grad[large].sign()).abs() <= 3e-5 + decayed.abs()).all(), name
            moved += 1
    assert moved > 5


# -- optimizers that average --------------------------------------------------------------------------------------


class Averaging(torch.optim.SGD):
    """Steps from one set of weights and evaluates another, as schedule-free optimizers do: here, shifted by 1."""

    training = False

    def _shift(self, training, by):
        if self.training != training:
            self.training = training
            for group in self.param_groups:
                for p in group["params"]:
                    p.data += by

    def train(self):
        self._shift(True, 1.0)

    def eval(self):
        self._shift(False, -1.0)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.training
        return super().step(closure)


class Watching(ShadowModule):
    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), self.trainer.optimizers[0].training]
        return super().training_step(batch, batch_idx)

    def validation_step(self, *args, **kwargs):
        self.seen.append(self.trainer.optimizers[0].training)
        return super().validation_step(*args, **kwargs)


def test_averages_are_what_is_validated_and_saved(pair):
    """Gradients are taken in training mode, in each micro-batch; the grafted passes run on the averages."""
    module = Watching(pair, optimizer=partial(Averaging, lr=1e-3), schedule="constant", warmup_ratio=0)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        accumulate_grad_batches=2, limit_train_batches=4, limit_val_batches=1, num_sanity_val_steps=0,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[GraftCallback(baselines=False)],
    )  # fmt: skip
    trainer.fit(module, RandomData())
    assert module.seen == [True] * 4 + [False] * 4  # two sets, of the tuned and the grafted model
    assert not trainer.optimizers[0].training


def test_a_schedule_free_training(pair):
    """Resuming needs no more than the averages and the optimizer's own state."""
    schedulefree = pytest.importorskip("schedulefree")
    options = {"optimizer": partial(schedulefree.AdamWScheduleFree, lr=1e-2), "schedule": "constant", "warmup_ratio": 0}
    module = ShadowModule(pair, **options)
    first = train(ShadowModule(pair, **options), max_steps=1).callback_metrics["train/loss"]
    assert train(module, max_epochs=4).callback_metrics["train/loss"] < first - 0.1


# -- schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "steps", "message"), [
    ({"lr_scheduler": "warmup_stable_decay"}, 8, "num_decay_steps"),
    ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 8}}, 8,
     r"num_decay_steps=8, which with 1 step of warm-up is more than the 8 steps of the training"),
    ({"lr_scheduler": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}}, 8, "'constant', which takes none"),
    ({"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, -1, "lr_scheduler is None, which takes none"),
    ({"lr_scheduler": "cosine_with_min_lr"}, -1, "model.lr_scheduler_kwargs can't make a schedule"),
    ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": {"cycles": 2}}, -1, "'cycles'"),
], ids=lambda _: "")  # fmt: skip
def test_schedules_that_do_not_fit(pair, options, steps, message):
    """Found before the data are read."""
    with pytest.raises(ShadowlitError, match=message):
        train(ShadowModule(pair, **options), Unread(), max_steps=steps)


def rates(pair, name, **options):
    seen = []

    class Rates(ShadowModule):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            seen.append(round(optimizer.param_groups[0]["lr"], 4))

    train(Rates(pair, lr=1.0, warmup_ratio=0, lr_scheduler=name, lr_scheduler_kwargs=options), max_steps=8)
    return seen


def test_schedules_by_hand(pair):
    assert rates(pair, "warmup_stable_decay", num_decay_steps=4, decay_type="linear") == [
        1,
        1,
        1,
        1,
        1,
        0.75,
        0.5,
        0.25,
    ]
    restarts = rates(pair, "cosine_with_restarts", num_cycles=2)
    assert restarts[:4] == restarts[4:] == [1.0, 0.8536, 0.5, 0.1464]
    assert rates(pair, "cosine_with_min_lr", min_lr_rate=0.5)[::4] == [1.0, 0.75]
