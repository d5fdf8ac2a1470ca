"""Losses and scores of next-token prediction: pure functions of logits and labels, always sums, never means.

A mean over tokens is a sum divided by the number of supervised tokens of the whole effective batch or set, which is
only known after all micro-batches and ranks (a mean of means weighs short batches too much; transformers#34242).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.grafting.arithmetic import accumulation_dtype


@dataclass(frozen=True)
class TokenSums:
    """Sums over the supervised tokens of a batch, on its device; all except ``by_sample`` are scalar tensors."""

    loss: Tensor  # of the cross entropies, in nats
    num_tokens: Tensor
    num_correct: Tensor  # tokens that are the most probable one
    num_samples: Tensor  # rows with a supervised token; of packed rows, the conversations
    num_exact: Tensor  # samples all of whose tokens are the most probable ones
    first_loss: Tensor  # of the cross entropies of the first supervised token of each answer, in nats
    num_answers: Tensor  # runs of supervised tokens without an unsupervised one between them
    # [S, 5], of each sample in the order of the batch: loss, supervised tokens, correct tokens, loss of the answers'
    # first tokens, and answers.
    by_sample: Tensor


def supervised_positions(labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Return the indices ``[N]``, int64, of the hidden states that predict supervised tokens, among the ``B * T`` of a
    batch.

    The label at ``t`` is predicted at ``t - 1``. The first token of a row has no prediction, nor has the first of a
    conversation in a packed row.

    Args:
        labels: ``[B, T]``, int64, -100 where unsupervised, aligned with the input tokens.
        position_ids: ``[B, T]``, where rows are packed: they restart at 0 in each conversation.
    """
    supervised = labels[:, 1:] != IGNORE_INDEX
    if position_ids is not None:
        supervised = supervised & (position_ids[:, 1:] != 0)
    row, column = supervised.nonzero(as_tuple=True)
    return row * labels.shape[1] + column


def sum_tokens(
    losses: Tensor, correct: Tensor, positions: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> TokenSums:
    """Return the sums, from the cross entropy of every supervised token and whether it is the most probable one,
    ``[N]`` each.

    ``positions`` ``[N]`` come from :func:`supervised_positions`, with the same ``labels`` and ``position_ids``.
    """
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if position_ids is not None:
        starts |= position_ids == 0
    index = torch.arange(labels.numel(), device=labels.device)
    # Each conversation by the index of its first token; of fixed size, so that nothing waits for a GPU.
    conversation = (index * starts.flatten()).cummax(0).values.index_select(0, positions)
    counts = torch.zeros(2, labels.numel(), dtype=torch.int64, device=labels.device)
    counts.index_add_(1, conversation, torch.stack([torch.ones_like(positions), correct.long()]))
    rows = counts[0] > 0
    exact = rows & (counts[0] == counts[1])
    losses = losses.to(accumulation_dtype(losses.device))
    # An answer opens where the token before it is unsupervised, or is the first of its conversation: that one is never
    # predicted.
    opens = ((labels == IGNORE_INDEX) | starts).flatten().index_select(0, positions)
    none = torch.zeros(3, labels.numel(), dtype=losses.dtype, device=labels.device)
    of_tokens, of_first, answers = none.index_add(
        1, conversation, torch.stack([losses, losses * opens, opens.to(losses)])
    )
    by_token = torch.stack([of_tokens, counts[0], counts[1], of_first, answers])
    # Without packing each row is a sample, so that nothing waits for a GPU to find their number. A copy of theirs is
    # returned, since a view would keep the numbers of all tokens.
    by_sample = by_token[:, starts.flatten()] if position_ids is not None else by_token[:, :: labels.shape[1]]
    return TokenSums(
        losses.sum(),
        counts[0].sum(),
        counts[1].sum(),
        rows.sum(),
        exact.sum(),
        (losses * opens).sum(),
        opens.sum(),
        by_sample.T.clone(),
    )


@torch.no_grad()
def token_sums(logits: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> TokenSums:
    """Return the sums of logits ``[B, T, V]`` of any floating dtype; other arguments as of
    :func:`supervised_positions`.
    """
    positions = supervised_positions(labels, position_ids)
    targets = labels.flatten()[positions + 1]
    chosen = logits.flatten(0, 1)[positions].float()
    losses = F.cross_entropy(chosen, targets, reduction="none")
    return sum_tokens(losses, chosen.argmax(-1) == targets, positions, labels, position_ids)
