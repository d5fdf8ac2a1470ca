"""Fits the scales of groups of tensors when a training ends, on the weights that are exported."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.scores import error_of_gain
from shadowlit.checkpoint.names import is_bias, kind_of, layer_of
from shadowlit.errors import GraftError
from shadowlit.files import replace_text
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.scales import EVERYTHING, FitScales, FittedScales, Measured, NotFiniteError, fit, group_of
from shadowlit.grafting.subject import Subject
from shadowlit.text import duration, number
from shadowlit.training.bar import show
from shadowlit.training.fit_scales import Calibration, LiveScaledGraft, require_fittable
from shadowlit.training.head import evaluating
from shadowlit.training.module import ShadowModule
from shadowlit.training.own_rows import read_own_rows, warn_of_shared_rows
from shadowlit.training.parallel import reduce_gradients

SCALES_FILE = "scales.json"
"""File next to the parts of an export with the scale of each tensor, as ``shadowlit graft --scale`` takes it."""


@dataclass(frozen=True)
class FittedGraft:
    """Scales that were fitted, and what the graft with them scores.

    Attributes:
        subject: The graft with them, in metrics.
        found: The scales.
        metrics: ``val/fitted/<metric>`` of the exported model; empty without validation data.
        lines: What the fit's last lines say of it.
        update: Fingerprint of the update that they were fitted to, before any transform.
    """

    subject: Subject
    found: FittedScales
    metrics: dict[str, float]
    lines: list[str]
    update: str


def write_scales(
    folder: Path,
    found: FittedScales,
    by_file: Mapping[str, float],
    update: str,
    transforms: Sequence[Any],
    instruct: str,
) -> None:
    """Write scales to a folder, by the names of the files' tensors, and a heat map if there are layers.

    Args:
        folder: Folder.
        found: Scales.
        by_file: Scale of each tensor.
        update: Fingerprint of what was learned of these tensors.
        transforms: Names and parameters of the update's transforms.
        instruct: Fingerprint of the Instruct that they were fitted on.
    """
    fitted_to = {"fingerprint": update, "transforms": transforms, "instruct": instruct}
    content = {**found.about, "history": found.history, "update": fitted_to, "tensors": by_file}
    replace_text(folder / SCALES_FILE, f"{json.dumps(content, indent=2)}\n")
    if found.groups == EVERYTHING:
        return
    layers = {name: layer for name in by_file if (layer := layer_of(name)) is not None and not is_bias(name)}
    if cells := {(kind_of(name), layer): by_file[name] for name, layer in layers.items()}:
        from shadowlit.plotting import HeatMap, draw_heat_maps, save_figure  # late: matplotlib takes a second

        title = f"scales by {found.groups}: {min(cells.values()):.2f} to {max(cells.values()):.2f}"
        save_figure(draw_heat_maps([HeatMap(title, cells, "scale", found.start)]), folder / "scales")


def open_rows(trainer: Trainer, module: ShadowModule, options: FitScales) -> None:
    """Read the calibration rows before the training, and raise for what can't be fitted.

    Raises:
        GraftError: The module can't give derivatives, or the rows are used elsewhere.
        DataError: The rows can't be read.
    """
    require_fittable(module.objective)
    if module.quantization is not None:
        raise GraftError(
            f"graft.fit_scales needs gradients of the weights, which model.quantization={module.quantization} doesn't "
            "have. Set it to null, or fit the scales on disk (shadowlit graft --fit-scales)."
        )
    if module.adapter is not None and isinstance(trainer.strategy, ModelParallelStrategy) and trainer.world_size > 1:
        raise GraftError(
            "graft.fit_scales doesn't work with an adapter under FSDP2, which would gather the adapter's factors "
            "within the backward pass. Use DDP, full tuning, or fit the scales on disk (shadowlit graft --fit-scales)."
        )
    for key, source in options.sources.items():
        why = "scales that are fitted to these rows would be measured on them, or were trained on them"
        read_own_rows(trainer, key, source, why)
        warn_of_shared_rows(trainer, key, "the scales are not independent of what is trained or measured there")


def require_groups(graft: LiveGraft, options: FitScales) -> None:
    """Raise a GraftError if a tensor of the Instruct's files would have several scales."""
    groups = {name: group_of(name, options.groups) for name in graft.grafted_parameters}
    numbers = {group: float(number) for number, group in enumerate(groups.values())}
    graft.in_files({name: numbers[group] for name, group in groups.items()})


