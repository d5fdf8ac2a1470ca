"""The base class of evaluations during training: a measurement of whatever weights are loaded into a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shadowlit.errors import DataError, ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.plugins import path_of
from shadowlit.training.head import HeadLoss
from shadowlit.training.outputs import is_number


@dataclass(frozen=True)
class EvalContext:
    """The model with the weights to be measured, and this process's share of the work.

    Attributes:
        model: A transformers model, wrapped by peft or sharded or neither, in evaluation mode.
        head: Losses and logits from its hidden states, without materialising the logits of whole batches.
        pair: The pair, which has the tokenizer, the chat template and the tokens that end a turn.
        device: The device of the batches.
        rank: Number of this process, from 0.
        world_size: Number of processes; each evaluates every ``world_size``-th row, and all run equally many forwards.
        autocast: The context that forwards run in; that of the trainer's precision.
        reference: The context in which ``model`` has the weights of the reference (the untouched Instruct).
        template_kwargs: Arguments of the chat template.
        num_rows: Number of rows to measure in the sanity check, in which answers may end early too; None for all.
        reach_boundary: Called on all ranks between batches; raises if the command received a signal to stop.
    """

    model: nn.Module
    head: HeadLoss
    pair: ModelPair
    device: torch.device
    rank: int
    world_size: int
    autocast: Callable[[], AbstractContextManager[Any]]
    reference: Callable[[], AbstractContextManager[Any]]
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    num_rows: int | None = None
    reach_boundary: Callable[[], None] = lambda: None

    def logits_at(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Return the logits ``[N, V]`` of ``[B, T]`` tokens at ``[N]`` of their ``B * T`` positions.

        Every rank must call it equally often; N may be 0.
        """
        with torch.no_grad(), self.autocast():
            return self.head.logits_at({"input_ids": input_ids, "attention_mask": attention_mask}, positions)

    def token_losses(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Cross entropies ``[N]`` in nats of the tokens ``targets`` at ``[N]`` positions; as :meth:`logits_at`."""
        with torch.no_grad(), self.autocast():
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            return self.head.token_losses(inputs, positions, targets)[0]


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluator.

    Attributes:
        metrics: Metrics by name, reduced over the ranks and the same on all. ``score`` is the one that matters most,
            the mean of the samples' scores.
        samples: Samples of this rank's rows: ``index`` (row of the file, from 0), ``score`` (a number), and whatever
            else is worth reading: prompt, answer, reference.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def require_result(found: Any, key: str, evaluator: Evaluator) -> EvalResult:
    """Return what ``run`` has returned; a ShadowlitError if it isn't numbers with a score, and samples with
    both too.
    """
    numbers = isinstance(found, EvalResult) and "score" in found.metrics and all(map(is_number, found.metrics.values()))
    if numbers and all("index" in sample and is_number(sample.get("score")) for sample in found.samples):
        return found
    raise ShadowlitError(
        f"{key} is {path_of(evaluator)}, whose run returns {found!r:.200}; expected an EvalResult with numbers by "
        "name, one of them the score, and with samples, if any, that have an index and a numeric score: "
        'EvalResult({"score": 0.5}, [{"index": 0, "score": 0.5}]).'
    )


class Evaluator(ABC):
    """Measures the weights that are loaded into a model, on rows of its own.

    Args:
        every: Run in the first validation, in every *n*-th validation after it, and in the last one.
        limit: Number of rows to use, evenly spread over the file; null for all.
        batch_size: Rows per process and forward.

    Attributes:
        needs_reference: Whether it compares with the reference model, which only a graft can swap in.
        metric_names: Names of the metrics, as far as they are known before it runs. One that a validation set of the
            evaluator's name has too is found before the training.
    """

    needs_reference: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, every: int = 1, limit: int | None = None, batch_size: int = 16) -> None:
        for name, value in (("every", every), ("limit", 1 if limit is None else limit), ("batch_size", batch_size)):
            if value < 1:
                raise DataError(f"{name} of an evaluator is {value}; expected at least 1.")
        self.every, self.limit, self.batch_size = every, limit, batch_size

    @abstractmethod
    def read(self, pair: ModelPair, template_kwargs: dict[str, Any]) -> None:
        """Read and check the rows, before anything is trained.

        Raises:
            DataError: No rows, a missing field, a prompt that can't be scored; up to five problems in one message.
        """

    @abstractmethod
    def run(self, context: EvalContext) -> EvalResult:
        """Measure; a collective, to be called on all ranks alike."""

    @abstractmethod
    def signature(self) -> str:
        """Tells these rows and settings from others: scores of the untouched models are measured once for each."""

    def rank_batches(self, num_rows: int, context: EvalContext) -> Iterator[list[int]]:
        """Batches of this rank's row numbers; as many on every rank, a missing row is -1.

        Every rank gets ``ceil(num_rows / world_size)`` rows; the result of a missing row is discarded. In the sanity
        check there are no more rows than the context says.
        """
        num_rows = num_rows if context.num_rows is None else min(num_rows, context.num_rows)
        per_rank = -(-num_rows // context.world_size)
        rows = [context.rank + i * context.world_size for i in range(per_rank)]
        rows = [row if row < num_rows else -1 for row in rows]
        for start in range(0, per_rank, self.batch_size):
            context.reach_boundary()
            yield rows[start : start + self.batch_size]
