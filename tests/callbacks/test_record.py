"""What callbacks add to a validation's record, and what no fit leaves to the next."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from shadowlit.callbacks.record import ValidationRecord
from shadowlit.errors import GraftError
from shadowlit.grafting.subject import TUNED
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import KTO
from tests.tiny import save_pair

WAYS = {
    "item": lambda metrics, name: metrics.__setitem__(name, 1.0),
    "update": lambda metrics, name: metrics.update({name: 1.0}),
    "or": lambda metrics, name: metrics.__ior__({name: 1.0}),
}


class First:
    pass


class Second:
    pass


@pytest.mark.parametrize("add", WAYS.values(), ids=WAYS)
def test_two_callbacks_do_not_overwrite_each_other_s_metric(add):
    metrics, first = ValidationRecord().metrics, First()
    for _ in range(2):  # a subject whose pass is repeated
        metrics.callback = first
        add(metrics, "val/own")
    metrics.callback = None
    add(metrics, "val/other")
    assert metrics == {"val/own": 1.0, "val/other": 1.0} == copy.deepcopy(metrics)
    for callback, told in ((First(), "before First adds it, by First"), (Second(), "Second adds it, by First"),
                           (None, "before a callback adds it, by First")):  # fmt: skip
        metrics.callback = callback
        with pytest.raises(GraftError, match=f"val/own was added .*{told}, and one value would replace the other"):
            add(metrics, "val/own")
    metrics.callback = None
    with pytest.raises(GraftError, match=r"val/other was added .* a callback adds it, by a callback"):
        add(metrics, "val/other")


def test_a_fit_starts_without_what_an_earlier_one_has_left(tmp_path):
    """An objective that several fits share, and a validation or an accumulation that was interrupted."""
    pair, objective = ModelPair(*map(str, save_pair(tmp_path))), KTO()
    objective.kl = 1.0
    module = ShadowModule(pair, objective=objective)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module._sums = ("loss", "count"), torch.ones(2)
    module._scores[TUNED, ""] = SimpleNamespace()
    module.setup("validate")
    assert objective.kl == 1 and module._sums is None and not module._scores
    module.setup("fit")
    assert objective.kl == 0
    module.on_load_checkpoint({"kl": 2.0, "state_dict": {}})  # of the run that is resumed, which comes after
    assert objective.kl == 2
