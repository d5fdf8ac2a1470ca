"""Objectives with a loss per supervised token of conversations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from shadowlit.training.linear_loss import cross_entropies
from shadowlit.training.objectives.base import Objective, Sums
from shadowlit.training.outputs import Outputs


class TokenObjective(Objective):
    """A loss per supervised token of conversations, of which the mean over the effective batch is minimised.

    Validation logs cross entropy as ``loss``, which compares models whatever they were trained for. A focal loss
    (arXiv 1708.02002)::

        class Focal(TokenObjective):
            def __init__(self, gamma: float = 2.0) -> None:
                self.gamma = gamma

            def token_losses(self, logits, targets):
                losses = F.cross_entropy(logits, targets, reduction="none")
                return (1 - torch.exp(-losses)) ** self.gamma * losses
    """

    @abstractmethod
    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The losses ``[n]`` of a chunk of supervised tokens; must have no side effects, since it may run twice.

        Args:
            logits: ``[n, V]`` float32, with a gradient.
            targets: ``[n]`` int64, the tokens that they predict.
        """

    def step(self, outputs: Outputs) -> Mapping[str, Tensor | float]:
        """The weighted sum of the losses, the sum of the weights, and the number of supervised tokens."""
        loss = outputs.weighted_sum(outputs.map_logits(self.token_losses))
        return {"loss": loss, "count": outputs.total_weight(), "tokens": len(outputs.targets)}

    def finish_step(self, sums: Sums) -> Sums:
        """The number of supervised tokens."""
        return {"tokens": sums.get("tokens", sums["count"])}


class SFT(TokenObjective):
    """Supervised fine-tuning: the cross entropy of the assistant's tokens, a mean over the effective batch."""

    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropies in nats."""
        return cross_entropies(logits, targets)

    def step(self, outputs: Outputs) -> Mapping[str, Tensor | float]:
        """As of any loss per token, with the gradient of the head computed together with the loss."""
        return {"loss": outputs.loss(), "count": outputs.total_weight(), "tokens": len(outputs.targets)}
