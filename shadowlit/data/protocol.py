"""What the module and the callbacks need to know about a run's data, whatever data module the trainer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from shadowlit.data.formats import Samples
from shadowlit.data.packing import Packing
from shadowlit.data.preference import PreferenceDataset

DEFAULTS: dict[str, Any] = {
    "samples": "conversations",
    "packing": None,
    "validation_names": (),
    "test_names": (),
    "tokenizer": None,
    "chat_template": None,
    "template_kwargs": {},
    "preference_sets": {},
}


class RunData:
    """A view of a data module, or of None for plain loaders, with a default for each attribute that it lacks.

    :class:`~shadowlit.data.module.ShadowData` has all of them.

    Attributes:
        samples: Kind of sample.
        packing: How training samples share a row; None if each has its own.
        validation_names: Names of the validation sets, in the order of their loaders; without names they are numbered.
        test_names: Names of the test sets, likewise.
        tokenizer: Tokenizer with the chat template of the data; None for the pair's.
        chat_template: Path of a chat template that replaces the Instruct's, or None.
        template_kwargs: Arguments for the chat template.
        preference_sets: Sets of preferences that have been read, by ``train``, ``val/<set>`` and ``test/<set>``.
        scoring_loader: Function from the name of a set of preferences to a loader of all its samples, once over all
            ranks; only a module with such sets has it.
    """

    samples: Samples
    packing: Packing | None
    validation_names: Sequence[str]
    test_names: Sequence[str]
    tokenizer: PreTrainedTokenizerBase | None
    chat_template: str | None
    template_kwargs: dict[str, Any]
    preference_sets: Mapping[str, PreferenceDataset]
    scoring_loader: Callable[[str], DataLoader]

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self._module), name) or name not in DEFAULTS:
            return getattr(self._module, name)  # an AttributeError inside a property isn't hidden by a default
        return getattr(self._module, name, DEFAULTS[name])


def run_data(trainer: Trainer) -> RunData:
    """Return the data of the trainer's run: a :class:`~shadowlit.data.module.ShadowData`, another module, or plain
    loaders.
    """
    return RunData(getattr(trainer, "datamodule", None))
