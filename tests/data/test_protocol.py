"""What a run's data module lacks has a default: a plain one, only loaders, or some of the members."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from shadowlit.data.module import ShadowData
from shadowlit.data.protocol import DEFAULTS, RunData, run_data
from tests.tiny import CHATML, make_tokenizer

PAIR = SimpleNamespace(tokenizer=lambda: make_tokenizer(CHATML))


def test_every_member_has_a_default_and_shadow_data_has_every_member():
    members = set(RunData.__annotations__)
    assert members == {*DEFAULTS, "scoring_loader"}
    data = ShadowData(PAIR, validation={"a": "a.jsonl", "b": "b.jsonl"}, test="t.jsonl", packing="padding_free")
    assert members <= set(dir(data))
    found = run_data(SimpleNamespace(datamodule=data))
    assert (found.samples, found.packing, found.template_kwargs) == ("conversations", "padding_free", {})
    assert (found.validation_names, found.test_names, found.preference_sets) == (["a", "b"], ["test"], {})
    assert found.tokenizer is data.tokenizer
    assert found.scoring_loader.__self__ is data


class Probe(BoringModel):
    """Keeps what :func:`run_data` finds while the trainer runs."""

    def on_fit_start(self):
        data = run_data(self.trainer)
        self.found = {name: getattr(data, name) for name in DEFAULTS}


@pytest.mark.parametrize("data", [BoringDataModule, None])
def test_a_plain_data_module_and_plain_loaders_have_the_defaults(tmp_path, data):
    model = Probe()
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    if data is None:
        trainer.fit(model, model.train_dataloader())
    else:
        trainer.fit(model, datamodule=data())
    assert model.found == DEFAULTS
    assert run_data(SimpleNamespace()).samples == "conversations"  # before the trainer has anything


def test_a_data_module_with_some_members():
    class Own(LightningDataModule):
        packing = "padding_free"

        def __init__(self):
            super().__init__()
            self.validation_names = ["own"]

    found = run_data(SimpleNamespace(datamodule=Own()))
    assert (found.packing, found.validation_names, found.samples) == ("padding_free", ["own"], "conversations")


def test_an_error_inside_of_a_property_is_not_a_missing_member():
    class Own(LightningDataModule):
        @property
        def samples(self):
            return self.no_such_attribute

    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = run_data(SimpleNamespace(datamodule=Own())).samples
    with pytest.raises(AttributeError, match="scoring_loader"):
        run_data(SimpleNamespace(datamodule=None)).scoring_loader("train")
