"""What is trained for: ``model.objective`` of the configuration.

Each class puts one formula of :mod:`shadowlit.training.preference` together with its options. A loss belongs to a
sample, that is to a pair of answers or to a labelled one, and every term of it is a mean over tokens of that sample at
most; so the loss of an effective batch is a sum over its samples divided by their number, however they are spread over
micro-batches and ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shadowlit.data.formats import Samples
from shadowlit.errors import ShadowlitError
from shadowlit.training import preference

NAMES = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")


@dataclass(frozen=True)
class Answers:
    """Two answers to each of ``N`` prompts: chosen and rejected, or the labelled one and one to another prompt.

    Attributes:
        logps: ``[N, 2]`` float64, log-probabilities summed over the answer's tokens, in nats.
        lengths: ``[N, 2]`` float64, their tokens.
        desirable: ``[N]`` bool, the label of the first answer; true in pairs.
        reference: ``[N, 2]``, as ``logps`` under the reference; None where there is none.
    """

    logps: Tensor
    lengths: Tensor
    desirable: Tensor
    reference: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """``[N, 2]``: log-probabilities minus those of the reference."""
        assert self.reference is not None
        return self.logps - self.reference

    @property
    def means(self) -> Tensor:
        """``[N, 2]``: log-probabilities per token."""
        return self.logps / self.lengths


class Objective(ABC):
    """A loss per sample; subclasses are what ``model.objective`` may be.

    Attributes:
        samples: What one sample is: conversations, pairs, or labels (answers that are desirable or not).
        has_reference: Whether answers are compared with what the weights at the start make of them.
    """

    samples: Samples = "pairs"
    has_reference: bool = True

    @abstractmethod
    def losses(self, answers: Answers, kl: Tensor | float = 0.0) -> Tensor:
        """The loss of every sample, ``[N]``; ``kl`` is what KTO compares with."""

    @abstractmethod
    def rewards(self, answers: Answers) -> Tensor:
        """What the objective implicitly rewards each answer with, ``[N, 2]``."""


class SFT(Objective):
    """Supervised fine-tuning: cross entropy of the assistant's tokens, a mean over the effective batch's."""

    samples = "conversations"
    has_reference = False

    def losses(self, answers: Answers, kl: Tensor | float = 0.0) -> Tensor:
        """Not asked for: the loss is a sum over tokens, see :mod:`shadowlit.training.objective`."""
        raise NotImplementedError

    def rewards(self, answers: Answers) -> Tensor:
        """None; not asked for."""
        raise NotImplementedError


class DPO(Objective):
    """Direct preference optimisation: the reward is how much likelier an answer has become, times β.

    Args:
        beta: Strength of the tie to the reference; larger stays closer.
        loss: What is made of the margin between the rewards. sigmoid: DPO (arXiv 2305.18290). hinge: SLiC's (arXiv
            2309.06657). ipo: a square around ``1 / (2 beta)``, of log-ratios per token (arXiv 2310.12036). robust:
            unbiased under swapped labels (arXiv 2403.00409).
        label_smoothing: Share of pairs that may be labelled the wrong way round, 0 to below 0.5; of sigmoid and robust.
        sft_weight: Weight of ``-log π(y_w|x) / |y_w|``, which keeps the chosen answer likely (arXiv 2404.19733).

    Raises:
        ShadowlitError: An option is out of its range or has no effect on this loss.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid",
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
    ) -> None:
        _require("DPO", beta=beta, sft_weight=sft_weight)
        if not 0 <= label_smoothing < 0.5:
            raise ShadowlitError(f"DPO's label_smoothing is {label_smoothing}; expected 0 to below 0.5.")
        if label_smoothing and loss in ("hinge", "ipo"):
            raise ShadowlitError(
                f"DPO's label_smoothing is {label_smoothing}, which its loss '{loss}' doesn't know. Set loss to "
                "sigmoid or robust, or label_smoothing to 0."
            )
        if loss == "robust" and not label_smoothing:
            raise ShadowlitError(
                "DPO's loss is 'robust' with label_smoothing=0, which is 'sigmoid'. Set label_smoothing to the share "
                "of labels that may be wrong, e.g. 0.1."
            )
        self.beta, self.loss, self.label_smoothing, self.sft_weight = beta, loss, label_smoothing, sft_weight

    def losses(self, answers: Answers, kl: Tensor | float = 0.0) -> Tensor:
        """``[N]``."""
        ratios = answers.ratios / answers.lengths if self.loss == "ipo" else answers.ratios
        margin = ratios[:, 0] - ratios[:, 1]
        if self.loss == "sigmoid":
            losses = preference.dpo_sigmoid(margin, self.beta, self.label_smoothing)
        elif self.loss == "robust":
            losses = preference.dpo_robust(margin, self.beta, self.label_smoothing)
        else:
            losses = (preference.dpo_hinge if self.loss == "hinge" else preference.dpo_ipo)(margin, self.beta)
        return losses - self.sft_weight * answers.means[:, 0] if self.sft_weight else losses

    def rewards(self, answers: Answers) -> Tensor:
        """``β (log π - log π_ref)``, ``[N, 2]``."""
        return self.beta * answers.ratios


