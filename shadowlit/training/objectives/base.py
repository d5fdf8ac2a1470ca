"""The base class of training objectives, and checks of what one returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor
from torchmetrics import Metric

from shadowlit.data.formats import Samples
from shadowlit.errors import ShadowlitError
from shadowlit.plugins import described, path_of
from shadowlit.training.metrics import Scores, TokenScores
from shadowlit.training.outputs import Outputs, is_number

Sums = dict[str, Tensor]


class Objective(ABC):
    """Base class of training objectives.

    Attributes:
        samples: Kind of the samples: conversations, contexts (conversations with a context for the reference alone),
            pairs, or labels (answers that are desirable or not).
        has_reference: Whether answers are compared with their log-probabilities under the weights at the start.
        token_reference: Model whose logits the function of :meth:`Outputs.map_logits` gets in a training step: start
            (the Base as it was), instruct, or None. Costs a forward pass per batch, and needs a GraftCallback.
    """

    samples: Samples = "conversations"
    has_reference: bool = False
    token_reference: Literal["start", "instruct"] | None = None

    @abstractmethod
    def step(self, outputs: Outputs) -> Mapping[str, Tensor | float]:
        """Return sums over a micro-batch: scalar tensors or numbers, of the same names in every batch.

        ``loss`` is the summed loss with its gradient, and ``count`` what the loss of the whole effective batch is
        divided by, usually samples or, of tokens, :meth:`Outputs.total_weight`. A term must be a sum over samples that
        does not depend on the rest of the batch, or the loss changes with the size of the micro-batches.
        """

    def finish_step(self, sums: Sums) -> Sums:
        """Return what is logged as ``train/<name>`` besides the loss; by default means of the other sums.

        Args:
            sums: Sums of :meth:`step` over the effective batch, that is all micro-batches and ranks, in float64.
        """
        return {name: one / sums["count"] for name, one in sums.items() if name not in ("loss", "count")}

    def configure_scores(self) -> Metric:
        """Return the metric of validation sets: by default loss (cross entropy), perplexity and accuracies."""
        return TokenScores()

    def score(self, outputs: Outputs, scores: Sequence[Scores]) -> None:
        """Add a validation batch to the scores of every set that it belongs to."""
        others = [metric for one in scores for metric in one.others.values()]

        def watch(logits: Tensor, labels: Tensor) -> None:
            for metric in others if len(labels) else []:
                metric.update(logits, labels)

        if all(isinstance(one.own, TokenScores) and one.own.takes_sums for one in scores):
            sums = outputs.token_sums(watch if others else None)
            for one in scores:
                one.own.add(sums)  # type: ignore[operator]
            return
        logits = outputs.logits()
        for one in scores:
            one.own.update(logits, outputs.batch["labels"])
        watch(logits.flatten(0, 1).index_select(0, outputs.positions).float(), outputs.targets)

    def reset(self) -> None:  # noqa: B027 - few need it
        """Forget what an earlier fit has left. Called when a fit begins, before a checkpoint is loaded."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # noqa: B027
        """Add to a checkpoint what the next step depends on; nothing by default."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # noqa: B027
        """Take it back."""


def samples_of(objective: Objective | None) -> Samples:
    """Kind of samples that the objective learns from, by default conversations; a ShadowlitError for no kind."""
    samples = "conversations" if objective is None else objective.samples
    if samples not in get_args(Samples):
        raise ShadowlitError(
            f"model.objective is {path_of(objective)}, whose samples are {samples!r}; expected one of "
            f"{', '.join(get_args(Samples))}. Correct the class."
        )
    return samples


def require_sums(objective: Objective, sums: Any, known: Sequence[str] | None = None) -> None:
    """Raise unless these are what :meth:`Objective.step` should return, with the names of an earlier batch."""
    named = isinstance(sums, Mapping)
    wrong = [name for name, value in sums.items() if not is_number(value)] if named else []
    names = tuple(sums) if named else ()
    if names and not wrong and "count" in names and isinstance(sums.get("loss"), Tensor) and known in (None, names):
        return
    found = f"the sums {', '.join(names)}" if named else described(sums)
    bad = "".join(f"; {name} is {described(sums[name])}" for name in wrong)
    before = "" if known is None else f" (before: {', '.join(known)})"
    raise ShadowlitError(
        f"model.objective is {path_of(objective)}, whose step returns {found}{bad}; expected a tensor loss and a "
        f"count, each a single number, and the same names in every batch{before}. Return e.g. "
        '{"loss": losses.sum(), "count": len(losses)}.'
    )


def require_weighed(objective: Objective, outputs: Outputs) -> None:
    """Raise if the tokens of a batch have weights, and the step of an objective has not asked for their sum."""
    if outputs.ignores_weights:
        raise ShadowlitError(
            f"the data have turns with a weight, but model.objective is {path_of(objective)}, whose step ignores it. "
            "Remove 'weight' from the data, or multiply the losses by outputs.weights (outputs.weighted_sum does) and "
            "return outputs.total_weight() as count."
        )
