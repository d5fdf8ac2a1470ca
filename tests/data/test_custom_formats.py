"""Formats from outside the package: a user's function, by its import path or as an entry point."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import yaml

from shadowlit import plugins
from shadowlit.cli.main import main
from shadowlit.data.custom_formats import find_format
from shadowlit.data.module import ShadowData
from shadowlit.data.sources import read_conversations
from shadowlit.errors import DataError
from tests.data.templates import talk
from tests.tiny import CHATML, make_tokenizer, save_pair

FORMATS = """
from shadowlit.errors import DataError

def quiz(row):
    if row["question"] == "?":
        raise DataError("has no question. Write one.")
    turns = [{"role": "user", "content": row["question"]}]
    if "solution" in row:
        turns.append({"role": "assistant", "content": row["choices"][row["solution"]]})
    return turns

def document(row):
    return row["question"]

def pair(row):
    return tuple([*quiz({"question": row["question"]}), {"role": "assistant", "content": row["choices"][i]}]
                 for i in (row["solution"], 1 - row["solution"]))

def label(row):
    return quiz(row), row["solution"] == 0

def unknown_role(row):
    return [{"role": "bot", "content": row["question"]}]

class Quiz:
    pass

NUMBER = 3
"""
ROWS = [
    {"question": "1+1", "choices": ["2", "3"], "solution": 0},
    {"question": "2+2", "choices": ["5", "4"], "solution": 1},
]
PLAIN = [{"messages": talk("1+1", "2")}, {"messages": talk("2+2", "4")}]


def pair():
    other = make_tokenizer(None)
    other.eos_token = "<|endoftext|>"
    return SimpleNamespace(tokenizer=lambda: make_tokenizer(CHATML), other_tokenizer=lambda: other)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on ``sys.path`` with the user's file ``my_formats.py``."""
    (tmp_path / "my_formats.py").write_text(FORMATS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_formats", None)


@pytest.fixture
def quiz(folder):
    return write(folder / "quiz.jsonl", ROWS)


def install(folder, package, **formats):
    """Put the metadata of an installed package with entry points into a folder."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in formats.items())
    (info / "entry_points.txt").write_text(f"[shadowlit.formats]\n{lines}")
    importlib.invalidate_caches()
    plugins._offered.cache_clear()


def samples(path, split="train", **options):
    data = ShadowData(pair(), path, cache=False, **options)
    data.setup("fit")
    dataset = data.dataset(split)
    return [dataset[i] for i in range(len(dataset))]


# -- a function ---------------------------------------------------------------------------------------------------


def test_a_function_gives_the_tokens_of_its_messages(folder, quiz):
    plain = samples(write(folder / "plain.jsonl", PLAIN))
    assert samples(quiz, format="my_formats.quiz") == plain
    streamed = samples(quiz, format="my_formats.quiz", streaming=True)
    assert streamed == plain


def test_a_function_in_the_configuration_file(folder, quiz, capsys):
    base, instruct = save_pair(folder)
    config = {
        "pair": {"base": str(base), "instruct": str(instruct)},
        "data": {"train": quiz, "format": "my_formats.quiz", "cache": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["preview", "--config", str(folder / "run.yaml"), "--num_samples=2"]) == 0
    text = capsys.readouterr().out
    assert "1+1<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦2<|im_end|>⟧" in text and "⟦4<|im_end|>⟧" in text
    assert main(["preview", "--config", str(folder / "run.yaml"), "--data.format=my_formats.quizz"]) == 2
    assert "error: data.format is 'my_formats.quizz', which can't be imported" in capsys.readouterr().err


def test_a_text_is_a_document(folder, quiz):
    expected = samples(write(folder / "texts.jsonl", [{"text": "1+1"}, {"text": "2+2"}]))
    assert samples(quiz, format="my_formats.document") == expected


def test_prompts_need_no_answer(folder):
    path = write(folder / "prompts.jsonl", [{"question": "1+1"}])
    (prompt,) = read_conversations(path, "my_formats.quiz", prompts_only=True)
    assert prompt.messages == talk("1+1")
    with pytest.raises(DataError, match=r"sample 0 of .* as read by data\.format=my_formats\.quiz has no assistant"):
        read_conversations(path, "my_formats.quiz")


def test_preferences(folder, quiz):
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (("1+1", "2", "3"), ("2+2", "4", "5"))]
    expected = read_conversations(write(folder / "pairs.jsonl", rows), samples="pairs")
    found = read_conversations(quiz, "my_formats.pair", samples="pairs")
    assert [(c.messages, c.other) for c in found] == [(c.messages, c.other) for c in expected]
    rows = [{"messages": talk("1+1", "2"), "label": True}, {"messages": talk("2+2", "4"), "label": False}]
    expected = read_conversations(write(folder / "labels.jsonl", rows), samples="labels")
    found = read_conversations(quiz, "my_formats.label", samples="labels")
    assert [(c.messages, c.other, c.desirable) for c in found] == [(c.messages, c.other, c.desirable) for c in expected]
    with pytest.raises(
        DataError, match=r"(?s)2 problems.*sample 1 of .* \(line 2\) becomes .*; expected \(chosen, rej"
    ):
        read_conversations(
            write(folder / "long.jsonl", [{"question": "?"}, *ROWS[:1]]), "my_formats.quiz", samples="pairs"
        )


def test_errors_name_the_row(folder):
    path = write(folder / "bad.jsonl", [ROWS[0], {"question": "?"}, {"choices": []}])
    with pytest.raises(DataError) as error:
        read_conversations(path, "my_formats.quiz")
    assert f"sample 1 of {path} (line 2) has no question. Write one." in str(error.value)
    assert f"sample 2 of {path} (line 3) fails in data.format=my_formats.quiz with KeyError: 'question'." in str(
        error.value
    )
    with pytest.raises(DataError, match=r"data\.format=my_formats\.unknown_role has the unknown role 'bot'"):
        read_conversations(path, "my_formats.unknown_role")


def test_the_functions_file_is_part_of_the_cache_key(folder, quiz):
    def first_answer():
        data = ShadowData(pair(), quiz, format="my_formats.quiz", cache_dir=str(folder / "cache"))
        data.setup("fit")
        labels = data.dataset("train")[0]["labels"]
        return data.tokenizer.decode([label for label in labels if label != -100])

    assert first_answer() == first_answer() == "2<|im_end|>"
    assert len(list((folder / "cache").iterdir())) == 1
    (folder / "my_formats.py").write_text(FORMATS.replace('row["choices"][row["solution"]]', '"It is unknown."'))
    sys.modules.pop("my_formats")
    importlib.invalidate_caches()
    assert first_answer() == "It is unknown.<|im_end|>"
    assert len(list((folder / "cache").iterdir())) == 2


def test_a_function_without_a_file_is_not_cached(folder, quiz):
    module = importlib.import_module("my_formats")
    module.made = eval("lambda row: quiz(row)", vars(module))
    assert find_format("my_formats.quiz").digest() is not None
    assert find_format("my_formats.made").digest() is None
    ShadowData(pair(), quiz, format="my_formats.made", cache_dir=str(folder / "cache")).setup("fit")
    assert not (folder / "cache").exists()


# -- an entry point -----------------------------------------------------------------------------------------------


def test_an_entry_point(folder, quiz):
    install(folder, "quiz_package", quiz="my_formats:quiz")
    assert samples(quiz, format="quiz") == samples(quiz, format="my_formats.quiz")


def test_an_entry_point_that_names_another_function_of_the_file_is_another_cache_key(folder, quiz):
    def load():
        ShadowData(pair(), quiz, format="quiz", cache_dir=str(folder / "cache")).setup("fit")
        return len(list((folder / "cache").iterdir()))

    install(folder, "quiz_package", quiz="my_formats:quiz")
    assert load() == load() == 1
    (folder / "quiz_package-1.0.dist-info/entry_points.txt").write_text("[shadowlit.formats]\nquiz=my_formats:document")
    importlib.invalidate_caches()
    plugins._offered.cache_clear()
    assert load() == 2


def test_two_formats_of_one_name(folder):
    install(folder, "one_package", quiz="my_formats:quiz", messages="my_formats:quiz")
    assert find_format("quiz") is not None
    install(folder, "other_package", quiz="my_formats:document")
    with pytest.raises(
        DataError,
        match=r"^data\.format is 'quiz', which is the entry point my_formats:\w+ of \w+_package and the entry point "
        r"my_formats:\w+ of \w+_package; expected one format of that name\. Uninstall",
    ):
        ShadowData(pair(), "none.jsonl", format="quiz")
    with pytest.raises(DataError, match=r"^data\.format is 'messages', which is a built-in format and the entry point"):
        ShadowData(pair(), "none.jsonl", format="messages")
    assert find_format("auto") is None and find_format("alpaca") is None


# -- what is not a format --------------------------------------------------------------------------------------------


def test_a_function_itself_is_refused_with_its_import_path():
    with pytest.raises(DataError, match=rf"^data\.format is <function .* import path .* '{__name__}\.pair'\.$"):
        ShadowData(pair(), "none.jsonl", format=pair)


@pytest.mark.parametrize(("name", "problem"), [
    ("mesages", r"; expected one of .*\. Did you mean 'messages'\?$"),
    ("no_such_module.quiz", r", which can't be imported \(ModuleNotFoundError: No module named 'no_such_module'\)"),
    ("my_formats.quizz", r", which can't be imported \(AttributeError: module 'my_formats' has no attribute 'quizz'\)"),
    ("my_formats.NUMBER", r", which is 3 and no function"),
    ("my_formats.Quiz", r", which is <class 'my_formats\.Quiz'> and no function"),
    ("broken.quiz", r", which can't be imported \(SyntaxError"),
])  # fmt: skip
def test_a_name_without_a_format_is_refused_before_anything_is_read(folder, name, problem):
    (folder / "broken.py").write_text("def quiz(:")
    install(folder, "quiz_package", quiz="my_formats:quiz")
    with pytest.raises(
        DataError,
        match=rf"^data\.format is '{name}'{problem}",
    ) as error:
        ShadowData(pair(), "none.jsonl", format=name)
    known = "alpaca, auto, messages, prompt_completion, quiz, sharegpt, text"
    assert f"; expected one of {known}, or the import path of a function, e.g. " in str(error.value)
