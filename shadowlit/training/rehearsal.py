"""Tries a run's metrics on random logits, so that one that does not fit is found before the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric

from shadowlit.errors import ShadowlitError, first_line
from shadowlit.training.head import HeadLoss
from shadowlit.training.metrics import Scores
from shadowlit.training.objectives import Objective, PreferenceObjective
from shadowlit.training.outputs import Outputs

_ROWS, _LENGTH = 4, 6


def rehearse(
    objective: Objective, configure_scores: Callable[[], Metric], metrics: Mapping[str, Metric], vocabulary: int
) -> set[str]:
    """Score a random batch as a validation would, but without the other ranks; return the names of the metrics.

    An objective that overrides ``score`` may need more than a random batch has, so its metrics are not tried.

    Raises:
        ShadowlitError: A metric can't be updated, gives something that is not a number, or has another's name.
    """
    if type(objective).score not in (Objective.score, PreferenceObjective.score):
        return set()

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.randn(*input_ids.shape, vocabulary))

    def names_of(others: Mapping[str, Metric]) -> set[str]:
        scores = Scores(configure_scores(), others, torch.device("cpu"))
        for metric in (scores.own, *scores.others.values()):
            for part in metric.modules():
                if isinstance(part, Metric):
                    part.sync_on_compute = False  # the other ranks' devices may not reduce the CPU's tensors
        losses = HeadLoss(model, "logits")  # type: ignore[arg-type]
        outputs = Outputs(losses, _batch(vocabulary), lambda samples: torch.zeros(len(samples), 2, dtype=torch.float64))
        objective.score(outputs, [scores])
        return set(scores.compute())

    with isolate_rng(), torch.no_grad():
        for name in ("", *metrics):
            try:
                names_of({name: metrics[name]} if name else {})
            except ShadowlitError:
                raise
            except Exception as error:  # a user's own metric may raise anything
                what = f"model.metrics.{name}" if name else "the metric of configure_scores"
                takes = "logits, labels" if objective.samples == "conversations" else "answers"
                raise ShadowlitError(
                    f"{what} failed on a random batch of {objective.samples} ({first_line(error)}). Expected "
                    f"update({takes}) and a compute() that returns numbers; see model.metrics in --help."
                ) from error
        return names_of(metrics)


def _batch(vocabulary: int) -> dict[str, Tensor]:
    """Rows with supervised tokens; as preferences, two rows a sample."""
    ids = torch.randint(vocabulary, (_ROWS, _LENGTH))
    labels = ids.clone()
    labels[:, :2] = -100
    samples = torch.arange(_ROWS // 2)
    sequence = torch.arange(_ROWS)[:, None].expand(-1, _LENGTH)
    return {
        "input_ids": ids, "labels": labels, "sequence": sequence, "sample": samples, "valid": samples,
        "desirable": samples % 2 == 0,
    }  # fmt: skip
