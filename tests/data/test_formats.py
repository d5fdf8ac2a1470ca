"""Every format to the same messages; every malformed row with its reason and its cure."""

import bz2
import csv
import gzip
import json
import lzma
import re
import shutil
import subprocess
import time

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from shadowlit.data import sources
from shadowlit.data.formats import convert_row, detect_format
from shadowlit.data.sources import is_remote, read_conversations, stream_conversations
from shadowlit.errors import DataError
from tests.data.templates import talk

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "options": {}}}}


@pytest.mark.parametrize("format, row, expected", [
    ("messages", {"messages": talk("a", "b", system="s"), "id": 3}, talk("a", "b", system="s")),
    ("messages", {"messages": [{**USER, "name": None, "extra": 1}, {**ANSWER, "train": True, "weight": 1}]},
     [{**USER, "extra": 1}, ANSWER]),
    ("messages", {"messages": [{**USER, "weight": 0}, {**ANSWER, "loss_weight": 0.5}]},
     [{**USER, "weight": 0}, {**ANSWER, "weight": 0.5}]),
    ("messages", {"messages": [USER, {**ANSWER, "train": False}]}, [USER, {**ANSWER, "weight": 0.0}]),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 0}]}, [USER, {**ANSWER, "weight": 0.0}]),
    ("messages", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                               {"role": "tool", "content": ""}, ANSWER]},
     [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": ""}, ANSWER]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [USER, ANSWER]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}],
                  "system": "s"}, [{"role": "system", "content": "s"}, USER, {**ANSWER, "weight": 0.0}]),
    ("sharegpt", {"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    ("messages", {"messages": [USER, ANSWER], "system": "s"}, talk("a", "b", system="s")),
    ("messages", {"messages": [USER, {**ANSWER, "train": 0}]}, [USER, {**ANSWER, "weight": 0.0}]),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, [USER, ANSWER]),
    ("alpaca", {"instruction": "a", "input": None, "output": "b", "system": ""}, [USER, ANSWER]),
    ("alpaca", {"instruction": "a", "input": "c", "output": "b", "system": "s"}, talk("a\nc", "b", system="s")),
    ("alpaca", {"instruction": "e", "output": "f", "system": "s", "history": [["a", "b"], ["c", "d"]]},
     talk("a", "b", "c", "d", "e", "f", system="s")),
    ("alpaca", {"instruction": "a", "output": "b", "history": None}, [USER, ANSWER]),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                                    {"from": "gpt", "value": "b"}], "system": "s"}, talk("a", "b", system="s")),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, [USER, ANSWER]),
    ("prompt_completion", {"prompt": talk("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]},
     [USER, {**ANSWER, "weight": 0.0}, *talk("a", "b", "c", "d")[2:]]),
])  # fmt: skip
def test_each_format_becomes_messages(format, row, expected):
    assert detect_format(row, source="f") == (format, {})
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
    assert detect_format(row, source="f", prompts_only=True) == (format, {})
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
     r"has 'b' \(str\) in 'content' of messages\[1\], part 0; expected an object of type text, reasoning, tool_"),
    ("messages", {"messages": [USER, {**ANSWER, "content": " \n"}]}, r"an empty 'content' of 'messages\[1\]'.*Fill it"),
    ("messages", {"messages": [USER, {**ANSWER, "role": "bot"}]},
     r"unknown role 'bot' in messages\[1\]; expected one of"),
    ("messages", {"messages": [USER]}, r"has no assistant turn.*Remove the row or add the answer"),
    ("messages", {"messages": [USER, {**ANSWER, "train": "no"}]}, r"'train': 'no' \(str\).*expected true or false"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": -1}]}, r"'weight': -1 \(int\).*a number of at least 0"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": True}]}, r"'weight': True \(bool\).*a number of at least 0"),
    ("messages", {"messages": [USER, {**ANSWER, "loss_weight": float("nan")}]}, r"'loss_weight': nan"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 1, "loss_weight": 0}]}, r"a weight and another loss_weight"),
    ("messages", {"messages": [USER, {**ANSWER, "tool_calls": [{"x": 1}]}]},
     r"tool call \{'x': 1\}.*'name' and 'arg"),
    ("messages", {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{a}"}]}]},
     r"has 'arguments' of the tool call 'f' in messages\[1\] that is not JSON \(.*\): '\{a\}' \(str\)"),
    ("messages", {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
     r"has \[1\] \(list\) in 'arguments' of the tool call 'f' in messages\[1\]; expected an object"),
    ("messages", {"messages": [USER, {**ANSWER, "value": "c"}]}, r"both 'content' and 'value' in messages\[1\]"),
    ("messages", {"messages": [USER, {**ANSWER, "content": [{"type": "video"}]}]}, r"type text, reasoning, tool_call"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(1)"}]},
     r"has a tool call in conversations\[1\] that is not JSON"),
    ("sharegpt", {"conversations": [{"from": "system", "value": "t"}, {"from": "human", "value": "a"},
                                    {"from": "gpt", "value": "b"}], "system": "s"},
     r"the system text 's' \(str\) in 'system' and another one, 't' \(str\).*data\.ignore_columns=\[system\] keeps"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]},
     r"has \['c'\] \(list\) in history\[0\]; expected a list of two texts"),
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
    assert detect_format(["messages", "prompt", "prompt_id"], source="f") == ("messages", {})
    assert detect_format(["messages", "prompt"], source="f", prompts_only=True) == ("messages", {})
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
    for text, told in ((b"version https://git-lfs", "but a pointer of Git LFS"), (b"{}\n", r"but JSON .*\*\.jsonl")):
        with pytest.raises(DataError, match=rf"f\.parquet is not a readable Parquet file {told}"):
            read_conversations(write(path, text))
    write(path, b"no parquet")
    with pytest.raises(DataError, match=r"f\.parquet is not a readable Parquet file \(.*\)\. Write it again"):
        read_conversations(str(path))


