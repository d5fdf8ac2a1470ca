"""Every format to the same messages; every malformed row with its reason and its cure."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from shadowlit.data.formats import convert_row, detect_format
from shadowlit.data.sources import is_remote, read_conversations, stream_conversations
from shadowlit.errors import DataError
from tests.data.templates import talk

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("format, row, expected", [
    ("messages", {"messages": talk("a", "b", system="s"), "id": 3}, talk("a", "b", system="s")),
    ("messages", {"messages": [{**USER, "name": None, "extra": 1}, {**ANSWER, "train": True, "weight": 1}]},
     [USER, ANSWER]),
    ("messages", {"messages": [USER, {**ANSWER, "train": False}]}, [USER, {**ANSWER, "weight": 0.0}]),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 0}]}, [USER, {**ANSWER, "weight": 0.0}]),
    ("messages", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"x": 1}]},
                               {"role": "tool", "content": ""}, ANSWER]},
     [USER, {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}, {"role": "tool", "content": ""}, ANSWER]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [USER, ANSWER]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}],
                  "system": "s"}, [{"role": "system", "content": "s"}, USER, {**ANSWER, "weight": 0.0}]),
    ("sharegpt", {"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, [USER, ANSWER]),
    ("alpaca", {"instruction": "a", "input": None, "output": "b", "system": ""}, [USER, ANSWER]),
    ("alpaca", {"instruction": "a", "input": "c", "output": "b", "system": "s"}, talk("a\nc", "b", system="s")),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, [USER, ANSWER]),
    ("prompt_completion", {"prompt": talk("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]},
     [USER, {**ANSWER, "weight": 0.0}, *talk("a", "b", "c", "d")[2:]]),
])  # fmt: skip
def test_each_format_becomes_messages(format, row, expected):
    assert detect_format(row, source="f") == format
    before = json.dumps(row)
    assert convert_row(row, format) == expected
    assert json.dumps(row) == before


@pytest.mark.parametrize("format, row, expected", [
    ("messages", {"messages": [USER]}, [USER]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, [USER]),
    ("alpaca", {"instruction": "a"}, [USER]),
    ("prompt_completion", {"prompt": "a"}, [USER]),
])  # fmt: skip
def test_prompts_need_no_answer(format, row, expected):
    assert detect_format(row, source="f", prompts_only=True) == format
    assert convert_row(row, format, prompts_only=True) == expected
    with pytest.raises(DataError):
        convert_row(row, format)


@pytest.mark.parametrize("format, row, message", [
    ("messages", {"messages": None}, r"has null in 'messages'; expected a list"),
    ("messages", {"messages": "a"}, r"has 'a' \(str\) in 'messages'; expected a list"),
    ("messages", {"other": 1}, r"lacks the field 'messages'. Add it or remove the row"),
    ("messages", {"messages": []}, r"has an empty list in 'messages'. Remove the row"),
    ("messages", {"messages": ["a"]},
     r"has 'a' \(str\) in messages\[0\]; expected an object with 'role' and 'content'"),
    ("messages", {"messages": [USER, {"role": "assistant"}]}, r"lacks the field 'content' in messages\[1\]"),
    ("messages", {"messages": [USER, {"content": "b"}]}, r"lacks the field 'role' in messages\[1\]"),
    ("messages", {"messages": [USER, {**ANSWER, "content": None}]},
     r"null in 'content' in messages\[1\]; expected a text"),
    ("messages", {"messages": [USER, {**ANSWER, "content": [{"type": "text"}]}]},
     r"lacks the field 'text' in 'content' of messages\[1\], part 0"),
    ("messages", {"messages": [USER, {**ANSWER, "content": ["b"]}]},
     r"has 'b' \(str\) in 'content' of messages\[1\], part 0; expected an object of type text or image"),
    ("messages", {"messages": [USER, {**ANSWER, "content": " \n"}]}, r"an empty 'content' of 'messages\[1\]'.*Fill it"),
    ("messages", {"messages": [USER, {**ANSWER, "role": "bot"}]},
     r"unknown role 'bot' in messages\[1\]; expected one of"),
    ("messages", {"messages": [USER]}, r"has no assistant turn.*Remove the row or add the answer"),
    ("messages", {"messages": [USER, {**ANSWER, "train": "no"}]}, r"'train': 'no' \(str\).*expected true or false"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"'weight': 0.5 \(float\).*expected 0 or 1"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]},
     r"unknown speaker 'alien' in conversations\[0\]"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, r"lacks the field 'value' in conversations\[0\]"),
    ("sharegpt", {"conversations": [None]}, r"null in conversations\[0\]; expected an object with 'from' and 'value'"),
    ("sharegpt", {"conversations": []}, r"empty list in 'conversations'"),
    ("alpaca", {"instruction": "a", "output": ""}, r"has an empty 'output'"),
    ("alpaca", {"instruction": "", "input": "", "output": "b"}, r"has an empty 'instruction'"),
    ("alpaca", {"instruction": 3, "output": "b"}, r"has 3 \(int\) in 'instruction'; expected a text"),
    ("alpaca", {"instruction": "a", "output": None}, r"has null in 'output'; expected a text"),
    ("prompt_completion", {"prompt": "a", "completion": ""}, r"has an empty 'completion'"),
    ("prompt_completion", {"prompt": None, "completion": "b"}, r"null in 'prompt'; expected a text or a list"),
    ("prompt_completion", {"completion": "b"}, r"lacks the field 'prompt'"),
    ("prompt_completion", {"prompt": "a", "completion": [USER]}, r"'completion' without an assistant turn"),
])  # fmt: skip
def test_malformed_rows(format, row, message):
    with pytest.raises(DataError, match=message):
        convert_row(row, format)


def test_columns_decide_the_format():
    assert detect_format(["messages", "prompt", "prompt_id"], source="f") == "messages"
    assert detect_format(["messages", "prompt"], source="f", prompts_only=True) == "messages"
    with pytest.raises(
        DataError,
        match=r"f has the columns 'a', 'b'; accepted are messages \(messages\), or conversations "
        r"\(sharegpt\), or instruction, output \(alpaca\), or prompt, completion",
    ):
        detect_format(["b", "a"], source="f")
    with pytest.raises(DataError, match=r"several formats: messages, alpaca.*data\.format=messages"):
        detect_format(["messages", "instruction", "output"], source="f")


# -- files --------------------------------------------------------------------------------------------------------

ROWS = [{"messages": talk("a", "b"), "id": 0}, {"messages": talk("c", "d", "e", "f"), "id": 1}]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def contents(source, **options):
    return [[m["content"] for m in c.messages] for c in read_conversations(source, **options)]


@pytest.mark.parametrize("name, text", [
    ("f.jsonl", lines(ROWS)), ("f.ndjson", lines(ROWS).rstrip()), ("f.json", json.dumps(ROWS, indent=2)),
    ("f.json", lines(ROWS)), ("f.jsonl", b"\xef\xbb\xbf" + lines(ROWS).encode()),
    ("f.JSONL", lines(ROWS).replace("\n", "\r\n\n")),
])  # fmt: skip
def test_json_files(tmp_path, name, text):
    assert contents(write(tmp_path / name, text)) == [["a", "b"], ["c", "d", "e", "f"]]


def test_parquet_files(tmp_path):
    path = tmp_path / "f.parquet"
    rows = [*ROWS, {"messages": [USER, {**ANSWER, "train": False}], "id": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = read_conversations(str(path))
    assert [len(c.messages) for c in read] == [2, 4, 2]
    assert [m.get("weight") for c in read for m in c.messages] == [None] * 7 + [0.0]
    assert str(read[2]) == f"sample 2 of {path}"
    write(path, b"no parquet")
    with pytest.raises(DataError, match=r"f\.parquet is no readable Parquet file \(.*\)\. Write it again"):
        read_conversations(str(path))


def test_characters_that_look_like_line_ends(tmp_path):
    row = {"messages": [USER, {**ANSWER, "content": "b\u2028c\x85d"}]}
    path = write(tmp_path / "f.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert contents(path) == [["a", "b\u2028c\x85d"]]


def test_rows_may_have_unequal_keys(tmp_path):
    rows = [ROWS[0], {"messages": [{**USER, "name": "x"}, ANSWER], "more": [1, "x"]}]
    assert len(contents(write(tmp_path / "f.jsonl", lines(rows)))) == 2


@pytest.mark.parametrize("name, text, message", [
    ("f.jsonl", "", r"f\.jsonl is empty. Give a file"),
    ("f.jsonl", "\n \n", r"f\.jsonl has no rows"),
    ("f.json", "[]", r"f\.json has no rows"),
    ("f.csv", "a,b", r"f\.csv has the extension '\.csv'; expected one of \.json, \.jsonl, \.ndjson, \.parquet"),
    ("f.jsonl", lines(ROWS) + "\n{\"messages\": [\n",
     r"^sample 2 of \S*f\.jsonl \(line 4\) is broken JSON: .* in column \d+. Correct or remove"),
    ("f.json", "[{\"a\": 1},\n oops]",
     r"f\.json is broken JSON in line 2, column 2.*a list of objects, or one object per line"),
    ("f.jsonl", lines(ROWS).encode() + b"\xe9",
     r"f\.jsonl is not UTF-8: byte 0xe9 in line 3.*iconv -f latin1 -t utf-8"),
    ("f.jsonl", lines(ROWS) + "3\n", r"sample 2 of \S*f\.jsonl \(line 3\) is no object but int"),
    ("f.jsonl", "\n" + lines([*ROWS, {"messages": None}]),
     r"^sample 2 of \S*f\.jsonl \(line 4\) has null in 'messages'"),
    ("f.json", json.dumps([*ROWS, {}]), r"^sample 2 of \S*f\.json lacks the field 'messages'"),
    ("f.jsonl", lines([{"words": "a"}]), r"f\.jsonl has the columns 'words'; accepted are .*Rename the columns"),
])  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_conversations(write(tmp_path / name, text))


def test_a_forced_format(tmp_path):
    path = write(tmp_path / "f.jsonl", lines([{"messages": talk("a", "b"), "prompt": "c", "completion": "d"}]))
    with pytest.raises(DataError, match="several formats"):
        read_conversations(path)
    assert contents(path, format="prompt_completion") == [["c", "d"]]
    with pytest.raises(
        DataError, match=r"without 'instruction', 'output', which data\.format=alpaca needs.*format=auto"
    ):
        read_conversations(path, "alpaca")


def test_several_bad_rows_in_one_error(tmp_path):
    path = write(tmp_path / "f.jsonl", lines([ROWS[0], *[{"messages": []}] * 7]))
    with pytest.raises(DataError, match=r"^7 problems with the data:\n  1\. sample 1 of ") as error:
        read_conversations(path)
    assert "5. sample 5 of" in str(error.value) and str(error.value).endswith("and 2 more")


def test_missing_files_and_unknown_data_sets(tmp_path, monkeypatch):
    for name in (f"{tmp_path}/none.jsonl", "none.jsonl", "./none", "none"):
        with pytest.raises(DataError, match=r"none\S* does not exist \(looked in .*Correct the path"):
            read_conversations(name)
        assert not is_remote(name)

    def refuse(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError,
        match=r"'org/name' can't be read from the hub, and there is no such file \(\w+: no network\)\. "
        r"Expected .*org/name\[/config\]\[@revision\]\[:split\].*local file",
    ):
        read_conversations("org/name")
    assert is_remote("org/name:train")


def test_hub_data_sets(monkeypatch):
    asked = []

    def load(repo, name, revision, streaming):
        if streaming:
            return datasets.IterableDatasetDict(
                {k: v.to_iterable_dataset() for k, v in load(repo, name, "", False).items()}
            )
        asked.append((repo, name, revision))
        sets = {
            split: datasets.Dataset.from_list([{"prompt": split, "completion": "b"}]) for split in ("train", "test")
        }
        return datasets.DatasetDict(sets)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert contents("org/name/main@abc:test") == [["test", "b"]]
    assert contents("org/name") == [["train", "b"]]
    assert contents("org/name", use="test") == [["test", "b"]]
    assert asked == [("org/name", "main", "abc"), ("org/name", None, None), ("org/name", None, None)]
    with pytest.raises(
        DataError, match=r"'org/name' has the splits train, test, and no 'validation'.*'org/name:train'"
    ):
        read_conversations("org/name", use="validation")
    assert [c.messages for c in stream_conversations("org/name:test")] == [
        c.messages for c in read_conversations("org/name:test")
    ]


def test_folders(tmp_path, monkeypatch):
    datasets.DatasetDict({"only": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert contents(str(tmp_path / "saved")) == contents(f"{tmp_path}/saved:only") == [["a", "b"], ["c", "d", "e", "f"]]
    with pytest.raises(DataError, match=r"saved:test' has the splits only, and no 'test'"):
        read_conversations(f"{tmp_path}/saved:test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder \S*empty is no data set that can be read \(.*\)\. Name a file"):
        read_conversations(str(tmp_path / "empty"))
