"""Greedy answers of models, by transformers' own generation: to a task, to requests for a form, to instructions.

A task's answers are right or wrong by its own rule; a form is met or not; general answers are kept to be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowlit.evaluation.matching import Matcher

Answered = list[list[Any]]
"""Of each row: the answer, whether it is right (None where nothing says so), and whether it ended by itself."""

FORMS = (
    ("Is the sun a star? Answer with yes or no only.", r"(?i)(yes|no)\.?"),
    ("What is the capital of France? Answer in capital letters only.", r"[^a-z]+"),
    ("Name three fruits, each on a line of its own that begins with a dash.", r"- .+\n- .+\n- .+"),
    ("Name three colors as a numbered list.", r"1\. .+\n2\. .+\n3\. .+"),
    (
        'Where is the Eiffel Tower? Answer with a JSON object that has the key "city".',
        r'\{\s*"city"\s*:\s*"[^"]*"\s*\}',
    ),
    ("Write one sentence about rain that ends with a question mark.", r"[^\n]*\?"),
    ("Name a season. Answer with one word.", r"\w+\.?"),
    ("How many days are in a week? Answer with digits only.", r"\d+\.?"),
    ("Translate 'thank you' into French. Put the answer in double quotes.", r'"[^"]+"\.?'),
    ("Write a title for a story about the sea. Put it in square brackets.", r"\[[^\]]+\]\.?"),
    ("What is a river? Begin your answer with the word Certainly.", r"(?s)Certainly\b.*"),
    ("Name two animals, separated by a semicolon, and nothing else.", r"[^;\n]+;[^;\n]+"),
    ("Repeat this sentence exactly: The blue door is open.", r"The blue door is open\."),
    ("Who wrote Hamlet? Answer in lower case only.", r"[^A-Z]+"),
    ("Write a sentence about bread that has at most five words.", r"(\S+\s+){0,4}\S+"),
    ("What is water? End your answer with the word Done.", r"(?s).*\bDone\.?"),
)
"""Requests for a form, and the pattern that the whole answer has to match."""
_SAME_NUMBER = Matcher("numeric")
LONGEST = {"tools": 96, "gsm8k": 160, "gsm8k_opened": 160, "forms": 48, "general": 64}
"""New tokens after which an answer is cut."""


def answer_all(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: str, rows: Sequence[Any], general: Sequence[Any]
) -> dict[str, Answered]:
    """Answers to a task's rows, to :data:`FORMS`, and to general rows.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer, with the chat template.
        task: Name of the task.
        rows: Conversations of the task, each with the reference as its last turn.
        general: Conversations whose answers are only kept.
    """
    forms = [{"messages": [{"role": "user", "content": prompt}, {}]} for prompt, _ in FORMS]
    found: dict[str, Answered] = {}
    for name, some in (("task", rows), ("forms", forms), ("general", general)):
        prompts = [row["messages"][:-1] for row in some]
        given = generate(model, tokenizer, prompts, LONGEST[task if name == "task" else name])
        judge = _judge(name, task, some)
        found[name] = [[text, judge(place, text), ended] for place, (text, ended) in enumerate(given)]
    return found


def _judge(name: str, task: str, rows: Sequence[Any]) -> Callable[[int, str], bool | None]:
    if name == "general":
        return lambda place, text: None
    if name == "forms":
        return lambda place, text: re.fullmatch(FORMS[place][1], text) is not None
    right = right_call if task == "tools" else right_number
    return lambda place, text: right(text, rows[place]["messages"][-1]["content"])


@torch.no_grad()
def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], longest: int
) -> list[tuple[str, bool]]:
    """The greedy answer to each prompt, without white space around it, and whether it ended by itself."""
    tokenizer.padding_side = "left"
    texts = [tokenizer.apply_chat_template(list(p), add_generation_prompt=True, tokenize=False) for p in prompts]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    stops = model.generation_config.eos_token_id
    ends = set(stops if isinstance(stops, list) else [stops])
    return [
        (text.strip(), bool(ends & set(row.tolist())))
        for text, row in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), ids, strict=True)
    ]


def right_call(answer: str, reference: str) -> bool:
    """Whether an answer is the same JSON as the reference; the order of keys and white space do not count."""
    try:
        return bool(json.loads(answer) == json.loads(reference))
    except json.JSONDecodeError:
        return False


def right_number(answer: str, reference: str) -> bool:
    """Whether the last number of an answer is that of the reference."""
    return _SAME_NUMBER.is_match(answer, [reference])
