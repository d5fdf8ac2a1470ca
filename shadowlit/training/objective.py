"""Losses and scores of next-token prediction: pure functions of logits and labels, always sums, never means.

A mean over tokens is a sum divided by the number of supervised tokens of the whole effective batch or set. The
number is only known once all micro-batches and ranks have been seen, so the functions here return sums and leave
the division to whoever knows it (a mean of means weighs short batches too much; transformers#34242).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class TokenSums:
    """Sums over the supervised tokens of a batch; each a scalar tensor on the batch's device.

    Attributes:
        loss: sum of the cross entropies, in nats.
        num_tokens: supervised tokens.
        num_correct: supervised tokens that are the most probable one.
        num_samples: rows with at least one supervised token.
        num_exact: rows whose supervised tokens are all the most probable ones. Greedy decoding would reproduce
            the answer of such a row token for token.
    """

    loss: Tensor
    num_tokens: Tensor
    num_correct: Tensor
    num_samples: Tensor
    num_exact: Tensor


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed next-token cross entropy of the supervised tokens.

    ``labels[:, t]`` is predicted from ``logits[:, t - 1]``; labels of -100 carry no loss.

    Args:
        logits: ``[B, T, V]``, any floating dtype; the softmax is taken in float32.
        labels: ``[B, T]``, int64, aligned with the input tokens.

    Returns:
        The sum in nats (float32 scalar, 0 with a gradient of 0 when nothing is supervised) and the number of
        supervised tokens (int64 scalar).
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    # Only supervised positions reach float32 and the softmax: prompts and padding are most of a batch.
    loss = F.cross_entropy(logits[:, :-1][supervised].float(), targets[supervised], reduction="sum")
    return loss, supervised.sum()


@torch.no_grad()
def token_sums(logits: Tensor, labels: Tensor) -> TokenSums:
    """Sums that validation metrics are made of.

    Args:
        logits: ``[B, T, V]``, any floating dtype.
        labels: ``[B, T]``, int64, -100 where unsupervised, aligned with the input tokens.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    loss, num_tokens = cross_entropy_sum(logits, labels)
    correct = (logits[:, :-1].argmax(-1) == targets) & supervised
    rows = supervised.any(-1)
    exact = (correct | ~supervised).all(-1) & rows
    return TokenSums(loss, num_tokens, correct.sum(), rows.sum(), exact.sum())
