"""Objectives of preferences: values by hand, losses and gradients against ten lines of plain Python."""

import math

import pytest
import torch

from shadowlit.errors import ShadowlitError
from shadowlit.training import preference
from shadowlit.training.objectives import (
    ASFT,
    CPO,
    DPO,
    KTO,
    ORPO,
    SimPO,
    preference_metrics,
    preference_sums,
)
from shadowlit.training.outputs import Answers

LOG2, LOG3 = math.log(2), math.log(3)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


# -- by hand ------------------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    """σ(log 3) = 3/4, so a margin of log 3 / β costs log 4/3, and its negative log 4."""
    margin = t(LOG3, -LOG3, 0) / 0.5
    assert preference.dpo_sigmoid(margin, 0.5).tolist() == pytest.approx([math.log(4 / 3), math.log(4), LOG2])
    smooth = preference.dpo_sigmoid(margin, 0.5, 0.1).tolist()
    assert smooth[0] == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))
    robust = preference.dpo_robust(margin, 0.5, 0.1).tolist()
    assert robust[0] == pytest.approx((0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8)
    assert robust[2] == pytest.approx(LOG2)


def test_hinge_and_ipo_by_hand():
    assert preference.dpo_hinge(t(0, 4, 40), 0.1).tolist() == pytest.approx([1, 0.6, 0])
    assert preference.dpo_ipo(t(0, 5, 7), 0.1).tolist() == pytest.approx([25, 0, 4])  # 1 / (2 · 0.1) = 5


def test_kto_by_hand():
    """β (r - z) = log 3 for all: a desirable answer costs λ/4, an undesirable one 3λ/4."""
    ratio = t(LOG3 / 0.5 + 2, LOG3 / 0.5 + 2)
    losses = preference.kto(ratio, torch.tensor([True, False]), 2.0, 0.5, 1.0, 2.0)
    assert losses.tolist() == pytest.approx([0.25, 1.5])


def test_means_by_hand():
    """Mean tokens of probability 3/4 and 1/2 have the odds 3 and 1."""
    chosen, rejected = t(math.log(0.75)), t(math.log(0.5))
    assert preference.log_odds(chosen).item() == pytest.approx(LOG3)
    assert preference.odds_ratio(chosen, rejected).item() == pytest.approx(math.log(4 / 3))
    assert preference.absolute_likelihood(chosen, rejected).item() == pytest.approx(-math.log(0.75) - math.log(0.5))
    # 2 · log(3/2) - log(3/4) = log 3
    assert preference.simpo(chosen, rejected, 2.0, math.log(0.75)).item() == pytest.approx(math.log(4 / 3))
    assert preference.cpo(chosen, rejected, 1 / math.log(1.5) * LOG3).item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("value", [-1e-12, -1e-6, -0.69, -0.7, -5.0, -800.0])
def test_odds_are_finite_at_both_ends_and_so_are_their_gradients(value):
    mean = t(value).requires_grad_()
    found = preference.log1mexp(mean)
    found.backward()
    assert found.item() == pytest.approx(math.log(-math.expm1(min(value, -1e-7))), rel=1e-9, abs=1e-300)
    assert mean.grad.isfinite().all()


# -- against ten lines of plain Python ----------------------------------------------------------------------------


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def plain(name, w, l, rw, rl, nw, nl, good=True, z=0.3):  # noqa: E741
    """The formulas of the papers, on floats: log-probabilities w and l, of the reference rw and rl, lengths nw, nl."""
    m, odds = (w - rw) - (l - rl), lambda x: x - math.log(1 - math.exp(x))
    side = 1 if good else -1
    return {
        "sigmoid": -log_sigmoid(0.3 * m),
        "smooth": -0.8 * log_sigmoid(0.3 * m) - 0.2 * log_sigmoid(-0.3 * m),
        "sft": -log_sigmoid(0.3 * m) - 0.5 * w / nw,
        "hinge": max(0.0, 1 - 0.3 * m),
        "ipo": ((w - rw) / nw - (l - rl) / nl - 1 / 0.6) ** 2,
        "robust": (-0.8 * log_sigmoid(0.3 * m) + 0.2 * log_sigmoid(-0.3 * m)) / 0.6,
        "kto": (1.5 if good else 0.5) * (1 - 1 / (1 + math.exp(-side * 0.3 * (w - rw - z)))),
        "orpo": -w / nw - 0.2 * log_sigmoid(odds(w / nw) - odds(l / nl)),
        "simpo": -log_sigmoid(2 * w / nw - 2 * l / nl - 0.5),
        "cpo": -log_sigmoid(0.3 * (w - l)) - 0.7 * w / nw,
        "asft": -w / nw - 0.2 * (log_sigmoid(odds(w / nw)) + log_sigmoid(-odds(l / nl))),
    }[name]


OBJECTIVES = {
    "sigmoid": DPO(0.3),
    "smooth": DPO(0.3, label_smoothing=0.2),
    "sft": DPO(0.3, sft_weight=0.5),
    "hinge": DPO(0.3, "hinge"),
    "ipo": DPO(0.3, "ipo"),
    "robust": DPO(0.3, "robust", label_smoothing=0.2),
    "kto": KTO(0.3, 1.5, 0.5),
    "orpo": ORPO(0.2),
    "simpo": SimPO(2.0, 0.5),
    "cpo": CPO(0.3, 0.7),
    "asft": ASFT(0.2),
}


def make_answers(num=6, seed=0, kl=0.3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (num, 2), generator=generator).double()
    logps = -lengths * (0.2 + 2 * torch.rand(num, 2, generator=generator, dtype=torch.float64))
    reference = logps + torch.randn(num, 2, generator=generator, dtype=torch.float64)
    return Answers(logps.requires_grad_(), lengths, torch.arange(num) % 2 == 0, reference, kl)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients(name):
    """Gradients by central differences of the plain formula."""
    answers = make_answers()
    losses = OBJECTIVES[name].losses(answers)
    losses.sum().backward()
    for i, (pair, reference, lengths) in enumerate(
        zip(answers.logps.tolist(), answers.reference.tolist(), answers.lengths.tolist(), strict=True)
    ):

        def formula(w, l, i=i, reference=reference, lengths=lengths):  # noqa: E741
            return plain(name, w, l, *reference, *lengths, good=bool(answers.desirable[i]))

        w, l, d = *pair, 1e-6  # noqa: E741
        slopes = [(formula(w + d, l) - formula(w - d, l)) / 2 / d, (formula(w, l + d) - formula(w, l - d)) / 2 / d]
        assert losses[i].item() == pytest.approx(formula(w, l), rel=1e-9)
        assert answers.logps.grad[i].tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sums_of_parts_are_the_sums_of_the_whole(name):
    objective, answers = OBJECTIVES[name], make_answers()
    sums = preference_sums(objective, answers)
    parts = []
    for part in (slice(0, 1), slice(1, 6)):
        fields = (answers.logps, answers.lengths, answers.desirable, answers.reference)
        parts.append(preference_sums(objective, Answers(*(field[part] for field in fields), answers.kl)))
    for sum_name, whole in sums.items():
        torch.testing.assert_close(parts[0][sum_name] + parts[1][sum_name], whole)
        assert whole.requires_grad is (sum_name == "loss")


def test_metrics_by_hand():
    """Two pairs: the first is preferred by the rewards but not by the probabilities, the second the other way round."""
    answers = Answers(t(-4, -3, -1, -2).view(2, 2), t(4, 1, 2, 2).view(2, 2), torch.tensor([True, True]),
                      t(-6, -4, -1, -3).view(2, 2))  # fmt: skip
    metrics = preference_metrics(preference_sums(DPO(0.5), answers), "pairs")
    # log-ratios 2, 1 and 0, 1
    assert metrics["reward_chosen"] == 0.5 and metrics["reward_rejected"] == 0.5 and metrics["margin"] == 0
    assert metrics["accuracy"] == 0.5 and metrics["likelier"] == 0.5
    assert metrics["likelier_per_token"] == 1  # -1 > -3, -0.5 > -1
    assert (metrics["logp_chosen"], metrics["logp_rejected"]) == (-2.5, -2.5)


def test_metrics_of_labels_by_hand():
    answers = Answers(t(-4, -3, -1, -2).view(2, 2), t(4, 1, 2, 2).view(2, 2), torch.tensor([True, False]),
                      t(-6, -4, -1, -3).view(2, 2), kl=1.0)  # fmt: skip
    metrics = preference_metrics(preference_sums(KTO(0.5), answers), "labels")
    assert (metrics["reward_chosen"], metrics["reward_rejected"], metrics["margin"]) == (1, 0, 1)
    assert metrics["accuracy"] == 1  # 2 lies above z = 1 and 0 below
    assert metrics["kl"] == 1
    assert "likelier" not in metrics


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=0), "DPO's beta is 0; expected a number above 0"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing is 0.5; expected 0 to below 0.5"),
        (lambda: DPO(loss="hinge", label_smoothing=0.1), "which its loss 'hinge' doesn't know"),
        (lambda: DPO(loss="robust"), "Set label_smoothing to the share"),
        (lambda: KTO(desirable_weight=-1), "KTO's desirable_weight is -1; expected a number at least 0"),
        (lambda: SimPO(beta=-1), "SimPO's beta is -1"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ShadowlitError, match=message):
        make()
