"""Losses of preference optimisation: pure functions of log-probabilities, one loss per pair or labelled answer.

``log π(y|x)`` is the sum of an answer's token log-probabilities, its mean the sum divided by the answer's tokens, and a
log-ratio ``log π(y|x) - log π_ref(y|x)``. In a pair, ``y_w`` is the chosen answer and ``y_l`` the rejected one, and the
margin ``m`` is the log-ratio of the first minus that of the second. ``β``, above 0, is the scale of rewards. Every
function works element by element on tensors of one shape and any floating dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_sigmoid(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """``-(1 - ε) log σ(β m) - ε log σ(-β m)``: DPO, and with ``ε > 0`` its conservative form.

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; ε, the label smoothing, is Mitchell's (cDPO, 2023): the share of
    pairs, 0 to below 0.5, that are taken to be labelled the wrong way round.
    """
    h = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def dpo_hinge(margin: Tensor, beta: float) -> Tensor:
    """``max(0, 1 - β m)``: the hinge of SLiC (arXiv 2305.10425) on DPO's margin, as RSO has it (arXiv 2309.06657)."""
    return torch.relu(1 - beta * margin)


def dpo_ipo(margin: Tensor, beta: float) -> Tensor:
    """``(m - 1 / (2 β))²``: IPO, which aims at a margin of a certain size; here of means over tokens.

    Azar et al. 2023, arXiv 2310.12036, eq. 17, whose τ is β.
    """
    return (margin - 1 / (2 * beta)) ** 2


def dpo_robust(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """``(-(1 - ε) log σ(β m) + ε log σ(-β m)) / (1 - 2 ε)``: unbiased where a share ε of the labels is swapped.

    Chowdhury et al. 2024, arXiv 2403.00409, eq. 12. May be negative.
    """
    h = beta * margin
    kept, swapped = F.logsigmoid(h), F.logsigmoid(-h)
    return (-(1 - label_smoothing) * kept + label_smoothing * swapped) / (1 - 2 * label_smoothing)


def kto(
    ratio: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``λ_D (1 - σ(β (r - z)))`` for a desirable answer, ``λ_U (1 - σ(β (z - r)))`` for an undesirable one.

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8. r is the answer's log-ratio; z, ``kl``, is the distance of the
    policy from the reference in nats, at least 0, without a gradient.
    """
    h = beta * (ratio - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-h), undesirable_weight * torch.sigmoid(h))


def odds_ratio(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """``-log σ(log odds(y_w) - log odds(y_l))``, with odds of the mean token's probability: the second term of ORPO.

    Hong et al. 2024, arXiv 2403.07691, eq. 7. The means are log-probabilities per token, below 0.
    """
    return -F.logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def simpo(chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma: float) -> Tensor:
    """``-log σ(β mean(y_w) - β mean(y_l) - γ)``: SimPO; γ is the target margin of the rewards.

    Meng et al. 2024, arXiv 2405.14734, eq. 6.
    """
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def cpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``-log σ(β log π(y_w) - β log π(y_l))``: DPO with a uniform reference, the first term of CPO.

    Xu et al. 2024, arXiv 2401.08417, eq. 4.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def absolute_likelihood(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """``-log σ(log odds(y_w)) - log σ(-log odds(y_l))`` = ``-log p_w - log(1 - p_l)``: the second term of ASFT.

    ``p`` is the mean token's probability, ``exp(mean)``. The chosen answer is made likely and the rejected one unlikely
    each by itself, and not one against the other. Wang et al. 2024, arXiv 2409.10571.
    """
    return -chosen_mean - log1mexp(rejected_mean)


def log_odds(mean: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``p = exp(mean)``, for ``mean`` below 0."""
    return mean - log1mexp(mean)


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x below 0, without cancellation at either end; constant above ``-1e-7``."""
    # The odds of an answer that has become certain are infinite, and their gradient is NaN.
    x = x.clamp(max=-1e-7)
    near = x > -math.log(2)
    # Both branches are evaluated, so each gets an argument at which its gradient is finite.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -math.log(2)))),
        torch.log1p(-torch.exp(torch.where(near, -math.log(2), x))),
    )
