"""Rows are read and refused as they should be; too long ones are counted. Parity of numbers: test_harness."""

import json

import pytest
import torch

from shadowlit.errors import DataError
from shadowlit.evaluation.evaluator import EvalContext
from shadowlit.evaluation.multiple_choice import MultipleChoice
from shadowlit.evaluation.rows import spread
from shadowlit.pair.pair import ModelPair
from tests.evaluation.contexts import evaluate, make_context, write_rows
from tests.tiny import save_pair

GOOD = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def read(tmp_path, folders, rows, **options):
    evaluator = MultipleChoice(write_rows(tmp_path / "rows.jsonl", rows), **options)
    evaluator.read(ModelPair(*map(str, folders)), {})
    return evaluator


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "has None (NoneType) in 'question'; expected a text"),
        ({"question": " "}, "has ' ' (str) in 'question'; expected a text, not an empty one"),
        ({"choices": "ab"}, "has 'ab' (str) in 'choices'; expected a list of texts"),
        ({"choices": ["a", ""]}, "expected a list of texts, none empty"),
        ({"choices": ["a"]}, "has 1 in 'choices'; expected at least two choices"),
        ({"choices": ["a", "b", "a"]}, "has 'a' (str) twice in 'choices'"),
        ({"answer": 2}, "has 2 (int) in 'answer', which is none of its 2 choices; expected a number from 0 to 1"),
        ({"answer": -1}, "has -1 (int) in 'answer'"),
        ({"answer": True}, "has True (bool) in 'answer'"),
        ({"answer": "C"}, "has 'C' (str) in 'answer'"),
        ({"answer": "five"}, "a letter from A to B, or the text of a choice"),
    ],
)  # fmt: skip
def test_refused_rows(tmp_path, folders, change, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, folders, [GOOD, {**GOOD, **change}])
    assert str(caught.value).startswith(f"sample 1 of {tmp_path / 'rows.jsonl'} (line 2) has ")
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["question", "choices", "answer"])
def test_missing_field(tmp_path, folders, field):
    row = {key: value for key, value in GOOD.items() if key != field}
    found = ", ".join(f"'{name}'" for name in sorted(row))
    with pytest.raises(DataError, match=f"sample 0 .* lacks the field '{field}'; it has {found}"):
        read(tmp_path, folders, [row])


def test_five_problems_at_once(tmp_path, folders):
    with pytest.raises(DataError, match=r"^7 problems with the data:") as caught:
        read(tmp_path, folders, [{**GOOD, "answer": number} for number in range(2, 9)])
    assert str(caught.value).count("which is none of its") == 5 and "… and 2 more" in str(caught.value)


def test_refused_files(tmp_path, folders):
    pair = ModelPair(*map(str, folders))
    for text, message in (
        ("", "is empty"),
        ("[]", "has no rows"),
        ("[1]", "is not an object but int"),
        ("{", "broken JSON"),
    ):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(DataError, match=message):
            MultipleChoice(str(tmp_path / "rows.json")).read(pair, {})
    with pytest.raises(DataError, match="does not exist"):
        MultipleChoice(str(tmp_path / "none.jsonl")).read(pair, {})


def test_refused_settings(tmp_path, folders):
    with pytest.raises(DataError, match="system='x' is set with chat=false"):
        MultipleChoice("rows.jsonl", chat=False, system="x")
    with pytest.raises(DataError, match="max_length is 0"):
        read(tmp_path, folders, [GOOD], max_length=0)
    with pytest.raises(DataError, match="batch_size of an evaluator is 0"):
        MultipleChoice("rows.jsonl", batch_size=0)


@pytest.mark.parametrize(
    ("choices", "answer", "label"),
    [(["3", "4"], 1, 1), (["3", "4"], "4", 1), (["3", "4"], "A", 0), (["B", "A"], "A", 1), (["x", "y", "z"], "C", 2)],
)
def test_labels(tmp_path, folders, choices, answer, label):
    """A number, a text, a letter; a text before a letter."""
    data = write_rows(tmp_path / "rows.jsonl", [{"question": "?", "choices": choices, "answer": answer}])
    assert evaluate(MultipleChoice(data), make_context(folders)).samples[0]["label"] == label


