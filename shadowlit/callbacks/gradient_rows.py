"""The rows whose gradients transforms need: read before a training, and measured once in a command."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from shadowlit.delta.transforms import Transforms
from shadowlit.errors import GraftError, counted
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.transformed import GradientRows
from shadowlit.plugins import path_of
from shadowlit.text import duration
from shadowlit.training.bar import show
from shadowlit.training.gradient_signs import gradient_signs
from shadowlit.training.head import HeadLoss
from shadowlit.training.module import ShadowModule
from shadowlit.training.outputs import Batch
from shadowlit.training.own_rows import data_for, uses_of, warn_of_shared_rows
from shadowlit.training.parallel import reduce_gradients


def read_gradient_rows(trainer: Trainer, module: ShadowModule, transforms: Iterable[Transforms]) -> None:
    """Read the rows whose gradients the transforms need, and warn of those that are validated or tested too.

    Raises:
        GraftError: The module has no gradient of a loss of conversations, or a source has too few rows.
        DataError: A source can't be read.
    """
    for given, key in _sources(transforms).items():
        objective = module.objective
        if objective.samples != "conversations" or objective.has_reference or objective.token_reference is not None:
            raise GraftError(
                f"{key} needs the gradient of model.objective's loss at the Instruct, but {path_of(objective)} learns "
                f"from {objective.samples} or compares with a reference. Use an objective of conversations without a "
                "reference (SFT, DFT or EAFT), or transforms without gradients (dare, svd, ties, magnitude)."
            )
        if module.quantization is not None:
            raise GraftError(
                f"{key} needs gradients of the weights, which model.quantization={module.quantization} doesn't have. "
                "Set it to null, or use transforms without gradients (dare, svd, ties, magnitude)."
            )
        found = len(_loader(trainer, given, key).dataset)
        if found < given.rows:
            raise GraftError(
                f"{key} asks for the gradients of {counted(given.rows, 'row')}, but {given.data} has {found}. Set rows "
                "to at most that, to an odd number if possible, so that there is a majority."
            )
        consequence = f"the scores there favour the graft with {key}"
        # Of sets that this command doesn't read, and of evaluators, only the files can be compared.
        unread = ("evaluation", *(() if trainer.testing else ("data.test",)))
        for use in (each for each in uses_of(given.data, trainer) if each.startswith(unread)):
            rank_zero_warn(f"data: {given.data} is {use} too, so that {consequence}. Give other rows.")
        warn_of_shared_rows(trainer, _set_name(given), consequence, but=("train",))


def measure_signs(trainer: Trainer, module: ShadowModule, graft: LiveGraft, transforms: Iterable[Transforms]) -> None:
    """Measure the signs of the gradients that transforms need, at the untouched Instruct; a collective.

    Raises:
        GraftError: The trainer is in inference mode, whose tensors have no gradients, or a loss is not finite.
    """
    for given, key in _sources(transforms).items():
        if torch.is_inference_mode_enabled():
            raise GraftError(
                f"{key} needs gradients, which inference mode doesn't allow. Set Trainer(inference_mode=False)."
            )
        begun = time.perf_counter()
        with isolate_rng():
            assert module.model is not None
            reduce_gradients(module.model, True)
            graft.signs[given] = gradient_signs(
                graft,
                _rows(trainer, given, key),
                HeadLoss(module.model, module.head_loss),  # the module chooses its own when it has its weights
                module.objective,
                autocast=trainer.precision_plugin.val_step_context,
                move=trainer.strategy.batch_to_device,
                show_row=partial(_show, trainer, given.rows),
            )
        rank_zero_info(
            f"graft: the untouched Instruct's gradients on {counted(given.rows, 'row')} of {given.data} were measured "
            f"in {duration(time.perf_counter() - begun)}"
        )


def _sources(transforms: Iterable[Transforms]) -> dict[GradientRows, str]:
    """The rows that are needed, and the key of the first list that needs them."""
    found: dict[GradientRows, str] = {}
    for each in transforms:
        for given in each.gradient_rows:
            found.setdefault(given, each.key)
    return found


def _loader(trainer: Trainer, given: GradientRows, key: str) -> Any:
    return data_for(trainer, key).extra_loader(_set_name(given), given.data, 1)


def _set_name(given: GradientRows) -> str:
    return f"gradient rows of {given.data}"


def _rows(trainer: Trainer, given: GradientRows, key: str) -> list[Batch]:
    """The first rows of a source, one in each batch, the same on all ranks."""
    loader = _loader(trainer, given, key)
    return [loader.collate_fn([loader.dataset[number]]) for number in range(given.rows)]


def _show(trainer: Trainer, rows: int, number: int) -> None:
    show(trainer, f"gradients of the Instruct {number + 1}/{rows}")
