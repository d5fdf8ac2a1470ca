"""Validation metrics as sums: exact over unequal batches, ranks and sets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from shadowlit.training.objective import TokenSums, token_sums
from shadowlit.training.objectives import Answers, Objective, preference_metrics, preference_sums


class PreferenceScores(Metric):
    """What an objective of preferences says of a validation set; see :func:`preference_metrics` for the numbers.

    Six numbers of every sample are kept until ``compute``: KTO compares each with a mean over all of them.

    Args:
        objective: What is trained for.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, answers: Answers) -> None:
        """Add the samples of a batch."""
        reference = torch.zeros_like(answers.logps) if answers.reference is None else answers.reference
        columns = (answers.logps, answers.lengths, reference, answers.desirable.double()[:, None])
        self.rows.append(torch.cat(columns, 1).detach())

    def compute(self) -> dict[str, float]:
        """Return the metrics over everything added, on all ranks alike; NaN where there is nothing."""
        rows: Any = self.rows  # a tensor once it was gathered
        known = torch.cat(rows) if isinstance(rows, list) else rows
        answers = Answers(known[:, :2], known[:, 2:4], known[:, 6] > 0, known[:, 4:6])
        kl: Tensor | float = 0.0
        if self.objective.samples == "labels":
            kl = answers.ratios[:, 1].mean().clamp(min=0)
        sums = preference_sums(self.objective, answers, kl)[1]
        return {name: value.item() for name, value in preference_metrics(sums, self.objective.samples).items()}


class TokenScores(Metric):
    """Loss, perplexity and accuracies of next-token prediction over a validation set.

    All states are sums, reduced once over the ranks; ``compute`` divides them. Logits are never kept, and where
    ``update`` is not overridden they are never made: ``ShadowModule`` adds the sums of a batch.

    - ``loss``: cross entropy per supervised token, in nats
    - ``perplexity``: ``exp(loss)``
    - ``accuracy``: share of supervised tokens that are the most probable one, 0 to 1
    - ``sequence_accuracy``: share of rows whose every supervised token is the most probable one, 0 to 1. Greedy
      decoding would reproduce the answer of such a row token for token (up to ties of the arg max).
    """

    full_state_update = False
    loss: Tensor
    num_tokens: Tensor
    num_correct: Tensor
    num_samples: Tensor
    num_exact: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64: a float32 sum of 10^7 losses would lose its last digits to the order of the batches.
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("num_tokens", "num_correct", "num_samples", "num_exact"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: ``logits`` [B, T, V] of any floating dtype, ``labels`` [B, T] int64, -100 unsupervised."""
        self.add(token_sums(logits, labels))

    def add(self, sums: TokenSums) -> None:
        """Add the sums of a batch."""
        self._computed = None  # what compute() remembers; torchmetrics forgets it in update() only
        self._update_count += 1
        self.loss += sums.loss.double()
        self.num_tokens += sums.num_tokens
        self.num_correct += sums.num_correct
        self.num_samples += sums.num_samples
        self.num_exact += sums.num_exact

    def compute(self) -> dict[str, float]:
        """Return the metrics over everything added, on all ranks alike; NaN when nothing was supervised."""
        tokens, samples = self.num_tokens.item(), self.num_samples.item()
        loss = self.loss.item() / tokens if tokens else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self.num_correct.item() / tokens if tokens else math.nan,
            "sequence_accuracy": self.num_exact.item() / samples if samples else math.nan,
        }