def test_characters_that_look_like_line_ends(tmp_path):
    row = {"messages": [USER, {**ANSWER, "content": "b\u2028c\x85d"}]}
    path = write(tmp_path / "f.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert contents(path) == [["a", "b\u2028c\x85d"]]


def test_rows_may_have_unequal_keys(tmp_path):
    rows = [ROWS[0], {"messages": [{**USER, "name": "x"}, ANSWER], "more": [1, 2]}]
    assert len(contents(write(tmp_path / "f.jsonl", lines(rows)))) == 2


@pytest.mark.parametrize("name, text, message", [
    ("f.jsonl", "", r"f\.jsonl is empty. Give a file"),
    ("f.jsonl", "\n \n", r"f\.jsonl has no rows"),
    ("f.json", "[]", r"f\.json has no rows"),
    ("f.xlsx", "a,b", r"f\.xlsx has the extension '\.xlsx'; expected one of \.json, \.jsonl, \.ndjson, \.parquet, "),
    ("f.csv", "prompt,prompt\na,b\n", r"f\.csv has the header prompt, prompt; expected a different name for every"),
    ("f.csv", "prompt,completion\na,b\nc\n", r"sample 1 of \S*f\.csv \(line 3\) has 1 fields, and the header 2 \("),
    ("f.csv", b"prompt,completion\na,\xe9\n", r"f\.csv is not UTF-8: byte 0xe9"),
    ("f.csv", "prompt,completion\na,b\n".encode("utf-16"),
     r"f\.csv is UTF-16 text; .*`iconv -f UTF-16 -t utf-8 .*f\.csv > rows\.csv`"),
    ("f.csv", 'prompt,completion\na,"b\n', r"f\.csv is not a table in line 2: unexpected end of data"),
    ("f.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], r"f\.jsonl\.gz can't be read \(OSError: Truncated"),
    ("f.jsonl.gz", "{}", r"f\.jsonl\.gz can't be read \("),
    ("f.jsonl", lines(ROWS) + "\n{\"messages\": [\n",
     r"^sample 2 of \S*f\.jsonl \(line 4\) is broken JSON: .* in column \d+. Correct or remove"),
    ("f.json", "[{\"a\": 1},\n oops]",
     r"f\.json is broken JSON in line 2, column 2.*a list of objects, or one object per line"),
    ("f.jsonl", lines(ROWS).encode() + b"\xe9",
     r"f\.jsonl is not UTF-8: byte 0xe9 in line 3.*iconv -f latin1 -t utf-8"),
    ("f.jsonl", lines(ROWS) + "3\n", r"sample 2 of \S*f\.jsonl \(line 3\) is not an object but int"),
    ("f.jsonl", "\n" + lines([*ROWS, {"messages": None}]),
     r"^sample 2 of \S*f\.jsonl \(line 4\) has null in 'messages'"),
    ("f.json", json.dumps([*ROWS, {}]), r"^sample 2 of \S*f\.json lacks the field 'messages'"),
    ("f.jsonl", lines([{"words": "a"}]), r"f\.jsonl has the columns 'words'; accepted are .*in data\.columns"),
])  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_conversations(write(tmp_path / name, text))


TEXT = json.dumps({"messages": talk("é", "ä")}, ensure_ascii=False) + "\n"
SPREAD = json.dumps(json.loads(TEXT), indent=2, ensure_ascii=False)
AS_JSON = "expected JSON in UTF-8, one object per line"


@pytest.mark.parametrize("name, content, kind", [
    ("f.jsonl", TEXT.encode("utf-16"), "UTF-16 text"),
    ("f.jsonl", TEXT.encode("utf-16-le"), "UTF-16 text"),  # without a byte order mark
    ("f.jsonl", json.dumps(ROWS[0]).encode("utf-16-be"), "UTF-16 text"),  # ASCII characters alone are UTF-8 too
    ("f.json", json.dumps([json.loads(TEXT)]).encode("utf-16"), "UTF-16 text"),
    ("f.jsonl", TEXT.encode("utf-32"), "UTF-32 text"),
    ("f.jsonl", SPREAD.encode(), "one JSON object over 12 lines"),
    ("f.json", SPREAD.encode() + b"\n" + SPREAD.encode(), "one JSON object over 12 lines, followed by more"),
    ("f.json", json.dumps({"version": 1, "it's": [json.loads(TEXT)] * 2}, indent=1).encode(),
     "one JSON object over 29 lines, with 2 rows in \"it's\""),
    ("f.jsonl", b"{\n" + SPREAD[1:50].encode(), "one JSON object over many lines"),
    ("f.jsonl", gzip.compress(TEXT.encode(), mtime=0), "compressed by gzip"),
    ("f.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of Git LFS"),
    ("f.jsonl", b"\n <!DOCTYPE html>\n<html>", "a page of HTML or XML"),
    ("f.jsonl", b"PAR1\x15\x04", "a Parquet file"),
    ("f.jsonl", b"\0" * 100, "filled with zero bytes"),
])  # fmt: skip
def test_a_file_of_another_kind_is_recognised_and_the_remedy_works(tmp_path, name, content, kind):
    path = write(tmp_path / name, content)
    for read in (read_conversations, lambda source: list(stream_conversations(source))):
        with pytest.raises(DataError, match=rf"^\S*{re.escape(name)} is {re.escape(kind)}.*; {AS_JSON}\. ") as error:
            read(path)
    command = re.search("`(.*) > (?:rows.jsonl|FILE)`", str(error.value))
    is_whole = "many lines" not in kind
    if command and is_whole and shutil.which(command[1].split()[0]):
        made = subprocess.run(["sh", "-c", command[1]], capture_output=True, check=True).stdout
        assert {tuple(row) for row in contents(write(tmp_path / "rows.jsonl", made))} <= {("é", "ä"), ("a", "b")}


def test_a_list_under_the_name_of_lines_is_read(tmp_path):
    path = write(tmp_path / "f.jsonl", json.dumps(ROWS, indent=1))
    assert contents(path) == contents(write(tmp_path / "g.jsonl", lines(ROWS)))
    with pytest.raises(DataError, match=r"^sample 0 of \S*f\.jsonl \(line 1\) is not an object but list"):
        read_conversations(write(tmp_path / "f.jsonl", "[1]\n" + lines(ROWS)))


def test_values_that_python_cannot_hold(tmp_path):
    for text in ("[" * 200_000, "1" * 5000):
        path = write(tmp_path / "f.jsonl", lines(ROWS) + f'{{"messages": {text}}}\n')
        with pytest.raises(
            DataError, match=r"^sample 2 of \S*f\.jsonl \(line 3\) is broken JSON: (Recursion|Value)Error"
        ):
            read_conversations(path)


def test_a_forced_format(tmp_path):
    path = write(tmp_path / "f.jsonl", lines([{"messages": talk("a", "b"), "prompt": "c", "completion": "d"}]))
    with pytest.raises(DataError, match="several formats"):
        read_conversations(path)
    with pytest.raises(DataError, match=r"columns with content that the model wouldn't see: 'messages'"):
        read_conversations(path, "prompt_completion")
    assert contents(path, format="prompt_completion", ignore=["messages"]) == [["c", "d"]]
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

    monkeypatch.setattr(sources, "unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError,
        match=r"'org/name' can't be read from the hub, and there is no such file \(\w+: no network\)\. "
        r"Expected .*org/name\[/config\]\[@revision\]\[:split\].*local file",
    ):
        read_conversations("org/name")
    assert is_remote("org/name:train")


def test_without_a_network_the_hub_is_asked_once(tmp_path, monkeypatch):
    """The client reads its cache instead of repeating each request."""
    monkeypatch.setattr(sources, "unreachable", lambda: "the hub can't be reached: no network")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a request is repeated"))
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", lambda *_, **__: pytest.fail("the hub is asked"))
    with pytest.raises(DataError, match=r"no such file \(the hub can't be reached: no network\)\. Expected"):
        read_conversations("org/name")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_hub_data_sets(monkeypatch):
    monkeypatch.setattr(sources, "unreachable", lambda: None)
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
    with pytest.raises(DataError, match=r"the folder \S*empty is not a data set that can be read \(.*\)\. Name a file"):
        read_conversations(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["f.csv", "f.tsv", "f.csv.gz", "f.tsv.xz"])
def test_tables_are_read_as_texts(tmp_path, name):
    delimiter = "," if "csv" in name else "\t"
    opened = gzip.open if name.endswith(".gz") else lzma.open if name.endswith(".xz") else open
    with opened(tmp_path / name, "wt", encoding="utf-8-sig", newline="") as stream:
        rows = [["prompt", "completion"], ["007", "NA"], ['a "b"', "c\n\nd,e\tf"], ["null", "1e3"]]
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    read = read_conversations(str(tmp_path / name))
    assert [[m["content"] for m in c.messages] for c in read] == [
        ["007", "NA"],
        ['a "b"', "c\n\nd,e\tf"],
        ["null", "1e3"],
    ]
    assert [c.line for c in read] == [2, 5, 6]
    assert [c.messages for c in stream_conversations(str(tmp_path / name))] == [c.messages for c in read]


def test_lines_of_text_and_compressed_json(tmp_path):
    assert contents(write(tmp_path / "f.txt", "one line\r\n\n  two\n")) == [["one line"], ["  two"]]
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compress_zstd}
    for suffix, compress in packed.items():
        assert contents(write(tmp_path / f"f.jsonl{suffix}", compress(lines(ROWS).encode()))) == [*map(texts, ROWS)]
        whole = write(tmp_path / f"f.json{suffix}", compress(json.dumps(ROWS, indent=1).encode()))
        assert contents(whole) == [*map(texts, ROWS)]


def texts(row):
    return [message["content"] for message in row["messages"]]


def compress_zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


# -- columns --------------------------------------------------------------------------------------------------------


def test_names_of_columns(tmp_path):
    pairs = {"question": "a", "answer": "b"}, {"prompt": "a", "response": "b"}, {"input": "a", "target": "b"}
    files = [write(tmp_path / f"{number}.jsonl", lines([row])) for number, row in enumerate(pairs)]
    seen = []
    for path in files[:2]:
        assert contents(path, log=lambda *message: seen.append(message)) == [["a", "b"]]
        assert [c.messages for c in stream_conversations(path)] == [[USER, ANSWER]]
        assert read_conversations(path, prompts_only=True)[0].messages[0] == USER
    assert f"data: {files[0]} is read with data.columns={{prompt: question, completion: answer}}" in seen[0][0]
    with pytest.raises(DataError, match=r"e\.g\. data\.columns=\{prompt: input, completion: target\}"):
        read_conversations(files[2])
    assert contents(files[2], columns={"prompt": "input", "completion": "target"}) == [["a", "b"]]
    with pytest.raises(
        DataError, match=r"has the columns 'input', 'target', without 'inputs', which data\.columns names"
    ):
        read_conversations(files[2], columns={"prompt": "inputs", "completion": "target"})
    both = write(tmp_path / "both.jsonl", lines([{"prompt": "x", "question": "a", "answer": "b"}]))
    with pytest.raises(DataError, match=r"has a column 'prompt' itself.*add 'prompt' to data\.ignore_columns"):
        read_conversations(both, columns={"prompt": "question", "completion": "answer"})
    found = contents(both, columns={"prompt": "question", "completion": "answer"}, ignore=["prompt"])
    assert found == [["a", "b"]]
    # The same without a mapping, and where only a later row has both.
    later = write(tmp_path / "later.jsonl", lines([pairs[0], {"prompt": "x", "question": "a", "answer": "b"}]))
    for path, place in ((both, str(both)), (later, r"sample 1 of \S+ \(line 2\)")):
        with pytest.raises(DataError, match=rf"^{place} has the columns 'question' and 'prompt', both of which"):
            read_conversations(path)
        with pytest.raises(DataError, match=r"Leave out one of them, e\.g\. data\.ignore_columns=\[prompt\]"):
            list(stream_conversations(path))
        assert contents(path, ignore=["prompt"])[-1] == ["a", "b"]


def test_no_column_with_content_is_dropped_in_silence(tmp_path):
    rows = [
        {
            "messages": talk("What is the capital?", "b"),
            "id": 7,
            "score": 0.5,
            "tags": [],
            "note": None,
            "more": {"x": ""},
        },
        {"messages": talk("What is the capital?", "b"), "prompt": "What is the capital?", "answer": " b "},
        {"messages": talk("a", "b"), "text": "User: a\nAssistant: b"},
        {"messages": talk("What is the capital of Norway?", "b"), "topic": ["the capital of Norway"]},
        {"messages": talk("a", "b"), "chosen": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    path = write(tmp_path / "f.jsonl", lines(rows))
    assert len(read_conversations(path)) == 5  # numbers, nothing, and copies of turns
    rows += [
        {"messages": talk("a", "bc"), "answer": "c", "meta": {"source": ["web"]}},
        {"messages": talk("a", "b"), "weight": 2},
    ]
    for more in (
        "counted on the fingers, 2+2 is 4 of them",
        "4, or SECRET 2+2",
        "4 is 2+2",
    ):  # no rendered conversation
        about = write(tmp_path / "about.jsonl", lines([{"prompt": "2+2", "completion": "4", "explanation": more}]))
        with pytest.raises(DataError, match=r"the model wouldn't see: 'explanation'"):
            read_conversations(about)
    rendered = {"prompt": "2+2", "completion": "4", "text": "<s>[INST] 2+2 [/INST] 4 </s>\n"}
    assert len(read_conversations(write(tmp_path / "rendered.jsonl", lines([rendered])))) == 1
    path = write(tmp_path / "f.jsonl", lines(rows))
    expected = (
        r"content that the model wouldn't see: 'answer' \('c' \(str\) in sample 5 of \S+ \(line 6\)\), "
        r"'meta' \('web' .*\), 'weight' \(2 \(int\) in sample 6.*data\.ignore_columns=\[answer, meta, weight\] \(or"
    )
    with pytest.raises(DataError, match=expected):
        read_conversations(path)
    with pytest.raises(DataError, match=r"'answer' \('c' .*ignore_columns=\[answer, meta\]"):
        list(stream_conversations(path))
    assert len(read_conversations(path, ignore=["answer", "m*a", "weight"])) == 7
    path = write(tmp_path / "f.jsonl", lines([{"messages": [{**USER, "time": "now", "a": {"b": 1, "c": 2}}, ANSWER]}]))
    assert read_conversations(path)[0].messages[0] == {**USER, "time": "now", "a": {"b": 1, "c": 2}}  # the template's
    assert read_conversations(path, ignore=["messages.time", "messages.a.b"])[0].messages[0] == {**USER, "a": {"c": 2}}


# -- tools ----------------------------------------------------------------------------------------------------------

FUNCTION = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
TEXT_ARGUMENTS = '{"city": "Oslo", "options": {}}'


@pytest.mark.parametrize("turn", [
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]},
    {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": TEXT_ARGUMENTS}}]},
    {"role": "assistant", "content": None, "function_call": CALL["function"]},
    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo", "a": None,
                                                                                      "options": {"b": None}}}}]},
    {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL["function"])}]},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "tool_call", "value": json.dumps([CALL["function"]])},
])  # fmt: skip
def test_forms_of_tool_calls(turn):
    column, format = ("conversations", "sharegpt") if "from" in turn else ("messages", "messages")
    result = {"from": "observation", "value": "4 C"} if "from" in turn else {"role": "tool", "content": "4 C"}
    messages = convert_row({column: [USER, turn, result, ANSWER]}, format)
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages == [USER, expected, {"role": "tool", "content": "4 C"}, ANSWER]


