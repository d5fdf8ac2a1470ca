"""Objectives with a loss per pair of answers, or per labelled answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from shadowlit.data.formats import Samples
from shadowlit.errors import ShadowlitError
from shadowlit.plugins import path_of
from shadowlit.training import preference
from shadowlit.training.metrics import PreferenceScores, Scores
from shadowlit.training.objectives.base import Objective, Sums
from shadowlit.training.outputs import Answers, Outputs, require_shape

NAMES = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")


class PreferenceObjective(Objective):
    """A loss per pair of answers, or per labelled answer, whose mean over the effective batch is minimised.

    A subclass may set ``samples`` to labels and ``has_reference`` to false; then :attr:`Answers.reference` is None.
    Each term of a loss should be a mean over tokens of its sample at most.
    """

    samples: Samples = "pairs"
    has_reference: bool = True
    kl: Tensor | float = 0.0  # of labelled answers: distance from the reference in the step before

    @abstractmethod
    def losses(self, answers: Answers) -> Tensor:
        """Return the loss of every sample, ``[N]``, with a gradient."""

    @abstractmethod
    def rewards(self, answers: Answers) -> Tensor:
        """Return the implicit reward of every answer, ``[N, 2]``, from which margins and accuracy are logged."""

    def step(self, outputs: Outputs) -> Mapping[str, Tensor | float]:
        """Return the summed losses, and what :func:`preference_metrics` is made of."""
        return preference_sums(self, replace(outputs.answers(self.has_reference), kl=self.kl))

    def finish_step(self, sums: Sums) -> Sums:
        """Return the tokens of the answers and :func:`preference_metrics`; remembers the distance for the next step."""
        metrics = preference_metrics(sums, self.samples)
        self.kl = metrics.get("kl", self.kl)
        return {"tokens": sums["tokens"], **{name: value for name, value in metrics.items() if name != "loss"}}

    def configure_scores(self) -> Metric:
        """Return the metrics of :func:`preference_metrics` over a validation set."""
        return PreferenceScores(self._measure)

    def score(self, outputs: Outputs, scores: Sequence[Scores]) -> None:
        """Add a validation batch; every metric's ``update`` gets its :class:`Answers`."""
        answers = outputs.answers(self.has_reference)
        for one in scores:
            for metric in (one.own, *one.others.values()):
                metric.update(answers)

    def reset(self) -> None:
        """Begin at the reference, from which the distance is 0."""
        self.kl = 0.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the distance that the next step of labelled answers compares with."""
        if self.samples == "labels":
            checkpoint["kl"] = float(self.kl)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the distance back."""
        self.kl = checkpoint.get("kl", 0.0)

    def _measure(self, answers: Answers) -> dict[str, float]:
        if self.samples == "labels":
            answers = replace(answers, kl=answers.ratios[:, 1].mean().clamp(min=0))
        sums = {name: one.detach() for name, one in preference_sums(self, answers).items()}
        return {name: value.item() for name, value in preference_metrics(sums, self.samples).items()}


