"""Validation metrics as sums: exact over unequal batches, ranks and sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from shadowlit.errors import ShadowlitError
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.training.objective import TokenSums, token_sums
from shadowlit.training.outputs import Answers


def name_clash(names: Iterable[str]) -> str:
    """Return the message that metrics would be logged twice; Lightning would show their mean."""
    return (
        f"{', '.join(sorted(names))} would be logged twice: for a validation set, and for an evaluator of the same "
        "name or by a callback. Rename one of the two, in data.validation, data.test or evaluation.evaluators, or in "
        "the callback."
    )


class Scores:
    """All metrics of one set: the objective's own, and copies of those of ``model.metrics``."""

    def __init__(self, own: Metric, others: Mapping[str, Metric], device: torch.device) -> None:
        self.own = on_device(own, device)
        self.others = {name: on_device(metric.clone(), device) for name, metric in others.items()}

    def compute(self) -> dict[str, float]:
        """Return the numbers by name, reduced over all ranks; every rank must call it.

        Raises:
            ShadowlitError: A metric gives something that is not a number, or a name twice.
        """
        found = dict(self.own.compute())
        for name, metric in self.others.items():
            value = metric.compute()
            parts = {f"{name}_{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
            if twice := parts.keys() & found.keys():
                raise ShadowlitError(
                    f"model.metrics.{name} gives {', '.join(sorted(twice))}, which another metric gives too. Give it "
                    "another name."
                )
            found.update({key: _number(key, part) for key, part in parts.items()})
        return found


def on_device(metric: Metric, device: torch.device) -> Metric:
    """Move a metric's states to a device; those in float64 become float32 where the device has none."""
    if accumulation_dtype(device) != torch.float64:
        metric.set_dtype(torch.float32)
    return metric.to(device)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ShadowlitError(
            f"the metric '{name}' of model.metrics gives a tensor of shape {list(value.shape)}; expected one number, "
            "or a dict of numbers. Average it in compute()."
        )
    return float(value)


class PreferenceScores(Metric):
    """The metrics of an objective of preferences, by the function ``measure`` of all answers of a set.

    Keeps seven numbers of every sample until ``compute``, since KTO compares each with a mean over all of them.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, measure: Callable[[Answers], dict[str, float]]) -> None:
        super().__init__()
        self.measure = measure
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, answers: Answers) -> None:
        """Add the samples of a batch."""
        reference = torch.zeros_like(answers.logps) if answers.reference is None else answers.reference
        columns = (answers.logps, answers.lengths, reference, answers.desirable.to(reference.dtype)[:, None])
        self.rows.append(torch.cat(columns, 1).detach())

    def compute(self) -> dict[str, float]:
        """Return the metrics over everything added, on all ranks alike; NaN where there is nothing."""
        rows: Any = self.rows  # a tensor once it was gathered
        known = torch.cat(rows) if isinstance(rows, list) else rows
        return self.measure(Answers(known[:, :2], known[:, 2:4], known[:, 6] > 0, known[:, 4:6]))


class TokenScores(Metric):
    """Loss, perplexity and accuracies of next-token prediction over a validation set.

    All states are sums, reduced once over the ranks; ``compute`` divides them. Where ``update`` is not overridden, the
    full logits are never computed: the objective adds the sums of a batch.

    - ``loss``: cross entropy per supervised token, in nats
    - ``perplexity``: ``exp(loss)``
    - ``accuracy``: share of supervised tokens that are the most probable one, 0 to 1
    - ``sequence_accuracy``: share of rows whose every supervised token is the most probable one, 0 to 1. Greedy
      decoding would reproduce the answer of such a row token for token (up to ties of the arg max).
    - ``first_token_loss``: cross entropy of the first supervised token of each answer, mean over answers, in nats. It
      measures how the model opens its answers; a model whose format differs from the data's is wrong here first.
    """

    full_state_update = False
    loss: Tensor
    num_tokens: Tensor
    num_correct: Tensor
    num_samples: Tensor
    num_exact: Tensor
    first_loss: Tensor
    num_answers: Tensor
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")
        # float64: a float32 sum of 10^7 losses would lose its last digits to the order of the batches.
        for name in ("loss", "first_loss"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("num_tokens", "num_correct", "num_samples", "num_exact", "num_answers"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: ``logits`` [B, T, V] of any floating dtype, ``labels`` [B, T] int64, -100 unsupervised."""
        self.add(token_sums(logits, labels))

    @property
    def takes_sums(self) -> bool:
        """Whether :meth:`add` does the same as :meth:`update`, which a subclass may override."""
        return type(self).update is TokenScores.update

    def add(self, sums: TokenSums) -> None:
        """Add the sums of a batch."""
        self._computed = None  # what compute() remembers; torchmetrics forgets it in update() only
        self._update_count += 1
        self.loss += sums.loss.to(self.loss.dtype)
        self.num_tokens += sums.num_tokens
        self.num_correct += sums.num_correct
        self.num_samples += sums.num_samples
        self.num_exact += sums.num_exact
        self.first_loss += sums.first_loss.to(self.first_loss.dtype)
        self.num_answers += sums.num_answers
        self.rows.append(sums.by_sample)

    def by_sample(self) -> Tensor:
        """Return the numbers of every sample on all ranks, ``[N, 5]`` on the CPU; a collective.

        They are the columns of :attr:`shadowlit.training.objective.TokenSums.by_sample`.
        """
        with self.sync_context():
            rows: Any = self.rows  # a tensor once it was gathered
            return (torch.cat(rows) if isinstance(rows, list) else rows).cpu()

    def compute(self) -> dict[str, float]:
        """Return the metrics over everything added, on all ranks alike; NaN when nothing was supervised."""
        tokens, samples, answers = self.num_tokens.item(), self.num_samples.item(), self.num_answers.item()
        loss = self.loss.item() / tokens if tokens else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self.num_correct.item() / tokens if tokens else math.nan,
            "sequence_accuracy": self.num_exact.item() / samples if samples else math.nan,
            "first_token_loss": self.first_loss.item() / answers if answers else math.nan,
        }