def test_parts_of_reasoning_and_calls():
    parts = [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "See:"},
             *[{"type": "tool_call", "value": json.dumps(CALL["function"])}] * 2]  # fmt: skip
    row = {"messages": [{**USER, "loss_weight": 0.0}, {"role": "assistant", "content": parts, "loss_weight": 1.0}]}
    turn = {"role": "assistant", "content": "See:", "reasoning_content": "Hm.", "tool_calls": [CALL, CALL]}
    assert convert_row(row, "messages") == [{**USER, "weight": 0.0}, turn]
    thought = {"from": "function_call", "value": "<think>\nHm.</think>\n\n" + json.dumps(CALL["function"])}
    turn = {"role": "assistant", "content": "<think>\nHm.</think>", "tool_calls": [CALL]}
    assert convert_row({"conversations": [USER, thought]}, "sharegpt")[1] == turn


@pytest.mark.parametrize("more", [
    {"tools": [TOOL]}, {"tools": json.dumps([TOOL])}, {"tools": [json.dumps(TOOL)]}, {"tools": [FUNCTION]},
    {"functions": [FUNCTION]}, {"tools": [{"type": "function", "function": {**FUNCTION, "strict": None}}]},
    {"messages": [{"role": "system", "content": "s", "tools": [TOOL]}, USER, ANSWER]},
])  # fmt: skip
def test_forms_of_tools(tmp_path, more):
    row = {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], **more}
    (read,) = read_conversations(write(tmp_path / "f.jsonl", lines([row])))
    assert read.tools == [TOOL]
    assert read.messages == talk("a", "b", system="s")


