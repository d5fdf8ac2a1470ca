"""Tries a run's objective, metrics and optimizer, so that one that does not fit is found before the training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from shadowlit.data.preference_formats import PREFERENCES
from shadowlit.errors import ShadowlitError, first_line
from shadowlit.plugins import calls, described, path_of
from shadowlit.training.head import HeadLoss, Predictions
from shadowlit.training.metrics import Scores
from shadowlit.training.objectives import Objective, PreferenceObjective, require_sums
from shadowlit.training.outputs import Outputs, is_number

_ROWS, _LENGTH = 4, 6


@runtime_checkable
class ChecksBeforeData(Protocol):
    """A callback that checks something before a command reads its data, which may take an hour."""

    def before_data(self, trainer: Trainer, pl_module: Any) -> None:
        """Raise if the command would fail; called on every rank, before the ranks know each other."""


def rehearse(
    objective: Objective, configure_scores: Callable[[], Metric], metrics: Mapping[str, Metric], vocabulary: int
) -> set[str]:
    """Train and score a random batch, without the other ranks; return the names of the metrics.

    An objective that overrides ``score`` may need more than a random batch has, so its metrics are not tried.

    Raises:
        ShadowlitError: The objective fails or returns something else than sums; a metric can't be updated, gives
            something that is not a number, or has another's name.
    """

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.randn(*input_ids.shape, vocabulary, requires_grad=torch.is_grad_enabled())
        return SimpleNamespace(logits=logits)

    def outputs() -> Outputs:
        losses = HeadLoss(model, "logits")  # type: ignore[arg-type]
        batch, compares = _batch(vocabulary), objective.token_reference is not None
        others = Predictions(torch.randn(_ROWS * (_LENGTH - 2), vocabulary), torch.clone) if compares else None
        return Outputs(losses, batch, lambda samples: torch.zeros(len(samples), 2, dtype=torch.float64), others)

    def names_of(others: Mapping[str, Metric]) -> set[str]:
        scores = Scores(configure_scores(), others, torch.device("cpu"))
        for metric in (scores.own, *scores.others.values()):
            for part in metric.modules():
                if isinstance(part, Metric):
                    part.sync_on_compute = False  # the other ranks' devices may not reduce the CPU's tensors
        objective.score(outputs(), [scores])
        return set(scores.compute())

    with isolate_rng():
        if not path_of(objective).startswith("shadowlit."):
            _try_step(_copy_of(objective), outputs())
        if type(objective).score not in (Objective.score, PreferenceObjective.score):
            return set()
        with torch.no_grad():
            for name in ("", *metrics):
                try:
                    names_of({name: metrics[name]} if name else {})
                except ShadowlitError:
                    raise
                except Exception as error:  # a user's own metric may raise anything
                    what = f"model.metrics.{name}" if name else "the metric of configure_scores"
                    takes = "answers" if objective.samples in PREFERENCES else "logits, labels"
                    raise ShadowlitError(
                        f"{what} failed on a random batch of {objective.samples} ({first_line(error)}). Expected "
                        f"update({takes}) and a compute() that returns numbers; see model.metrics in --help."
                    ) from error
            return names_of(metrics)


def try_optimizer(
    make: Callable[[list[tuple[str, nn.Parameter]], int], Any], *, adapted: bool, total: int, schedule: Any = None
) -> None:
    """Create an optimizer and its schedule for a few numbers; ``make`` takes parameters by name and a number of steps.

    ``total`` is this number, or below 0 if it depends on the data; ``schedule`` is ``model.lr_scheduler``.

    Raises:
        ShadowlitError: One of their options doesn't fit.
    """
    sizes = [(2, 2)] if adapted else [(2, 2), (2,)]
    try:
        make([(str(size), nn.Parameter(torch.zeros(size))) for size in sizes], total if total >= 0 else 10**9)
    except ShadowlitError as error:
        # Of a schedule, a list may need a value for each group of parameters, of which there may be more. A function
        # that is not a class with options may hold one too.
        options = schedule.keywords.values() if isinstance(schedule, partial) else [[]]
        lists = any(isinstance(value, list | tuple) for value in options)
        early = not lists or str(error).startswith(("model.optimizer", "model.lr_scheduler_kwargs"))
        if early or not isinstance(error.__cause__, ValueError):
            raise


def _copy_of(objective: Objective) -> Objective:
    """A copy, whose state a trial may change; modules, such as a large teacher, are shared."""
    shared: dict[int, Any] = {id(value): value for value in vars(objective).values() if isinstance(value, nn.Module)}
    try:
        return copy.deepcopy(objective, shared)
    except Exception:  # it holds a lock, say
        return copy.copy(objective)


def _try_step(objective: Objective, outputs: Outputs) -> None:
    """Raise if a training step fails, returns something else than sums, or has no gradient."""
    with calls(objective, "model.objective", "It was tried on a random batch. Correct the class."):
        try:
            sums = objective.step(outputs)
        except KeyError:  # a random batch has no images, for example
            return
        require_sums(objective, sums)
        if not cast("Tensor", sums["loss"]).requires_grad:
            raise TypeError("step returns a loss without a gradient")
        found = objective.finish_step({name: torch.as_tensor(one).detach().double() for name, one in sums.items()})
        if not isinstance(found, Mapping) or not all(map(is_number, found.values())):
            raise TypeError(f"finish_step returns {described(found)}; expected a dict of numbers by name")


def _batch(vocabulary: int) -> dict[str, Tensor]:
    """Rows with supervised tokens; as preferences, two rows a sample."""
    ids = torch.randint(vocabulary, (_ROWS, _LENGTH))
    labels = ids.clone()
    labels[:, :2] = -100
    samples = torch.arange(_ROWS // 2)
    sequence = torch.arange(_ROWS)[:, None].expand(-1, _LENGTH)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "sequence": sequence,
        "sample": samples, "valid": samples, "desirable": samples % 2 == 0,
    }  # fmt: skip