class KTO(Objective):
    """Kahneman-Tversky optimisation: single answers with a label, each against how far the policy has moved.

    ``z``, the distance, is the mean log-ratio of answers to other prompts (the next row's), and at least 0. It is
    taken over the whole effective batch, and from the step before: so it is the same however the batch is spread, and
    exact at the first step, where policy and reference are one. arXiv 2402.01306.

    Args:
        beta: Strength of the tie to the reference; larger stays closer.
        desirable_weight: λ_D, the weight of desirable answers.
        undesirable_weight: λ_U, that of undesirable ones; the weighted numbers of both should be about equal.

    Raises:
        ShadowlitError: An option is out of its range.
    """

    samples = "labels"

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        _require("KTO", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    def losses(self, answers: Answers, kl: Tensor | float = 0.0) -> Tensor:
        """``[N]``."""
        weights = self.desirable_weight, self.undesirable_weight
        return preference.kto(answers.ratios[:, 0], answers.desirable, kl, self.beta, *weights)

    def rewards(self, answers: Answers) -> Tensor:
        """``β (log π - log π_ref)``, ``[N, 2]``; the second answers' aren't used."""
        return self.beta * answers.ratios


class _ByMeans(Objective):
    """An objective without a reference, of log-probabilities per token."""

    has_reference = False
    beta = 1.0

    def rewards(self, answers: Answers) -> Tensor:
        """The log-probability per token, times β where there is one; ``[N, 2]``."""
        return self.beta * answers.means


class ORPO(_ByMeans):
    """Odds ratio preference optimisation: supervised fine-tuning on the chosen answer and an odds ratio, no reference.

    ``-log π(y_w|x) / |y_w| + weight * odds_ratio``; arXiv 2403.07691.

    Args:
        weight: λ, the weight of the odds ratio.

    Raises:
        ShadowlitError: ``weight`` is out of its range.
    """

    def __init__(self, weight: float = 0.1) -> None:
        _require("ORPO", weight=weight)
        self.weight = weight

    def losses(self, answers: Answers, kl: Tensor | float = 0.0) -> Tensor:
        """``[N]``."""
        chosen, rejected = answers.means.unbind(1)
        return -chosen + self.weight * preference.odds_ratio(chosen, rejected)


class SimPO(_ByMeans):
    """Simple preference optimisation: rewards are log-probabilities per token, no reference; arXiv 2405.14734.

    Args:
        beta: Scale of the rewards.
        gamma: Margin that is wanted between the two rewards.

    Raises:
        ShadowlitError: An option is out of its range.
    """

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        _require("SimPO", beta=beta, gamma=gamma)
        self.beta, self.gamma = beta, gamma

    def losses(self, answers: Answers, kl: Tensor | float = 0.0) -> Tensor:
        """``[N]``."""
        return preference.simpo(answers.means[:, 0], answers.means[:, 1], self.beta, self.gamma)


class CPO(Objective):
    """Contrastive preference optimisation: DPO without a reference, and supervised fine-tuning on the chosen answer.

    ``-log σ(β (log π(y_w|x) - log π(y_l|x))) - sft_weight * log π(y_w|x) / |y_w|``; arXiv 2401.08417. The paper writes
    the second term as a sum over tokens, its code takes a mean; so does this.

    Args:
        beta: Scale of the rewards.
        sft_weight: Weight of the second term.

    Raises:
        ShadowlitError: An option is out of its range.
    """

    has_reference = False

    def __init__(self, beta: float = 0.1, sft_weight: float = 1.0) -> None:
        _require("CPO", beta=beta, sft_weight=sft_weight)
        self.beta, self.sft_weight = beta, sft_weight

    def losses(self, answers: Answers, kl: Tensor | float = 0.0) -> Tensor:
        """``[N]``."""
        losses = preference.cpo(answers.logps[:, 0], answers.logps[:, 1], self.beta)
        return losses - self.sft_weight * answers.means[:, 0]

    def rewards(self, answers: Answers) -> Tensor:
        """``β log π``, ``[N, 2]``."""
        return self.beta * answers.logps


class ASFT(_ByMeans):
    """Aligned supervised fine-tuning: the chosen answer is made likely and the rejected one unlikely, each by itself.

    ``-log π(y_w|x) / |y_w| + weight * absolute_likelihood``; arXiv 2409.10571.

    Args:
        weight: Weight of the second term.

    Raises:
        ShadowlitError: ``weight`` is out of its range.
    """

    def __init__(self, weight: float = 0.1) -> None:
        _require("ASFT", weight=weight)
        self.weight = weight

    def losses(self, answers: Answers, kl: Tensor | float = 0.0) -> Tensor:
        """``[N]``."""
        chosen, rejected = answers.means.unbind(1)
        return -chosen + self.weight * preference.absolute_likelihood(chosen, rejected)


def preference_sums(objective: Objective, answers: Answers, kl: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the sums that :func:`preference_metrics` makes its numbers of.

    Args:
        objective: One of preferences.
        answers: N samples.
        kl: What KTO compares with.

    Returns:
        The summed loss, a float64 scalar with a gradient; and ``[13]`` float64 without.
    """
    losses = objective.losses(answers, kl)
    total = losses.sum()
    with torch.no_grad():
        rewards, first = objective.rewards(answers).detach(), answers.desirable.double()
        logps, means = answers.logps.detach(), answers.means.detach()
        labelled = objective.samples == "labels"
        if labelled:  # an answer is chosen or rejected
            correct = (rewards[:, 0] > getattr(objective, "beta", 1.0) * kl) == answers.desirable
            chosen, rejected = first, 1 - first
            second = 0
            tokens = answers.lengths[:, 0].sum()
            shifts = answers.ratios[:, 1].detach().sum()
        else:
            correct = rewards[:, 0] > rewards[:, 1]
            chosen = rejected = torch.ones_like(first)
            second = 1
            tokens = answers.lengths.sum()
            shifts = torch.zeros_like(total)
        sums = [
            total,
            torch.ones_like(first).sum(),
            tokens,
            correct.double().sum(),
            chosen.sum(),
            rejected.sum(),
            (rewards[:, 0] * chosen).sum(),
            (rewards[:, second] * rejected).sum(),
            (logps[:, 0] * chosen).sum(),
            (logps[:, second] * rejected).sum(),
            (logps[:, 0] > logps[:, 1]).double().sum(),
            (means[:, 0] > means[:, 1]).double().sum(),
            shifts,
        ]
        return total, torch.stack([one.detach().double() for one in sums])


def preference_metrics(sums: Tensor, samples: Samples) -> dict[str, Tensor]:
    """Means from sums over a batch, a set, or all ranks'; NaN where there was nothing to take a mean of.

    - ``loss``: of the objective, per sample
    - ``accuracy``: share of pairs whose chosen answer has the larger reward (ties are wrong); of labelled answers,
      share whose reward lies on its label's side of β z
    - ``reward_chosen``, ``reward_rejected``, and their difference ``margin``: mean rewards; of labelled answers those
      of the desirable and the undesirable ones
    - ``logp_chosen``, ``logp_rejected``: mean log-probabilities of whole answers, in nats
    - of pairs ``likelier`` and ``likelier_per_token``: share whose chosen answer is the more probable one, as a whole
      and by the mean of its tokens, whatever the reference says
    - of labelled answers ``kl``: z, in nats
    """
    loss, count, _, correct, chosen, rejected, r_w, r_l, l_w, l_l, likelier, per_token, shifts = sums.unbind()
    values = (loss / count, correct / count, r_w / chosen - r_l / rejected, r_w / chosen, r_l / rejected,
              l_w / chosen, l_l / rejected)  # fmt: skip
    metrics = dict(zip(NAMES, values, strict=True))
    if samples == "labels":
        return {**metrics, "kl": (shifts / count).clamp(min=0)}
    return {**metrics, "likelier": likelier / count, "likelier_per_token": per_token / count}


def _require(objective: str, **options: float) -> None:
    for name, value in options.items():
        least = "above 0" if name == "beta" else "at least 0"
        if value < 0 or (name == "beta" and value == 0):
            raise ShadowlitError(f"{objective}'s {name} is {value}; expected a number {least}.")