def test_no_tools_and_wrong_ones(tmp_path):
    for tools in (None, "[]", [], "", {}, "{}", "null"):
        (read,) = read_conversations(write(tmp_path / "f.jsonl", lines([{"messages": [USER, ANSWER], "tools": tools}])))
        assert read.tools is None
    for tools, message in (
        ("[{", "has tools in 'tools' that is not JSON"),
        ([3], r"has 3 \(int\) in 'tools'; expected the def"),
    ):
        with pytest.raises(DataError, match=message):
            read_conversations(write(tmp_path / "f.jsonl", lines([{"messages": [USER, ANSWER], "tools": tools}])))


def test_nulls_of_arrow_are_removed_at_every_depth(tmp_path):
    calls = [{"name": "f", "arguments": {"city": "Bergen"}}, {"name": "g", "arguments": {"a": {"b": 1}}}]
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    read = read_conversations(str(tmp_path / "f.parquet"))
    assert [c.messages[1]["tool_calls"][0]["function"] for c in read] == calls
    written = '{"name": "f", "arguments": {"a": null}}'
    for turn in ({"from": "function_call", "value": written}, {"role": "assistant", "tool_calls": written}):
        call = convert_row({"conversations": [USER, turn]}, "sharegpt")[1]["tool_calls"][0]
        assert call["function"]["arguments"] == {"a": None}  # not Arrow's
    row = {"messages": [USER, ANSWER], "tools": [{"name": "f", "x": None}, '{"name": "g", "x": null}']}
    (read,) = read_conversations(write(tmp_path / "f.jsonl", lines([row])))
    assert [tool["function"] for tool in read.tools] == [{"name": "f"}, {"name": "g", "x": None}]