def fit_at_end(
    trainer: Trainer, module: ShadowModule, callback: GraftCallback, options: FitScales, subject: Subject
) -> FittedGraft:
    """Fit the scales of the graft ``subject`` of the weights that the module holds, and score it; a collective.

    The trained weights are loaded again afterwards, bit for bit, and have the gradients that they had.

    Raises:
        GraftError: A loss or a derivative is not finite.
    """
    begun, start = time.perf_counter(), subject.scale
    graft, data = callback.build(module), getattr(trainer, "datamodule", None)
    assert module.model is not None and data is not None
    with isolate_rng():
        loaders = [data.extra_loader(key, source, options.batch_size) for key, source in options.sources.items()]
        rows, *keep = [list(loader) for loader in loaders]
    reduce_gradients(module.model, True)
    host = LiveScaledGraft(graft, subject)
    calibration = Calibration(
        host, options, rows, keep[0] if keep else [], module.head_losses(),
        autocast=trainer.precision_plugin.val_step_context, move=trainer.strategy.batch_to_device,
    )  # fmt: skip
    passes = itertools.count(1)

    def measure(scales: Mapping[str, float]) -> Measured:
        show(trainer, f"fitting scales {next(passes)}/{options.steps}")
        return calibration(scales)

    with isolate_rng():
        found = _fit_on_first_rank(trainer, measure, host.parameters, options, start)
    seconds = time.perf_counter() - begun
    lines = [f"{found.line}; fitted in {duration(seconds)}"]
    fitted = Subject("fitted", start, variant=subject.variant)
    metrics = _scores(trainer, module, callback, found, subject, fitted, lines)
    for line in lines:
        rank_zero_info(line)
    logged = {**metrics, "graft/fit_seconds": seconds}
    if found.groups != "tensor":  # hundreds, which scales.json has
        logged |= {f"graft/scale/{group}": scale for group, scale in found.scales.items()}
    for logger in trainer.loggers:
        logger.log_metrics(logged, step=trainer.global_step)
    return FittedGraft(fitted, found, metrics, lines, graft.fingerprint())


def _fit_on_first_rank(
    trainer: Trainer, measure: Callable[[Mapping[str, float]], Measured], names: Iterable[str], options: FitScales,
    start: float,
) -> FittedScales:  # fmt: skip
    """Fit on rank 0, while the others take part in its passes; a collective, with its result on every rank.

    Ranks that each ran the optimizer could differ in the last bits of a scale, and so in their number of passes.
    """
    share = trainer.strategy.broadcast
    found: FittedScales | NotFiniteError | Mapping[str, float] | None = None
    if trainer.is_global_zero:

        def lead(scales: Mapping[str, float]) -> Measured:
            share(scales)
            return measure(scales)

        try:
            found = fit(lead, names, options, start)
        except NotFiniteError as error:
            found = error
        share(found)
    else:
        while isinstance(found := share(None), Mapping):
            measure(found)
    if isinstance(found, NotFiniteError):
        raise found
    assert isinstance(found, FittedScales)
    return found


def _scores(
    trainer: Trainer, module: ShadowModule, callback: GraftCallback, found: FittedScales, whole: Subject,
    fitted: Subject, lines: list[str],
) -> dict[str, float]:  # fmt: skip
    """Score the graft at one scale and with the fitted ones on the validation sets; add a line that compares them."""
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # a finished training that was resumed has no loaders yet
    if not trainer.val_dataloaders or not callback.validate:
        lines.append("scales: not scored: there are no validation data, or graft.validate is false")
        return {}
    graft = callback.build(module)
    scored: list[tuple[dict[str, float], dict[str, Tensor]]] = []
    for subject, scales in ((whole, {}), (fitted, found.by_tensor)):
        graft.fitted = scales
        try:
            scored.append(graft.measure(whole, partial(_score, trainer, module, callback, subject)))
        finally:
            graft.fitted = {}
    (plain, plain_rows), (own, own_rows) = scored
    gain, error = plain["loss"] - own["loss"], ""
    if "" in plain_rows and "" in own_rows:
        error = f" ± {number(error_of_gain(plain_rows[''][:, :2], own_rows[''][:, :2]), digits=3)}"
    lines.append(
        f"scales: the exported model has the fitted ones: its validation loss is {number(own['loss'])} "
        f"(val/fitted/loss), and {number(plain['loss'])} at scale {found.start:g} everywhere (val/{whole.name}/loss): "
        f"{'better' if gain > 0 else 'not better'}, by {number(gain, signed=True)}{error}"
    )
    if not gain > 0:
        rank_zero_warn(
            "export: on the validation data the graft with fitted scales is not better than at scale "
            f"{found.start:g} everywhere, but it is what is exported. Remove graft.fit_scales, or give it more rows, "
            "fewer groups or a larger pull."
        )
    return {f"val/{fitted.name}/{name}": value for name, value in own.items()}


def _score(
    trainer: Trainer, module: ShadowModule, callback: GraftCallback, subject: Subject
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Score the weights that are loaded on the validation sets, as a validation would."""
    module.take_scores(subject)  # those of a pass that is repeated
    with isolate_rng(), torch.no_grad(), evaluating(module):
        callback.run_batches(trainer, subject)
        rows = module.sample_scores(subject)
        return module.take_scores(subject), rows
