"""AdamW by hand, clipped under autocast, and with moments of 8 bits where a library is there."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import shadowlit.training.optimizer as optimizer_module
from shadowlit.errors import ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.optimizer import OffloadedAdamW, make_optimizer
from tests.distributed import run_ranks
from tests.tiny import save_pair
from tests.training.test_module import parameters, train

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.5}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return ModelPair(*map(str, save_pair(tmp_path_factory.mktemp("pair"), "qwen3")))


def test_two_steps_by_hand():
    """A matrix decays, a vector does not; gradients 1 and then 3 have the mean moments that the paper gives."""
    matrix, vector = torch.nn.Parameter(torch.full((2, 2), 2.0)), torch.nn.Parameter(torch.full((2,), 2.0))
    optimizer = make_optimizer("adamw", [("matrix", matrix), ("vector", vector)], **OPTIONS)
    for gradient in (1.0, 3.0):
        matrix.grad, vector.grad = torch.full((2, 2), gradient), torch.full((2,), gradient)
        optimizer.step()
    first = (0.9 * 0.1 + 0.1 * 3) / (1 - 0.9**2)
    second = (0.99 * 0.01 + 0.01 * 9) / (1 - 0.99**2)
    moved = 0.1 * (1 + first / math.sqrt(second))
    assert vector[0].item() == pytest.approx(2 - moved)
    # Decay comes first in each step: w <- (1 - lr * decay) * w - lr * update.
    assert matrix[0, 0].item() == pytest.approx((2 * 0.95 - 0.1) * 0.95 - (moved - 0.1))


def test_one_kernel_that_may_be_clipped_under_autocast(pair):
    module = ShadowModule(pair, lr=1e-3)
    trainer = train(module, precision="bf16-mixed", gradient_clip_val=1.0, max_steps=2)
    assert trainer.optimizers[0].defaults["fused"] is True


def fused_is_unfused():
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 4), torch.randn(6, 4)
    whole, sharded = torch.nn.Parameter(start.clone()), torch.nn.Parameter(distribute_tensor(start, mesh))
    whole.grad, sharded.grad = gradient, distribute_tensor(gradient, mesh)
    for parameter in (whole, sharded):
        make_optimizer("adamw", [("parameter", parameter)], **OPTIONS).step()
    return torch.equal(sharded.full_tensor(), whole)


def test_shards_take_the_step_of_the_whole():
    assert run_ranks(fused_is_unfused, 2) == [True, True]


def test_offloaded_moments_change_nothing(pair, tmp_path):
    """Also after a resume. On a CPU the moments stay where they are, and the parameters come one by one."""
    ends = {}
    for offload in (False, True):
        module = ShadowModule(pair, lr=1e-3, weight_decay=0.1, offload_optimizer=offload)
        checkpoint = ModelCheckpoint(tmp_path / str(offload), filename="{step}", every_n_train_steps=8, save_top_k=-1)
        trainer = train(module, callbacks=[checkpoint], max_epochs=2)
        assert isinstance(trainer.optimizers[0], OffloadedAdamW) is offload
        assert len(trainer.optimizers[0].param_groups) == 2
        ends[offload] = parameters(module)
    assert torch.equal(ends[True], ends[False])
    for offload in (False, True):  # either goes on from the other's checkpoint
        resumed = ShadowModule(pair, lr=1e-3, weight_decay=0.1, offload_optimizer=offload)
        train(resumed, ckpt_path=tmp_path / str(not offload) / "step=8.ckpt", max_epochs=2)
        assert torch.equal(parameters(resumed), ends[False])


def test_moments_go_home_after_each_parameter():
    """As on a GPU: what comes back from a step isn't what lay in the CPU's memory, which is filled again."""
    moment, home = torch.arange(3.0), torch.zeros(3)
    assert optimizer_module._to_cpu(moment, home) is home
    assert torch.equal(home, moment)
    assert optimizer_module._to_cpu(moment, None) is not moment


def test_moments_of_8_bits_stay(pair):
    with pytest.raises(ShadowlitError, match=r"offload_optimizer is true, but model\.optimizer is 'adamw_8bit'"):
        train(ShadowModule(pair, optimizer="adamw_8bit", offload_optimizer=True))


def test_8_bits_need_a_library(pair, monkeypatch):
    monkeypatch.setattr(optimizer_module, "find_spec", lambda name: None)
    with pytest.raises(ShadowlitError, match=r"'adamw_8bit', which needs the package torchao or bitsandbytes.*adamw\."):
        train(ShadowModule(pair, optimizer="adamw_8bit"))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_8_bits_learn_like_32_and_resume(tmp_path):
    """Large enough for its blocks; the resumed run is the uninterrupted one, bit for bit."""
    pair = ModelPair(*map(str, save_pair(tmp_path, "qwen3", hidden=64)))
    ends = {}
    for name in ("adamw", "adamw_8bit"):
        module = ShadowModule(pair, lr=1e-3, optimizer=name)
        checkpoint = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        trainer = train(module, callbacks=[checkpoint], max_epochs=2)
        ends[name] = parameters(module), trainer.callback_metrics["train/loss"].item()
    assert ends["adamw_8bit"][1] == pytest.approx(ends["adamw"][1], rel=2e-3)
    assert not torch.equal(ends["adamw_8bit"][0], ends["adamw"][0])
    resumed = ShadowModule(pair, lr=1e-3, optimizer="adamw_8bit")
    train(resumed, ckpt_path=tmp_path / "adamw_8bit/step=8.ckpt", max_epochs=2)
    assert torch.equal(parameters(resumed), ends["adamw_8bit"][0])


@pytest.mark.parametrize(("own", "total"), [
    ({"schedule": "constant", "warmup_ratio": 0.0}, 0),
    ({"lr_scheduler": torch.optim.lr_scheduler.StepLR}, 0),
    ({}, None),
    ({"schedule": "constant"}, None),
    ({"lr_scheduler": "cosine", "warmup_ratio": 0.0}, None),
])  # fmt: skip
def test_a_schedule_without_an_end(own, total):
    """Of a run that only max_time ends: a constant rate needs no number of steps."""
    trainer = SimpleNamespace(estimated_stepping_batches=math.inf, max_epochs=-1, max_steps=-1)
    settings = {"lr_scheduler": None, "schedule": "cosine", "warmup_ratio": 0.1, **own}
    asked = []

    def made(_, total, **groups):
        asked.append(total)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}}

    module = SimpleNamespace(
        trainer=trainer, named_parameters=lambda: [], _optimizer=made, parameter_groups=[], _multipliers=None,
        **settings,
    )  # fmt: skip
    if total is not None:
        ShadowModule.configure_optimizers(module)
        assert asked == [total]
        return
    with pytest.raises(
        ShadowlitError, match=r"^trainer.max_epochs is -1 and trainer.max_steps is -1, so .*Set trainer.m"
    ):
        ShadowModule.configure_optimizers(module)