def test_what_else_is_not_dropped_in_silence(tmp_path):
    for turn, message in (
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "citations": ["x"]}]},
            r"'citations' in 'content' of",
        ),
        ({"role": "user", "content": [{"type": "text", "text": "a", "value": "b"}]}, r"in 'text', 'value'\. Keep one"),
        ({"from": "human", "value": "a", "role": "assistant"}, r"the speaker 'human' and the role 'assistant' in"),
    ):
        with pytest.raises(DataError, match=message):
            convert_row({"conversations": [turn, ANSWER]}, "sharegpt")
    cited = {"role": "user", "content": [{"type": "text", "text": "a", "citations": ["x"], "note": None}]}
    path = write(tmp_path / "f.jsonl", lines([{"messages": [cited, ANSWER]}]))
    assert read_conversations(path, ignore=["messages.content.citations"])[0].messages == [USER, ANSWER]
    path = write(tmp_path / "f.jsonl", '{"prompt": "a", "prompt": "c", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"\(line 1\) is broken JSON: the key 'prompt' is there twice in one object"):
        read_conversations(path)
    path = write(tmp_path / "f.jsonl", lines([{"messages": [USER, ANSWER], "chat_template_kwargs": {"think": False}}]))
    with pytest.raises(DataError, match=r"wouldn't see: 'chat_template_kwargs'"):
        read_conversations(path)


def test_tables_have_numbers_labels_and_wrong_rows(tmp_path):
    path = write(tmp_path / "f.csv", "prompt,completion,id,score\na,b,17,0.5\na\nc,d,18,1e-3\n")
    skipped = []
    read = read_conversations(path, skip=skipped.append)
    assert [texts({"messages": c.messages}) for c in read] == [["a", "b"], ["c", "d"]] and read[1].row == 2
    assert skipped == [f"sample 1 of {path} (line 3) {WRONG_FIELDS}"]
    assert [c.row for c in stream_conversations(path, skip=lambda _: None)] == [0, 2]
    path = write(tmp_path / "f.csv", "prompt,completion,label\na,b,True\nc,d,false\n")
    assert [c.desirable for c in read_conversations(path, samples="labels")] == [True, False]


WRONG_FIELDS = (
    "has 1 fields, and the header 4 (prompt, completion, id, score). Correct the row; a field with ',' or a line break "
    "is enclosed in double quotes."
)


def test_the_suggested_names_of_columns_work(tmp_path):
    row = {"instruction": "a", "context": "c", "response": "b", "category": "x"}
    path = write(tmp_path / "f.jsonl", lines([row]))
    with pytest.raises(DataError, match=r"e\.g\. data\.columns=\{input: context, output: response\}"):
        read_conversations(path)
    found = contents(path, columns={"input": "context", "output": "response"}, ignore=["category"])
    assert found == [["a\nc", "b"]]
