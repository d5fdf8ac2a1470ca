"""On a GPU: evaluators in a training find what the same evaluators find on the CPU, model by model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.evaluation.forgetting import Divergence
from shadowlit.evaluation.generated import Generation
from shadowlit.evaluation.multiple_choice import MultipleChoice
from tests.evaluation.contexts import evaluate, make_context, write_rows
from tests.gpu.runs import PRECISIONS, Watch, fit

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    questions = [{"question": f"what is {i}?", "choices": ["one", "two!", "3"], "answer": i % 3} for i in range(7)]
    talks = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ok" * (i + 1)}]}
        for i in range(5)
    ]
    choices, rows = write_rows(root / "choices.jsonl", questions), write_rows(root / "talks.jsonl", talks)
    return lambda: {
        "choice": MultipleChoice(choices, batch_size=2),
        "answers": Generation(rows, match="contains", max_new_tokens=8, batch_size=4),
        "drawn": Generation(rows, match="contains", max_new_tokens=8, temperature=1.0, batch_size=4),
        "forgetting": Divergence(rows, batch_size=3),
    }


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluators_find_on_the_device_what_they_find_on_the_cpu(tmp_path, pairs, evaluators, precision):
    folders, watch = pairs[torch.float32], Watch()
    callbacks = [
        watch, GraftCallback(), EvaluationCallback(evaluators(), folder=str(tmp_path / "e")),
        ExportCallback(folder=str(tmp_path / "export"), verify=False),
    ]  # fmt: skip
    found = fit(tmp_path, folders, "lora", *callbacks, precision=precision, max_epochs=1).logged
    assert watch.changed == []
    close = 1e-4 if precision == "32-true" else 5e-2
    subjects = {"base": folders[0], "instruct": folders[1], "grafted": tmp_path / "export/model"}
    losses = set()
    for who, folder in subjects.items():
        context = make_context(folders, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        own = {name: evaluate(e, context) for name, e in evaluators().items() if name != "forgetting"}
        assert found[f"val/{who}/choice/loss"] == pytest.approx(own["choice"].metrics["loss"], rel=close), who
        losses.add(round(own["choice"].metrics["loss"], 3))
        if precision == "32-true":
            samples = tmp_path / "e" / ("step-4/grafted" if who == "grafted" else who)
            for name in ("answers", "drawn"):
                answers = [sample["answer"] for sample in own[name].samples]
                assert [sample["answer"] for sample in read(samples, name)] == answers and any(answers), (who, name)
    assert len(losses) == 3
    assert found["val/instruct/forgetting/kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["val/grafted/forgetting/kl"] > 1e-4
