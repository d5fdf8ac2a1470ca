"""A metric that is monitored under a wrong name is an error before the first step."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.monitored import require_monitored
from shadowlit.errors import ShadowlitError
from shadowlit.training.module import ShadowModule

LOGGED = [f"val/{who}/{name}" for who in ("tuned", "grafted", "grafted@0.5") for name in ("loss", "new/loss")]
MODULE = ShadowModule.__new__(ShadowModule)


def trainer(*callbacks, schedules=(), logged=LOGGED):
    return SimpleNamespace(
        callbacks=list(callbacks), lr_scheduler_configs=list(schedules), callback_metrics=dict.fromkeys(logged, 1.0)
    )


@pytest.mark.parametrize("monitor", ["val/grafted/loss", "val/grafted@0.5/new/loss", "val/instruct/new/loss",
                                     "val/base/loss", "val/grafted/old/score", "val/instruct/old/score", "graft/gain",
                                     "train/loss", "graft/delta_norm", "my/metric"])  # fmt: skip
def test_what_is_logged_may_be_monitored(monitor):
    """By the sanity check, or later: of evaluators, untouched models, and under names outside of val/."""
    require_monitored(trainer(GraftCallback(), ModelCheckpoint(monitor=monitor)), MODULE, ["old"])


@pytest.mark.parametrize(("monitor", "near"), [
    ("val/grafted/los", "Did you mean 'val/grafted/loss'?"),
    ("val/graftd/new/loss", "Did you mean 'val/grafted/new/loss'?"),
    ("val/instruct/lss", "Did you mean 'val/instruct/loss'?"),
    ("graft/gian", "Did you mean 'graft/gain'?"),
    ("vall/grafted/loss", "Did you mean 'val/grafted/loss'?"),
    ("val/accuracy", "Logged are val/grafted/loss, val/grafted/new/loss, val/grafted@0.5/loss, "),
])  # fmt: skip
def test_a_wrong_name_is_an_error(monitor, near):
    with pytest.raises(ShadowlitError) as error:
        require_monitored(trainer(ModelCheckpoint(monitor=monitor)), MODULE, ["old"])
    assert str(error.value).startswith(f"ModelCheckpoint monitors {monitor!r}, which is not logged. {near}")


def test_what_may_be_missing_is_left_alone(recwarn):
    require_monitored(trainer(EarlyStopping("val/none", strict=False), ModelCheckpoint()), MODULE, [])
    require_monitored(trainer(ModelCheckpoint(monitor="val/none"), logged=[]), MODULE, [])  # no sanity check
    assert not recwarn


def test_a_schedule_s_metric_is_looked_for():
    config = SimpleNamespace(reduce_on_plateau=True, strict=True, monitor="val/grafted/los")
    with pytest.raises(ShadowlitError, match=r"^model.lr_scheduler monitors 'val/grafted/los', which"):
        require_monitored(trainer(schedules=[config]), MODULE, [])


class Own(Callback):
    """May log what it likes."""


class OwnModule(ShadowModule):
    """As well."""


@pytest.mark.parametrize(("callbacks", "module", "who"), [([Own()], MODULE, "Own"),
                                                          ([], OwnModule.__new__(OwnModule), "OwnModule")])  # fmt: skip
def test_what_classes_from_outside_may_log_is_warned_of(callbacks, module, who):
    with pytest.warns(UserWarning, match=rf"'val/grafted/los', which is .* first validation, unless {who} logs it"):
        require_monitored(trainer(ModelCheckpoint(monitor="val/grafted/los"), *callbacks), module, [])


def test_the_sanity_check_asks_with_the_evaluators():
    evaluation = EvaluationCallback()
    evaluation.evaluators = {"old": None}
    found = trainer(evaluation, ModelCheckpoint(monitor="val/grafted/old/score"))
    GraftCallback().on_sanity_check_end(found, MODULE)
    evaluation.evaluators = {}
    with pytest.raises(ShadowlitError, match="'val/grafted/old/score', which is not logged"):
        GraftCallback().on_sanity_check_end(found, MODULE)