def test_loglikelihoods_in_float64(tmp_path, folders):
    """Choices of unequal length, rows of unequal numbers: each is the sum of its tokens' log-probabilities."""
    rows = [
        {"messages": [{"role": "user", "content": "Who?"}], "choices": ["me", "you or him", "x", "y"], "answer": "x"},
        {"question": "Where is it now?", "choices": ["here", "there"], "answer": 0},
    ]
    context = make_context(folders)
    found = evaluate(MultipleChoice(write_rows(tmp_path / "rows.jsonl", rows), batch_size=2), context)
    tokenizer, model = context.pair.tokenizer(), make_context(folders).model.double()
    for row, sample in zip(rows, found.samples, strict=True):
        question = row["messages"][0]["content"] if "messages" in row else row["question"]
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant"
        for choice, value in zip(row["choices"], sample["loglikelihoods"], strict=True):
            start = len(tokenizer(prompt)["input_ids"])
            tokens = torch.tensor([tokenizer(f"{prompt}\n{choice}")["input_ids"]])
            logs = torch.log_softmax(model(tokens).logits, -1)[0, :-1].gather(1, tokens[0, 1:, None])
            assert value == pytest.approx(logs[start - 1 :].sum().item(), abs=1e-4)
    losses = [-sample["loglikelihoods"][sample["label"]] for sample in found.samples]
    assert found.metrics["loss"] == pytest.approx(sum(losses) / 2)


def count_forwards(folders, evaluator):
    context, shapes = make_context(folders), []
    context.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    return evaluate(evaluator, context), shapes


def test_choices_of_one_token_share_a_forward(tmp_path, folders):
    rows = [{"question": f"{i}?", "choices": ["a", "b", "c"], "answer": 0} for i in range(4)]
    _, shapes = count_forwards(folders, MultipleChoice(write_rows(tmp_path / "rows.jsonl", rows), batch_size=4))
    assert [shape[0] for shape in shapes] == [4]
    rows[1]["choices"] = ["ab", "bb", "c"]
    _, shapes = count_forwards(folders, MultipleChoice(write_rows(tmp_path / "rows.jsonl", rows), batch_size=4))
    assert [shape[0] for shape in shapes] == [4, 1, 1]


@pytest.mark.filterwarnings("ignore:.*and score 0")
def test_too_long(tmp_path, folders):
    """A row that is one token too long isn't run, scores 0, and is left out of the loss."""
    rows = [{"question": "a" * 40, "choices": ["b", "cccc"], "answer": 0}, {**GOOD, "answer": 0}, GOOD]
    context = make_context(folders)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    prompt = "<|im_start|>user\n" + "a" * 40 + "<|im_end|>\n<|im_start|>assistant\n"
    fits = len(context.pair.tokenizer()(prompt + "cccc")["input_ids"]) - 1  # the last token isn't an input
    assert evaluate(MultipleChoice(data, max_length=fits), context).metrics["num_too_long"] == 0
    with pytest.warns(UserWarning, match=f"1 of 3 rows of .* are longer than {fits - 1} tokens and score 0"):
        found, shapes = count_forwards(folders, MultipleChoice(data, max_length=fits - 1))
    assert found.metrics["num_too_long"] == 1 and found.metrics["num_samples"] == 3
    assert found.metrics["score"] == pytest.approx(1 / 3)  # one of the two equal rows with opposite labels
    assert found.samples[0] == {"index": 0, "score": 0.0, "prediction": None, "label": 0, "loglikelihoods": []}
    assert all(shape[1] < fits - 1 for shape in shapes)
    whole = evaluate(MultipleChoice(write_rows(tmp_path / "two.jsonl", rows[1:])), context)
    assert found.metrics["loss"] == pytest.approx(whole.metrics["loss"])


def test_limit_and_signature(tmp_path, folders):
    rows = [{**GOOD, "question": f"{i}?"} for i in range(10)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = evaluate(MultipleChoice(data, limit=3, batch_size=2), make_context(folders))
    assert [sample["index"] for sample in found.samples] == [0, 3, 6]
    assert spread(range(5), 7) == list(range(5)) and spread(range(4), None) == list(range(4))

    def signature(rows, **options):
        return read(tmp_path, folders, rows, **options).signature()

    first = signature(rows)
    assert first == signature(rows, batch_size=3, every=4)
    others = [
        signature(rows, limit=9), signature(rows, chat=False), signature(rows, system="x"), signature(rows[::-1]),
        signature([{**rows[0], "answer": 0}, *rows[1:]]), signature(rows, max_length=100),
    ]  # fmt: skip
    assert len({first, *others}) == 7
    assert json.dumps(found.metrics)


def test_autocast_and_no_gradient(tmp_path, folders):
    """Forwards run in the context's context, and build no graph."""
    context = make_context(folders)
    context = EvalContext(**{**vars(context), "autocast": lambda: torch.autocast("cpu", torch.bfloat16)})
    seen = []
    context.model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda _, args, output: seen.append((output.dtype, output.requires_grad))
    )
    evaluate(MultipleChoice(write_rows(tmp_path / "rows.jsonl", [GOOD])), context)
    assert seen == [(torch.bfloat16, False)]
