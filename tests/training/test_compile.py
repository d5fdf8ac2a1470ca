"""Compiled layers: the graft swaps weights in place, so that nothing is compiled for it."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from tests.synthetic import RandomData
from tests.tiny import save_pair
from tests.training import test_anchors as anchored
from tests.training import test_anchors_kl as divergence


class Watch(Callback):
    """Notes how many graphs were compiled when a validation begins, when its plain pass is over, and at its end."""

    def __init__(self, compiled):
        self.compiled, self.seen = compiled, []

    def on_validation_start(self, trainer, pl_module):
        self.seen.append([self.compiled.frame_count])

    def on_validation_epoch_end(self, trainer, pl_module):  # stands before the graft
        self.seen[-1].append(self.compiled.frame_count)

    def on_validation_end(self, trainer, pl_module):
        self.seen[-1].append(self.compiled.frame_count)


def fit(folders, kind, compiled=None, scales=(1.0, 0.5), **options):
    seed_everything(0)
    adapter = LoraConfig(r=4) if kind == "lora" else None
    module = ShadowModule(
        ModelPair(*map(str, folders)), adapter, lr=1e-3, compile_layers=compiled is not None, **options
    )
    watch = Watch(compiled)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, inference_mode=False,
        num_sanity_val_steps=0, val_check_interval=4,
        callbacks=[*([watch] if compiled else []), GraftCallback(scales=list(scales))],
    )  # fmt: skip
    trainer.fit(module, RandomData())
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return watch.seen, metrics


@pytest.fixture
def compiled(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: original(self, backend=counter))
    yield counter
    torch._dynamo.reset()


def test_grafted_validation_compiles_nothing(tmp_path, compiled):
    folders = save_pair(tmp_path, "qwen3")
    seen, metrics = fit(folders, "full", compiled)
    assert metrics == pytest.approx(fit(folders, "full")[1], rel=1e-5)
    assert seen[0][0] > 0 and len(seen) == 4
    assert [plain for _, plain, _ in seen] == [end for *_, end in seen]
    assert len({tuple(later) for later in seen[1:]}) == 1


def test_an_adapter_compiles_once_for_other_strengths(tmp_path, compiled):
    """Its strength is a number in the graph: the first one that isn't the training's, 0.5 or 0, makes it a variable."""
    folders = save_pair(tmp_path, "qwen3")
    seen, metrics = fit(folders, "lora", compiled, activation_checkpointing="selective")
    assert metrics == pytest.approx(fit(folders, "lora")[1], rel=1e-5)
    assert seen[0][2] - seen[0][1] <= 2
    assert {tuple(later) for later in seen[1:]} == {(seen[0][2],) * 3}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_anchors_and_a_divergence_train_the_same(compiled, tmp_path, kind):
    pair, found = ModelPair(*map(str, save_pair(tmp_path, "qwen3"))), []
    for compiles in (False, True):
        module = anchored.make_module(pair, kind, divergence.anchors(0.5), compile_layers=compiles)
        anchored.fit(module, divergence.Neutral(8, 1))
        found.append(anchored.parameters(module))
    assert compiled.frame_count > 0
    for name, value in found[1].items():
        torch.testing.assert_close(value, found[0][name], rtol=0, atol=1e-6)
