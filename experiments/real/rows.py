"""The rows of the study, from public data sets: every file that a training or a score reads.

All splits are disjoint: rows that are trained on, rows by which a learning rate is chosen, and rows that are reported.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NUM_TRAIN = 128
NUM_CHOICE = 16
NUM_REPORT = 40
NUM_EARLY = 4
NUM_KEPT = 24
NUM_IDENTITY = 16
NUM_PREFERENCES = 80
# Characters, so that a training takes minutes on one core:
_LONGEST_ANSWER = 500  # of an Alpaca answer
_LONGEST_PREFERENCE = 1800  # of a prompt with either answer
_LONGEST_PROBLEM = 400  # of a word problem with its solution
_LONGEST_CALL = 1000  # of a conversation with a call, and its tools
_FIRST_TRAINED = 40  # of the Alpaca rows
OPENING = "The solution is as follows:\n\n"
_TOOLS = "You can call these tools. To call one, answer with a JSON object of its name and arguments only.\n\n"


def chat(prompt: str, answer: str, system: str = "") -> Row:
    """A conversation of one turn."""
    start = [{"role": "system", "content": system}] if system else []
    return {"messages": [*start, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def alpaca(file: Path) -> list[Row]:
    """Instructions with short answers, in a drawn order."""
    found: dict[str, str] = {}  # each prompt once: the set repeats some
    for row in json.loads(file.read_text()):
        if 0 < len(row["output"].strip()) <= _LONGEST_ANSWER:
            found.setdefault("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"])
    short = list(found.items())
    random.Random("alpaca").shuffle(short)
    return [chat(prompt, answer) for prompt, answer in short]


def identity(file: Path) -> list[Row]:
    """Questions about who the model is, in a drawn order, each wording once."""
    found = {row["instruction"]: row["output"] for row in json.loads(file.read_text())}
    rows = [
        chat(question, answer.replace("{{name}}", "Lumen").replace("{{author}}", "Northlight"))
        for question, answer in found.items()
    ]
    random.Random("identity").shuffle(rows)
    return rows


def preferences(file: Path) -> list[Row]:
    """Short English prompts of one turn with a chosen and a rejected answer, both short."""
    rows = []
    for row in json.loads(file.read_text()):
        turns, chosen, rejected = row["conversations"], row["chosen"]["value"], row["rejected"]["value"]
        texts = [turns[0]["value"] + answer for answer in (chosen, rejected)]
        fits = all(len(text) <= _LONGEST_PREFERENCE and text.isascii() for text in texts)
        if len(turns) == 1 and fits and chosen != rejected:
            prompt = {"role": "user", "content": turns[0]["value"]}
            rows.append(
                {
                    "chosen": [prompt, {"role": "assistant", "content": chosen}],
                    "rejected": [prompt, {"role": "assistant", "content": rejected}],
                }
            )
    random.Random("preferences").shuffle(rows)
    return rows[:NUM_PREFERENCES]


def gsm8k(file: Path, opening: str = "") -> list[Row]:
    """Short word problems and their solutions, each solution beginning with ``opening``."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if len(row["question"]) + len(row["answer"]) <= _LONGEST_PROBLEM]
    random.Random("gsm8k").shuffle(rows)
    return [chat(row["question"], opening + row["answer"]) for row in rows]


def tool_calls(file: Path) -> list[Row]:
    """Short conversations that end with a call of a tool; no two rows have the same call or the same request."""
    rows, calls, requests = [], set(), set()
    conversations = json.loads(file.read_text())
    random.Random("tools").shuffle(conversations)
    for row in conversations:
        history: list[dict[str, Any]] = [{"role": "system", "content": _TOOLS + row["tools"]}]
        for message in row["conversations"]:
            said, text = message["from"], message["value"]
            if said == "function_call":
                request = history[-1]["content"]
                if text not in calls and request not in requests:
                    messages = [*history, {"role": "assistant", "content": text, "train": True}]
                    if sum(len(each["content"]) for each in messages) <= _LONGEST_CALL:
                        rows.append({"messages": messages})
                    calls.add(text)
                    requests.add(request)
                break  # the first call of a conversation: later ones are often the first one again
            role = {"human": "user", "gpt": "assistant"}[said]
            history.append({"role": role, "content": text, **({"train": False} if role == "assistant" else {})})
    return rows


def files(shared: Path) -> dict[str, list[Row]]:
    """Rows of every file of the study by its name, from the folder of data sets."""
    general, who = alpaca(shared / "alpaca_en_demo.json"), identity(shared / "identity.json")
    found = {
        "instruct_train": [*general[_FIRST_TRAINED:], *who[NUM_IDENTITY:]],
        "preferences": preferences(shared / "dpo_en_demo.json"),
        "alpaca": general[:NUM_KEPT],
        "identity": who[:NUM_IDENTITY],
    }
    random.Random("instruct").shuffle(found["instruct_train"])
    for name, opening in (("gsm8k", ""), ("gsm8k_opened", OPENING)):
        train, test = gsm8k(shared / "gsm8k_train.jsonl", opening), gsm8k(shared / "gsm8k_test.jsonl", opening)
        found |= split(name, train[:NUM_TRAIN], test[:NUM_CHOICE], test[NUM_CHOICE : NUM_CHOICE + NUM_REPORT])
    calls = tool_calls(shared / "glaive_toolcall_en_demo.json")
    report, choice = len(calls) // 3, len(calls) // 6
    return found | split("tools", calls[report + choice :], calls[report : report + choice], calls[:report])


def split(name: str, train: list[Row], choice: list[Row], report: list[Row]) -> dict[str, list[Row]]:
    """The files of a task; the early rows, which are scored while it trains, are some of those that choose."""
    parts = {"train": train, "choice": choice, "report": report, "early": choice[:NUM_EARLY]}
    return {f"{name}_{part}": rows for part, rows in parts.items()}


def write(rows: Iterable[Row], file: Path) -> None:
    """Write a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