class DPO(PreferenceObjective):
    """Direct preference optimisation: the reward is β times the change of an answer's log-probability.

    Args:
        beta: Scale of the rewards; a larger one keeps the model closer to the reference.
        loss: Function of the margin between the rewards. sigmoid: DPO (arXiv 2305.18290). hinge: SLiC's (arXiv
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

    def losses(self, answers: Answers) -> Tensor:
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


class KTO(PreferenceObjective):
    """Kahneman-Tversky optimisation: single labelled answers, each compared with the distance the policy has moved.

    The distance ``z`` is the mean log-ratio of answers to other prompts (the next row's), at least 0, over the whole
    effective batch of the previous step. It is thus the same however the batch is spread, and exact at the first step,
    where policy and reference are the same. arXiv 2402.01306.

    Args:
        beta: Scale of the rewards; a larger one keeps the model closer to the reference.
        desirable_weight: Weight of desirable answers, λ_D.
        undesirable_weight: Weight of undesirable answers, λ_U; the weighted numbers of both should be about equal.
    """

    samples = "labels"

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        _require("KTO", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    def losses(self, answers: Answers) -> Tensor:
        """``[N]``."""
        weights = self.desirable_weight, self.undesirable_weight
        return preference.kto(answers.ratios[:, 0], answers.desirable, answers.kl, self.beta, *weights)

    def rewards(self, answers: Answers) -> Tensor:
        """``β (log π - log π_ref)``, ``[N, 2]``; the second answers' aren't used."""
        return self.beta * answers.ratios


class _ByMeans(PreferenceObjective):
    """An objective without a reference, of log-probabilities per token."""

    has_reference = False
    beta = 1.0

    def rewards(self, answers: Answers) -> Tensor:
        """The log-probability per token, times β where there is one; ``[N, 2]``."""
        return self.beta * answers.means


class ORPO(_ByMeans):
    """Odds ratio preference optimisation: supervised fine-tuning on the chosen answer plus an odds ratio, no reference.

    ``-log π(y_w|x) / |y_w| + weight * odds_ratio``; arXiv 2403.07691.

    Args:
        weight: λ, the weight of the odds ratio.
    """

    def __init__(self, weight: float = 0.1) -> None:
        _require("ORPO", weight=weight)
        self.weight = weight

    def losses(self, answers: Answers) -> Tensor:
        """``[N]``."""
        chosen, rejected = answers.means.unbind(1)
        return -chosen + self.weight * preference.odds_ratio(chosen, rejected)


class SimPO(_ByMeans):
    """Simple preference optimisation: rewards are log-probabilities per token, no reference; arXiv 2405.14734.

    Args:
        beta: Scale of the rewards.
        gamma: Target margin between the two rewards.
    """

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        _require("SimPO", beta=beta, gamma=gamma)
        self.beta, self.gamma = beta, gamma

    def losses(self, answers: Answers) -> Tensor:
        """``[N]``."""
        return preference.simpo(answers.means[:, 0], answers.means[:, 1], self.beta, self.gamma)


class CPO(PreferenceObjective):
    """Contrastive preference optimisation: DPO without a reference, and supervised fine-tuning on the chosen answer.

    ``-log σ(β (log π(y_w|x) - log π(y_l|x))) - sft_weight * log π(y_w|x) / |y_w|``; arXiv 2401.08417. The paper writes
    the second term as a sum over tokens, its code takes a mean; so does this.

    Args:
        beta: Scale of the rewards.
        sft_weight: Weight of the second term.
    """

    has_reference = False

    def __init__(self, beta: float = 0.1, sft_weight: float = 1.0) -> None:
        _require("CPO", beta=beta, sft_weight=sft_weight)
        self.beta, self.sft_weight = beta, sft_weight

    def losses(self, answers: Answers) -> Tensor:
        """``[N]``."""
        losses = preference.cpo(answers.logps[:, 0], answers.logps[:, 1], self.beta)
        return losses - self.sft_weight * answers.means[:, 0]

    def rewards(self, answers: Answers) -> Tensor:
        """``β log π``, ``[N, 2]``."""
        return self.beta * answers.logps


class ASFT(_ByMeans):
    """Aligned supervised fine-tuning: makes the chosen answer likely and the rejected one unlikely, independently.

    ``-log π(y_w|x) / |y_w| + weight * absolute_likelihood``; arXiv 2409.10571.

    Args:
        weight: Weight of the second term.
    """

    def __init__(self, weight: float = 0.1) -> None:
        _require("ASFT", weight=weight)
        self.weight = weight

    def losses(self, answers: Answers) -> Tensor:
        """``[N]``."""
        chosen, rejected = answers.means.unbind(1)
        return -chosen + self.weight * preference.absolute_likelihood(chosen, rejected)


def preference_sums(objective: PreferenceObjective, answers: Answers) -> Sums:
    """Return the loss of a batch, a float64 scalar with a gradient, and the other sums of
    :func:`preference_metrics`.
    """
    own = path_of(objective)
    losses = require_shape(objective.losses(answers), answers.logps.shape[:1], f"{own}.losses")
    total = losses.sum()
    with torch.no_grad():
        dtype = answers.logps.dtype
        rewards = require_shape(objective.rewards(answers), answers.logps.shape, f"{own}.rewards").detach()
        first = answers.desirable.to(dtype)
        logps, means = answers.logps.detach(), answers.means.detach()
        if objective.samples == "labels":  # an answer is chosen or rejected
            correct = (rewards[:, 0] > getattr(objective, "beta", 1.0) * answers.kl) == answers.desirable
            chosen, rejected, second = first, 1 - first, 0
            tokens = answers.lengths[:, 0].sum()
            shifts = answers.ratios[:, 1].detach().sum()
        else:
            correct = rewards[:, 0] > rewards[:, 1]
            chosen, rejected, second = torch.ones_like(first), torch.ones_like(first), 1
            tokens = answers.lengths.sum()
            shifts = torch.zeros_like(total)
        return {
            "loss": total,
            "count": torch.ones_like(first).sum(),
            "tokens": tokens,
            "correct": correct.to(dtype).sum(),
            "chosen": chosen.sum(),
            "rejected": rejected.sum(),
            "reward_chosen": (rewards[:, 0] * chosen).sum(),
            "reward_rejected": (rewards[:, second] * rejected).sum(),
            "logp_chosen": (logps[:, 0] * chosen).sum(),
            "logp_rejected": (logps[:, second] * rejected).sum(),
            "likelier": (logps[:, 0] > logps[:, 1]).to(dtype).sum(),
            "likelier_per_token": (means[:, 0] > means[:, 1]).to(dtype).sum(),
            "shifts": shifts,
        }


def preference_metrics(sums: Sums, samples: Samples) -> Sums:
    """Means from sums over a batch, a set, or all ranks; NaN where there was nothing to take a mean of.

    - ``loss``: mean loss of a sample
    - ``accuracy``: share of pairs whose chosen answer has the larger reward (ties are wrong), or of labelled answers
      whose reward is on their label's side of β z
    - ``reward_chosen``, ``reward_rejected``, and their difference ``margin``: mean rewards; for labelled answers those
      of the desirable and the undesirable ones
    - ``logp_chosen``, ``logp_rejected``: mean log-probabilities of whole answers, in nats
    - for pairs ``likelier`` and ``likelier_per_token``: share whose chosen answer is the more probable one, as a whole
      and by the mean of its tokens, regardless of the reference
    - for labelled answers ``kl``: z, in nats
    """
    count, chosen, rejected = sums["count"], sums["chosen"], sums["rejected"]
    rewards = sums["reward_chosen"] / chosen, sums["reward_rejected"] / rejected
    logps = sums["logp_chosen"] / chosen, sums["logp_rejected"] / rejected
    values = (sums["loss"] / count, sums["correct"] / count, rewards[0] - rewards[1], *rewards, *logps)
    metrics = dict(zip(NAMES, values, strict=True))
    if samples == "labels":
        return {**metrics, "kl": (sums["shifts"] / count).clamp(min=0)}
    return {**metrics, **{name: sums[name] / count for name in ("likelier", "likelier_per_token")}}


def _require(objective: str, **options: float) -> None:
    for name, value in options.items():
        least = "above 0" if name == "beta" else "at least 0"
        if value < 0 or (name == "beta" and value == 0):
            raise ShadowlitError(f"{objective}'s {name} is {value}; expected a number {least}.")
