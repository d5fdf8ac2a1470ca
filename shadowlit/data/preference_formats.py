"""The formats of preference data: two answers to one prompt, or one answer with a label.

==============================  =====================================================================================
pairs                           ``chosen`` and ``rejected``: texts, lists of messages, or one message, with the
                                ``prompt`` (a text or messages) or ``conversations`` (ShareGPT) that they answer; or
                                two whole conversations with the same beginning, with or without a column ``prompt``
labels                          ``prompt``, ``completion`` and ``label``, or ``messages`` and ``label``: true for an
                                answer that is desirable, false for one that isn't
==============================  =====================================================================================

A sample has two conversations: with the chosen and with the rejected answer; or with a labelled answer and, to the same
prompt, with the answer of the next row, by which KTO measures how far the model has moved. Only the answers are
supervised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shadowlit.data.conversation import Conversation, raise_all
from shadowlit.data.formats import Message, Samples, from_messages, from_sharegpt, said
from shadowlit.errors import DataError


@dataclass(frozen=True)
class PreferenceFormat:
    """A format of preferences.

    Attributes:
        convert: Function of a row that returns the fields of its :class:`Conversation`.
        columns: Groups of columns, one of which a source must have.
        expected: The columns in words.
        hint: Sentence for a source that has these columns where others are needed.
    """

    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    columns: tuple[tuple[str, ...], ...]
    expected: str
    hint: str

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether a source with these columns is in this format."""
        return any(set(columns).issuperset(names) for names in self.columns)


def require_columns(columns: Iterable[str], samples: Samples, source: str) -> None:
    """Check that a source has the columns of pairs or labels.

    Raises:
        DataError: The source holds something else.
    """
    found = set(columns)
    needed = PREFERENCES[samples]
    if needed.fits(found):
        return
    listed = ", ".join(f"'{name}'" for name in sorted(found)) or "(none)"
    remedy = "Rename the columns, or set model.objective to SFT for conversations."
    remedy = next((other.hint for other in PREFERENCES.values() if other.fits(found)), remedy)
    raise DataError(
        f"{source} has the columns {listed}, but model.objective needs {samples}: {needed.expected}. {remedy}"
    )


def convert_pair(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """Return the conversations with the chosen and with the rejected answer; the prompt is supervised in neither.

    Raises:
        DataError: The row is malformed, its answers are the same, or its prompts differ. The message doesn't say which
            row it is.
    """
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if chosen[0]["role"] == "assistant" == rejected[0]["role"] and (prompt := _prompt(row)):
        pass
    else:  # whole conversations, which hold the prompt
        prompt, chosen, rejected = _apart(chosen, rejected)
    if _texts(chosen) == _texts(rejected):
        raise DataError(
            "has the same answer in 'chosen' and in 'rejected', so neither is preferred. Correct or remove the row."
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn["role"] == "assistant" for turn in answer):
            raise DataError(f"has no assistant turn in '{name}'. Give the answer the role assistant.")
    prompt = _context(prompt)
    return prompt + chosen, prompt + rejected


def convert_labelled(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], bool]:
    """Return the prompt, the answer and the label of a row.

    Raises:
        DataError: The row is malformed or its label isn't a boolean.
    """
    label = row.get("label")
    if not isinstance(label, bool):
        raise DataError(
            f"has {label!r} ({type(label).__name__}) in 'label'; expected true for an answer that is desirable, or "
            "false. Correct or remove the row."
        )
    if row.get("completion") is not None:
        prompt, answer = said(row, "prompt", "user"), said(row, "completion", "assistant")
    else:
        turns = from_messages(row)
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise DataError("has no assistant turn at the end of 'messages' that answers something. Add the answer.")
        prompt, answer = turns[:-1], turns[-1:]
    if not any(turn["role"] == "assistant" for turn in answer):
        raise DataError("has a 'completion' without an assistant turn. Give the answer the role assistant.")
    return _context(prompt), answer, label


