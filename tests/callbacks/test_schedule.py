"""Which validation is the last: told in it, and compared with what Lightning then does."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from shadowlit.callbacks.schedule import is_last_validation


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(50, 1))


class Oracle(Callback):
    """Collects what is said in every validation of a fit."""

    def __init__(self):
        self.said = []

    def on_validation_start(self, trainer, module):
        if not trainer.sanity_checking:
            self.said.append(is_last_validation(trainer))


class Stopper(Oracle):
    """Asks for a stop, before a validation."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 3


class Small(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, _):
        return (self.weight * batch).sum()

    def validation_step(self, *_):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 1e-3)


def ask(data, oracle=None, **options):
    oracle = oracle or Oracle()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[oracle], **options,
    )  # fmt: skip
    trainer.fit(Small(), DataLoader(data, batch_size=1), DataLoader(torch.zeros(1, 1)))
    return oracle.said


@pytest.mark.parametrize("epochs", [{"max_epochs": 1}, {"max_epochs": 3}, {"max_epochs": -1, "max_steps": 9}])
@pytest.mark.parametrize("steps", [-1, 4, 5, 7])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "rhythm",
    [
        {}, {"val_check_interval": 0.5}, {"val_check_interval": 0.3}, {"val_check_interval": 4},
        {"check_val_every_n_epoch": 2}, {"check_val_every_n_epoch": 2, "val_check_interval": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": 5},
        {"check_val_every_n_epoch": None, "val_check_interval": 12},
    ],
    ids=str,
)  # fmt: skip
def test_the_last_of_a_fit_and_no_other(epochs, steps, accumulate, rhythm):
    """Seven batches an epoch: neither the validations nor the accumulation divide them."""
    options = {"max_steps": steps, "accumulate_grad_batches": accumulate, **epochs, **rhythm}
    said = ask(torch.zeros(7, 1), **options)
    assert said == [False] * (len(said) - 1) + [True] * bool(said)


@pytest.mark.parametrize("steps", [10, 11, 12])
def test_a_stream_of_unknown_length(steps):
    said = ask(Stream(), max_steps=steps, val_check_interval=4, check_val_every_n_epoch=None)
    assert said == [False] * (steps // 4 - 1) + [True]


def test_a_stop_that_was_asked_for():
    assert ask(torch.zeros(7, 1), Stopper(), max_epochs=2, val_check_interval=1)[:3] == [False, False, True]
