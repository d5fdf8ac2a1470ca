"""Objectives and evaluators that break their contract: the error names the key, the class and what was found."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.record import ValidationRecord
from shadowlit.errors import ShadowlitError
from shadowlit.evaluation.evaluator import EvalResult, Evaluator
from shadowlit.grafting.subject import TUNED
from shadowlit.training import rehearsal
from shadowlit.training.objectives import Objective, PreferenceObjective, TokenObjective

OURS = {"__module__": __name__}


def rehearse(objective):
    return rehearsal.rehearse(objective, objective.configure_scores, {}, 16)


def stepping(function):
    return type("Mine", (Objective,), {"step": lambda self, outputs: function(outputs), **OURS})()


def per_token(function, **methods):
    return type("Mine", (TokenObjective,), {"token_losses": lambda self, *given: function(*given), **OURS, **methods})()


def per_pair(losses, rewards=lambda answers: answers.means):
    methods = {
        "losses": lambda self, a: losses(a),
        "rewards": lambda self, a: rewards(a),
        "has_reference": False,
        **OURS,
    }
    return type("Mine", (PreferenceObjective,), methods)()


def nll(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


WRONG = [
    (stepping(lambda o: o.loss()), r"whose step returns a Tensor of shape \[\]; expected a tensor loss and a count"),
    (stepping(lambda o: None), "whose step returns None; expected"),
    (stepping(lambda o: {"loss": o.loss()}), "whose step returns the sums loss; expected"),
    (stepping(lambda o: {"loss": o.token_log_probs(), "count": 1}), r"loss is a Tensor of shape \[16\]; expected"),
    (stepping(lambda o: {"loss": o.loss(), "count": 1, "z": "a"}), "the sums loss, count, z; z is a str; expected"),
    (stepping(lambda o: {"loss": o.loss().detach(), "count": 1}), r"which fails \(TypeError: step returns a loss"),
    (stepping(lambda o: 1 / 0), r"which fails \(ZeroDivisionError: division by zero; test_rehearsal\.py, line \d+\)"),
    (stepping(lambda o: exit(3)), r"which fails \(SystemExit: 3; test_rehearsal.py, line \d+\). It was tried on a"),
    (per_token(lambda logits, targets: logits.sum()), r"returns a Tensor of shape \[\]; .* \[16\], one loss a token"),
    (per_token(lambda logits, targets: logits), r"model.objective: .*returns a Tensor of shape \[16, 16\]; expected a"),
    (per_token(lambda logits, targets: {"loss": 1}), "returns a dict; expected a tensor of shape"),
    (per_token(lambda logits: logits[:, 0]), r"which fails \(TypeError: .*takes 1 positional argument but 2"),
    (per_token(nll, finish_step=lambda self, sums: sums["count"]), "finish_step returns a Tensor of shape"),
    (per_pair(lambda a: a.means.sum()), r"Mine\.losses returns a Tensor of shape \[\]; .* of shape \[2\]"),
    (per_pair(lambda a: a.means[:, 0], lambda a: None), r"Mine\.rewards returns None; .* of shape \[2, 2\]"),
    (per_pair(lambda a: a.ratios[:, 0]), "compares answers with a reference, but its has_reference is false"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "message"), WRONG, ids=lambda _: "")
def test_an_objective_that_breaks_its_contract(objective, message):
    with pytest.raises(ShadowlitError, match=message) as raised:
        rehearse(objective)
    assert str(raised.value).startswith("model.objective")
    if "which fails" in message:
        assert raised.value.__cause__ is not None and raised.value.__cause__.__traceback__ is not None


def test_a_trial_leaves_no_trace():
    """The state of the objective, the random numbers and a teacher's memory stay as they are; images are not missed."""
    seen, teacher = [], torch.nn.Linear(2, 2)

    def counting(self, logits, targets):
        self.calls.append(len(targets))
        seen.append(self.teacher)
        return nll(logits, targets)

    objective = type("Mine", (TokenObjective,), {"token_losses": counting})()
    objective.calls, objective.teacher = [], teacher
    before = torch.get_rng_state()
    assert rehearse(objective) == {"loss", "perplexity", "accuracy", "sequence_accuracy", "first_token_loss"}
    assert objective.calls == [] and seen == [teacher] and torch.equal(before, torch.get_rng_state())
    rehearse(stepping(lambda outputs: {"loss": outputs.batch["pixel_values"].sum(), "count": 1}))


class Fine(Evaluator):
    def __init__(self, result=None):
        super().__init__()
        self.result = result

    def read(self, pair, template_kwargs):
        pass

    def run(self, context):
        return self.result(context) if callable(self.result) else self.result

    def signature(self):
        return ""


class WithoutSuper(Fine):
    def __init__(self):
        self.result = None


@pytest.mark.parametrize(("result", "message"), [
    ({"score": 1.0}, r"whose run returns \{'score': 1\.0\}; expected an EvalResult with numbers"),
    (None, "whose run returns None; expected"),
    (EvalResult({"accuracy": 1.0}, []), r"whose run returns EvalResult\(metrics=\{'accuracy': 1\.0\}.*one of them the"),
    (EvalResult({"score": "high"}, []), "whose run returns EvalResult.*'high'.*numbers by name"),
    (EvalResult({"score": 1.0}, [{"answer": "a"}]), "whose run returns EvalResult.*'answer'.*samples, if any, that ha"),
    (EvalResult({"score": 1.0}, [{"index": 0}]), "whose run returns EvalResult.*index and a numeric score"),
    (EvalResult({"score": 1.0}, []), ""),
    (EvalResult(1.0, []), r"which fails \(TypeError: "),
    (lambda context: 1 / 0, r"which fails \(ZeroDivisionError: .*; test_rehearsal\.py, line \d+\). Its methods"),
    (EvalResult({"score": torch.tensor(1.0), "n": 2}, [{"index": 0, "score": 1}]), ""),
], ids=lambda _: "")  # fmt: skip
def test_an_evaluator_that_breaks_its_contract(result, message, monkeypatch):
    callback = EvaluationCallback({"mine": Fine(result)})
    callback.record = ValidationRecord()
    monkeypatch.setattr(callback, "_context", lambda *_: None)
    trainer, module = SimpleNamespace(progress_bar_callback=None), SimpleNamespace(eval=lambda: None)
    if not message:
        return callback._run(trainer, module, TUNED, ["mine"])
    with pytest.raises(ShadowlitError, match=rf"^evaluation\.evaluators\.mine is .*\.Fine, {message}"):
        callback._run(trainer, module, TUNED, ["mine"])


def test_an_evaluator_whose_base_was_not_initialised():
    with pytest.raises(
        ShadowlitError, match=r"evaluators\.mine is .*WithoutSuper, but its __init__ doesn't call super\(\)"
    ):
        EvaluationCallback({"mine": WithoutSuper()})