def read_preferences(
    rows: Sequence[tuple[Any, Conversation]], samples: Samples, columns_of: Callable[[Any], Mapping[str, Any]]
) -> list[Conversation]:
    """Return the samples of a source's rows.

    Args:
        rows: Each row as it was read, and its origin.
        samples: pairs or labels.
        columns_of: Function that returns the columns of a row.

    Raises:
        DataError: Rows are malformed, of which up to five are listed, or a source of labels has one row.
    """
    found: list[Conversation] = []
    errors: list[str] = []
    for row, origin in rows:
        try:
            found.append(replace(origin, **PREFERENCES[samples].convert(columns_of(row))))
        except DataError as error:
            errors.append(f"{origin} {error}")
    raise_all(errors)
    if samples == "pairs":
        return found
    if len(found) < 2:
        raise DataError(f"{found[0].source} has one row; labels need at least two, one to compare with the other.")
    return _with_next_answers(found)


def _pair_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = convert_pair(row)
    return {"messages": chosen, "other": rejected}


def _label_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a labelled answer; ``other`` is the prompt alone until the next row's answer is added."""
    prompt, answer, label = convert_labelled(row)
    return {"messages": prompt + answer, "other": prompt, "desirable": label}


def _with_next_answers(samples: list[Conversation]) -> list[Conversation]:
    prompts = [sample.other or [] for sample in samples]
    answers = [sample.messages[len(prompt) :] for sample, prompt in zip(samples, prompts, strict=True)]
    following = [*answers[1:], *answers[:1]]
    return [
        replace(sample, other=[*prompt, *answer])
        for sample, prompt, answer in zip(samples, prompts, following, strict=True)
    ]


PREFERENCES: dict[str, PreferenceFormat] = {
    "pairs": PreferenceFormat(
        _pair_fields,
        (("chosen", "rejected"),),
        "'chosen' and 'rejected', beside 'prompt' or 'conversations' or as whole conversations",
        "These are pairs: set model.objective to one of pairs, e.g. DPO.",
    ),
    "labels": PreferenceFormat(
        _label_fields,
        (("prompt", "completion", "label"), ("messages", "label")),
        "'prompt', 'completion' and 'label', or 'messages' and 'label'",
        "These are labelled answers: set model.objective to KTO.",
    ),
}


def _answer(row: Mapping[str, Any], name: str) -> list[Message]:
    """The messages of an answer: a text, a list, or one message; with role and content, or from and value."""
    value = row.get(name)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and any(isinstance(turn, Mapping) and turn.get("from") is not None for turn in value):
        try:
            return from_sharegpt({"conversations": value})
        except DataError as error:
            raise DataError(str(error).replace("conversations", name)) from None
    return said({name: value} if name in row else {}, name, "assistant")


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    """The prompt that a column of its own holds."""
    if row.get("prompt") is not None:
        prompt = said(row, "prompt", "user")
        if isinstance(row.get("system"), str) and row["system"] and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": row["system"]}, *prompt]
    elif row.get("conversations") is not None:
        prompt = from_sharegpt(row, True)
    else:
        raise DataError(
            "has answers in 'chosen' and 'rejected', but no prompt. Add the column 'prompt', or give whole "
            "conversations."
        )
    return prompt


def _apart(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations into their common beginning and the rest of each."""
    same = 0
    for left, right in zip(_texts(chosen), _texts(rejected), strict=False):
        if left != right:
            break
        same += 1
    if same == len(chosen) == len(rejected):  # convert_pair compares the answers, and reports it
        same -= 1
    if not same:
        raise DataError(
            "has 'chosen' and 'rejected' with different first turns; expected two answers to the same prompt. Give "
            "conversations with the same beginning, or the answers alone and a column 'prompt'."
        )
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) == same:
            raise DataError(f"has nothing in '{name}' that the other doesn't begin with. Correct or remove the row.")
        if turns[same]["role"] != "assistant":
            raise DataError(
                f"has different prompts: turn {same} of '{name}', where 'chosen' and 'rejected' part, is the "
                f"{turns[same]['role']}'s; expected an answer. Correct or remove the row."
            )
    return chosen[:same], chosen[same:], rejected[same:]


def _context(prompt: list[Message]) -> list[Message]:
    return [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in prompt]


def _texts(turns: list[Message]) -> list[Message]:
    return [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
