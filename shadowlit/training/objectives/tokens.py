"""Objectives with a loss per supervised token of conversations."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from shadowlit.errors import ShadowlitError
from shadowlit.training.linear_loss import cross_entropies
from shadowlit.training.objectives.base import Objective, Sums
from shadowlit.training.outputs import Outputs


class TokenObjective(Objective):
    """A loss per supervised token of conversations, whose mean over the effective batch is minimised.

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
    def token_losses(self, logits: Tensor, targets: Tensor, *reference: Tensor) -> Tensor:
        """Return the losses ``[n]`` of a chunk of supervised tokens; must have no side effects, since it may run twice.

        Args:
            logits: ``[n, V]`` float32, with a gradient.
            targets: ``[n]`` int64, the tokens that they predict.
            reference: One tensor if there is a ``token_reference``: its logits ``[n, V]`` float32, without a gradient.
        """

    def step(self, outputs: Outputs) -> Mapping[str, Tensor | float]:
        """Return the weighted sum of the losses, the sum of the weights, and the number of supervised tokens."""
        loss = outputs.weighted_sum(outputs.map_logits(self.token_losses))
        return {"loss": loss, "count": outputs.total_weight(), "tokens": len(outputs.targets)}

    def finish_step(self, sums: Sums) -> Sums:
        """Return the number of supervised tokens."""
        return {"tokens": sums.get("tokens", sums["count"])}


class SFT(TokenObjective):
    """Supervised fine-tuning: the cross entropy of the assistant's tokens, a mean over the effective batch.

    With a ``kl_weight`` each token's loss is ``-log π(y_t) + kl_weight · KL_t``, where ``KL_t`` is the divergence
    between the distributions of a reference and of the model over the whole vocabulary. ``train/kl``,
    ``train/cross_entropy`` and ``train/entropy`` (of the predictions, in nats) are logged then.

    Args:
        kl_weight: Weight of the divergence; 0 for none. It costs a forward pass of the reference per batch.
        kl: Its direction. forward: ``KL(reference ‖ model)``, which keeps what the reference finds likely. reverse:
            ``KL(model ‖ reference)``, which avoids what the reference finds unlikely. both: their mean.
        kl_to: The reference. start: the Base as it was, which a LoRA run gets by switching the adapter off. instruct:
            the untouched Instruct.

    Raises:
        ShadowlitError: An option is out of its range, or has no effect.
    """

    kl_weight = 0.0  # of a subclass that doesn't call __init__

    def __init__(
        self,
        kl_weight: float = 0.0,
        kl: Literal["forward", "reverse", "both"] = "forward",
        kl_to: Literal["start", "instruct"] = "start",
    ) -> None:
        name = type(self).__name__
        if not 0 <= kl_weight < math.inf:
            raise ShadowlitError(f"{name}'s kl_weight is {kl_weight}; expected a number of at least 0.")
        if not kl_weight and (kl, kl_to) != ("forward", "start"):
            raise ShadowlitError(
                f"{name}'s kl is {kl!r} and its kl_to is {kl_to!r}, but kl_weight=0 leaves the divergence out. Set "
                "kl_weight, e.g. to 0.1, or remove them."
            )
        self.kl_weight, self.kl, self.kl_to = kl_weight, kl, kl_to
        self.token_reference = kl_to if kl_weight else None

    def token_factors(self, logits: Tensor, losses: Tensor) -> Tensor | None:
        """Return what the cross entropies ``[n]`` are multiplied by, from these and the logits, without gradient; or
        None.
        """
        return None

    def token_losses(self, logits: Tensor, targets: Tensor, *reference: Tensor) -> Tensor:
        """Cross entropies in nats, multiplied by their factors, plus the weighted divergence."""
        return self._columns(logits, targets, *reference)[:, 0]

    def step(self, outputs: Outputs) -> Mapping[str, Tensor | float]:
        """As of any loss per token; of cross entropy alone with the head's gradient computed with the loss."""
        sums = {"count": outputs.total_weight(), "tokens": len(outputs.targets)}
        if not self.kl_weight and type(self).token_factors is SFT.token_factors:
            return {"loss": outputs.loss(), **sums}
        names = ("loss", "cross_entropy", "entropy", "kl")[: 4 if self.kl_weight else 3]
        columns = outputs.map_logits(self._columns, len(names)).unbind(1)
        return sums | {name: outputs.weighted_sum(one) for name, one in zip(names, columns, strict=True)}

    def finish_step(self, sums: Sums) -> Sums:
        """Return the number of supervised tokens, and means of what is logged besides the loss."""
        return super().finish_step(sums) | {
            name: sums[name] / sums["count"] for name in ("cross_entropy", "entropy", "kl") if name in sums
        }

    def _columns(self, logits: Tensor, targets: Tensor, *reference: Tensor) -> Tensor:
        """Loss (with a gradient), cross entropy, entropy and, with a reference, divergence of each token."""
        losses = cross_entropies(logits, targets)
        with torch.no_grad():
            factors = self.token_factors(logits.detach(), losses.detach())
            others = [losses.detach(), entropies(logits.detach())]
        total = losses if factors is None else factors * losses
        if reference:
            distances = divergences(logits, reference[0], self.kl)
            total = total + self.kl_weight * distances
            others.append(distances.detach())
        return torch.stack([total, *others], dim=1)


