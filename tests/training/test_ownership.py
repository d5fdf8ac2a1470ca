"""Two that log one name: an error that names both, wherever they log, and nothing for one that logs it again."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from shadowlit.callbacks.record import AddedMetrics, ValidationRecord
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.subject import TUNED
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import KTO, SFT
from tests.tiny import save_pair


class Adding(Callback):
    """Adds ``name`` to a record, in each way that a dict offers."""

    def __init__(self, name="val/own"):
        self.name = name

    def on_subject(self, trainer, module, subject, record):
        self.helper(record, trainer)

    def helper(self, record, way):
        if way == "item":
            record.metrics[self.name] = 1.0
        elif way == "update":
            record.metrics.update({self.name: 1.0})
        elif way == "or":
            record.metrics |= {self.name: 1.0}
        else:
            record.metrics.setdefault(self.name, 1.0)


class Corrected(Adding):
    """Replaces what its base class has added."""

    def on_subject(self, trainer, module, subject, record):
        super().on_subject(trainer, module, subject, record)
        record.metrics[self.name] *= 2


class Logging(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.log_dict({"train/loss": 1.0, "train/other": 1.0})


class Mine(ShadowModule):
    def training_step(self, batch, batch_idx):
        self.log("train/loss", 0.0)


class Schedule(SFT):
    def finish_step(self, sums):
        return {"lr": sums["loss"]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return ModelPair(*map(str, save_pair(tmp_path_factory.mktemp("pair"))))


@pytest.mark.parametrize("way", ["item", "update", "or"])
def test_two_callbacks_that_add_one_metric(way):
    record, first = ValidationRecord(), Adding()
    for _ in range(2):  # a subject whose pass is repeated
        first.on_subject(way, None, TUNED, record)
        first.on_subject("setdefault", None, TUNED, record)
    second = Corrected("val/other")
    second.on_subject(way, None, TUNED, record)
    assert record.metrics == {"val/own": 1.0, "val/other": 2.0} == copy.deepcopy(record.metrics)
    with pytest.raises(ShadowlitError, match="val/own would be logged by Adding and by another Adding, and one value"):
        Adding().on_subject(way, None, TUNED, record)
    with pytest.raises(ShadowlitError, match=r"val/other would be logged by Corrected and by Adding, .* Rename one"):
        Adding("val/other").on_subject(way, None, TUNED, record)
    (lambda: Adding.helper(SimpleNamespace(name="val/plain"), record, way))()
    with pytest.raises(ShadowlitError, match=r"val/plain would be logged by .* and by Adding"):
        Adding("val/plain").on_subject(way, None, TUNED, record)


def step(module):
    """What the module logs after a step."""
    module._sums = ("loss", "count"), torch.ones(2)
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    module.on_before_optimizer_step(torch.optim.SGD([parameter]))


def test_a_metric_that_the_module_logs_too(pair, monkeypatch):
    logged = []
    monkeypatch.setattr(LightningModule, "log", lambda self, name, *_, **__: logged.append(name))
    module, callback = Mine(pair), Logging()
    for _ in range(2):
        step(module)
    assert logged == ["train/loss", "train/tokens", "train/lr"] * 2
    with pytest.raises(ShadowlitError, match="train/loss would be logged by ShadowModule and by Logging, "):
        callback.on_train_batch_end(None, module)
    with pytest.raises(ShadowlitError, match="train/loss would be logged by ShadowModule and by Mine, "):
        module.training_step(None, 0)
    with pytest.raises(ShadowlitError, match="train/lr would be logged by Schedule and by ShadowModule, "):
        step(ShadowModule(pair, objective=Schedule()))
    added = ShadowModule(pair)
    added.callback_metrics = AddedMetrics()
    Adding("train/other").on_subject("item", None, TUNED, SimpleNamespace(metrics=added.callback_metrics))
    added._log_scores("val")
    with pytest.raises(ShadowlitError, match="train/other would be logged by Adding and by Logging, "):
        callback.on_train_batch_end(None, added)


def test_a_set_and_a_metric_of_all_sets_with_one_name(pair):
    module = ShadowModule(pair)
    metric = SimpleNamespace(compute=lambda: {"loss": 1.0})
    module._scores = {
        (TUNED, ""): SimpleNamespace(compute=lambda: {"left/loss": 1.0}), (TUNED, "left"): metric,
    }  # fmt: skip
    with pytest.raises(ShadowlitError, match="left/loss would be logged by all sets together and by the set 'left', "):
        module.scores(TUNED)


def test_a_fit_starts_without_what_an_earlier_one_has_left(pair):
    """An objective that several fits share, and a validation or an accumulation that was interrupted."""
    objective = KTO()
    ShadowModule(pair, objective=objective)
    objective.finish_step({name: torch.ones(()) for name in (
        "loss", "count", "tokens", "correct", "chosen", "rejected", "reward_chosen", "reward_rejected", "logp_chosen",
        "logp_rejected", "shifts",
    )})  # fmt: skip
    assert objective.kl == 1
    module = ShadowModule(pair, objective=objective)
    module._sums = ("loss", "count"), torch.ones(2)
    module._scores[TUNED, ""] = SimpleNamespace()
    module.setup("validate")
    assert objective.kl == 1 and module._sums is None and not module._scores
    module.setup("fit")
    assert objective.kl == 0
    module.on_load_checkpoint({"kl": 2.0})  # of the run that is resumed, which comes after
    assert objective.kl == 2
