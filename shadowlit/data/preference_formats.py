"""The formats of preference data: two answers to one prompt, or one answer with a label.

==============================  =====================================================================================
pairs                           ``chosen`` and ``rejected``: texts, lists of messages, or one message, with the
                                ``prompt`` (a text or messages), ``conversations`` (ShareGPT) or ``instruction``,
                                ``input`` and ``history`` (Alpaca) that they answer; or two whole conversations with the
                                same beginning, with or without a column ``prompt``
labels                          ``label`` (or ``kto_tag``), with ``prompt`` and ``completion``, ``messages``,
                                ``conversations``, or ``instruction`` and ``output``: true for an answer that is
                                desirable, false for one that isn't
==============================  =====================================================================================

A sample has two conversations: with the chosen and with the rejected answer; or with a labelled answer and, to the same
prompt, with the answer of the next row, by which KTO measures how far the model has moved. Only the answers are
supervised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shadowlit.data.conversation import Conversation
from shadowlit.data.formats import FORMATS, Samples, with_system
from shadowlit.data.turns import (
    Message,
    from_sharegpt_turns,
    listed,
    read_turns,
    require_answer,
    shown,
    unsupervised,
)
from shadowlit.errors import DataError


@dataclass(frozen=True)
class PreferenceFormat:
    """The columns of one kind of preference data."""

    columns: tuple[tuple[str, ...], ...]  # groups, one of which a source must have
    expected: str  # the columns in words
    hint: str  # for a source that has these columns where others are needed

    def fits(self, columns: Iterable[str]) -> bool:
        """Return whether a source with these columns is in this format."""
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
    remedy = "Rename the columns, or set model.objective to SFT for conversations."
    remedy = next((other.hint for other in PREFERENCES.values() if other.fits(found)), remedy)
    raise DataError(
        f"{source} has the columns {listed(found)}, but model.objective needs {samples}: {needed.expected}. {remedy}"
    )


def convert_pair(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """Return the conversations with the chosen and with the rejected answer; the prompt is supervised in neither.

    Raises:
        DataError: The row is malformed, its answers are the same, or its prompts differ. The message doesn't say which
            row it is.
    """
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if _is_whole(chosen, rejected):
        prompt, chosen, rejected = _split(chosen, rejected)
    else:
        prompt = _prompt(row)
    if _texts(chosen) == _texts(rejected):
        raise DataError(
            "has the same answer in 'chosen' and in 'rejected', so neither is preferred. Correct or remove the row."
        )
    require_answer(chosen, "chosen")
    require_answer(rejected, "rejected")
    prompt = unsupervised(prompt)
    return prompt + chosen, prompt + rejected


def convert_labelled(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], bool]:
    """Return the prompt, the answer and the label of a row.

    Raises:
        DataError: The row is malformed or its label isn't a boolean. The message doesn't say which row it is.
    """
    column = next((name for name in _LABELS if row.get(name) is not None), _LABELS[0])
    label = row.get(column)
    if isinstance(label, str):  # of a table
        label = {"true": True, "false": False}.get(label.strip().lower(), label)
    if all(row.get(name) is not None for name in _LABELS) and row["label"] != row["kto_tag"]:
        raise DataError("has different values in 'label' and 'kto_tag'. Remove one of them.")
    if not isinstance(label, bool):
        raise DataError(
            f"has {shown(label)} in '{column}'; expected true for an answer that is desirable, or false. Correct or "
            "remove the row."
        )
    format = _format_of(row, "required") or "messages"
    if format == "prompt_completion":
        prompt = with_system(row, read_turns(row, "prompt", "user"))
        return unsupervised(prompt), require_answer(read_turns(row, "completion", "assistant"), "completion"), label
    turns = FORMATS[format].convert(row, False)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise DataError(
            f"has no assistant turn at the end of '{FORMATS[format].required[0]}' that answers something. Add the "
            "answer."
        )
    return unsupervised(turns[:-1]), turns[-1:], label


def read_columns(row: Mapping[str, Any], samples: Samples) -> set[str]:
    """Return the columns of a row that are read."""
    if samples == "labels":
        format = _format_of(row, "required")
        return {*_LABELS, *(FORMATS[format].columns if format else ())}
    if _is_whole(_answer(row, "chosen"), _answer(row, "rejected")):
        return {"chosen", "rejected", *(FORMATS["messages"].columns - {"messages", "system"})}
    format = _format_of(row, "prompt")
    return {"chosen", "rejected", *(FORMATS[format].columns - set(_ANSWERS) if format else ())}


def add_next_answers(samples: list[Conversation]) -> list[Conversation]:
    """Add the answer of the next sample to ``other`` of each labelled sample, which holds its prompt alone.

    Raises:
        DataError: There is only one sample.
    """
    if len(samples) < 2:
        raise DataError(f"{samples[0].source} has one row; labels need at least two, one to compare with the other.")
    prompts = [sample.other or [] for sample in samples]
    answers = [sample.messages[len(prompt) :] for sample, prompt in zip(samples, prompts, strict=True)]
    following = [*answers[1:], *answers[:1]]
    return [
        replace(sample, other=[*prompt, *answer])
        for sample, prompt, answer in zip(samples, prompts, following, strict=True)
    ]


_LABELS = ("label", "kto_tag")
_FORMATS = ("prompt_completion", "messages", "sharegpt", "alpaca")
_ANSWERS = ("completion", "output")

PREFERENCES: dict[str, PreferenceFormat] = {
    "pairs": PreferenceFormat(
        (("chosen", "rejected"),),
        "'chosen' and 'rejected', with 'prompt' or 'conversations', or as whole conversations",
        "These are pairs: set model.objective to one of pairs, e.g. DPO.",
    ),
    "labels": PreferenceFormat(
        tuple((*FORMATS[name].required, label) for name in _FORMATS for label in _LABELS),
        "'label' or 'kto_tag', with 'prompt' and 'completion', 'messages', 'conversations', or 'instruction' and "
        "'output'",
        "These are labelled answers: set model.objective to KTO.",
    ),
}


def _is_whole(chosen: Sequence[Message], rejected: Sequence[Message]) -> bool:
    """Whether these are whole conversations, which include the prompt, rather than answers."""
    return not chosen[0]["role"] == "assistant" == rejected[0]["role"]


def _answer(row: Mapping[str, Any], name: str) -> list[Message]:
    """The messages of an answer: a text, a list, or one message; with role and content, or from and value."""
    value = row.get(name)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and any(isinstance(turn, Mapping) and turn.get("from") is not None for turn in value):
        return from_sharegpt_turns(value, name)
    return read_turns({name: value} if name in row else {}, name, "assistant")


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    """The prompt in columns of its own."""
    format = _format_of(row, "prompt")
    if format is None:
        raise DataError(
            "has answers in 'chosen' and 'rejected', but no prompt. Add the column 'prompt', or give whole "
            "conversations."
        )
    return FORMATS[format].convert({name: value for name, value in row.items() if name not in _ANSWERS}, True)


def _format_of(row: Mapping[str, Any], needed: str) -> str | None:
    """The first format whose columns a row has: those that are ``required``, or those of a ``prompt``."""
    names = (name for name in _FORMATS if all(row.get(one) is not None for one in getattr(FORMATS[name], needed)))
    return next((name for name in names if needed == "required" or name != "messages"), None)


def _split(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations into their common beginning and the rest of each."""
    equal = [left == right for left, right in zip(_texts(chosen), _texts(rejected), strict=False)]
    same = [*equal, False].index(False)
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


def _texts(turns: list[Message]) -> list[Message]:
    return [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