class DFT(SFT):
    """Dynamic fine-tuning: each token's loss times its own probability, so that unlikely tokens pull less.

    ``-sg(π(y_t)) · log π(y_t)``, where ``sg`` stops the gradient; arXiv 2508.05629. Arguments as of SFT, whose
    divergence is added without the factor.
    """

    def token_factors(self, logits: Tensor, losses: Tensor) -> Tensor:
        """Return the probabilities of the tokens."""
        return torch.exp(-losses)


class EAFT(SFT):
    """Entropy-adaptive fine-tuning: each token's loss times the normalised entropy of its prediction.

    ``-(sg(H_t) / log K)^α · log π(y_t)``, with the entropy ``H_t`` of the ``K`` most probable tokens, renormalised:
    where the model is sure of another token, it learns little. arXiv 2601.02151. Its divergence is added without the
    factor.

    Args:
        alpha: Exponent of the normalised entropy; 0 is SFT.
        top_k: Number of most probable tokens, K.
        kwargs: Arguments of SFT.
    """

    def __init__(self, alpha: float = 1.0, top_k: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= alpha < math.inf or top_k < 2:
            raise ShadowlitError(
                f"EAFT's alpha is {alpha} and its top_k is {top_k}; expected an alpha of at least 0 and a top_k of at "
                "least 2."
            )
        self.alpha, self.top_k = alpha, top_k

    def token_factors(self, logits: Tensor, losses: Tensor) -> Tensor:
        """Normalised entropies, 0 to 1, to the power of alpha."""
        most = min(self.top_k, logits.shape[-1])
        return (entropies(logits.topk(most).values) / math.log(most)) ** self.alpha


class ContextDistillation(SFT):
    """Context distillation: the model learns to predict without a context what a teacher predicts with it.

    The loss of a token is the divergence ``KL_t`` of SFT, between the teacher's prediction after the row's
    ``teacher_context`` and the model's without it, plus a weighted cross entropy; arXiv 2112.00861, 2209.15189.

    Args:
        kl: Direction of the divergence, as of SFT.
        kl_to: Weights of the teacher: start (the Base as it was) or instruct (the untouched Instruct).
        cross_entropy_weight: Weight of the cross entropy of the answers; 0 for the divergence alone.

    Raises:
        ShadowlitError: The weight is out of its range.
    """

    samples = "contexts"

    def __init__(
        self,
        kl: Literal["forward", "reverse", "both"] = "forward",
        kl_to: Literal["start", "instruct"] = "start",
        cross_entropy_weight: float = 0.0,
    ) -> None:
        super().__init__(1.0, kl, kl_to)
        if not 0 <= cross_entropy_weight < math.inf:
            raise ShadowlitError(
                f"ContextDistillation's cross_entropy_weight is {cross_entropy_weight}; expected a number of at least "
                "0."
            )
        self.cross_entropy_weight = cross_entropy_weight

    def token_factors(self, logits: Tensor, losses: Tensor) -> Tensor:
        """Return the weight of the cross entropies."""
        return torch.full_like(losses, self.cross_entropy_weight)


def entropies(logits: Tensor) -> Tensor:
    """Return the entropies ``[n]`` of the distributions that logits ``[n, V]`` give, in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def divergences(logits: Tensor, reference: Tensor, direction: Literal["forward", "reverse", "both"]) -> Tensor:
    """Divergences ``[n]`` in nats between the distributions of a model and a reference, from logits ``[n, V]`` each.

    forward: ``Σ_v r(v) (log r(v) - log p(v))``; reverse: ``Σ_v p(v) (log p(v) - log r(v))``; both: their mean.
    """
    ours, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
    weights = {"forward": theirs.exp, "reverse": lambda: -ours.exp(), "both": lambda: (theirs.exp() - ours.exp()) / 2}
    return (weights[direction]() * (theirs - ours)).sum(-1)


def divergence_sums(outputs: Outputs) -> tuple[Tensor, Tensor | int]:
    """Return ``KL(model ‖ reference)`` in nats, summed over the supervised tokens of a batch, and what a mean is
    divided by: their number, or the sum of their weights if they have some, which the first sum has too.
    """
    return outputs.weighted_sum(outputs.map_logits(reverse_divergences)), outputs.total_weight()


def reverse_divergences(logits: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
    """:func:`divergences` as a function of a chunk of tokens: ``KL(model ‖ reference)``."""
    return divergences(logits, reference, "reverse")
