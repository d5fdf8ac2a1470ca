"""Conversations with a context that only a teacher sees, for context distillation: rows, and the samples of each.

The column ``teacher_context`` of a row is put before its conversation. A sample has two token sequences: the student's,
without the context, and the teacher's, with it. Their supervised tokens are the same, in the same order, so that number
n of a batch of the one is number n of the other's, however the samples are padded or packed::

    student                       <user> 1+1? <assistant> ⟦2 <end>⟧
    teacher  <system> Be terse.   <user> 1+1? <assistant> ⟦2 <end>⟧
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.template import Encoded
from shadowlit.data.turns import Message, read_turns, unsupervised
from shadowlit.errors import DataError

COLUMN = "teacher_context"
_SYSTEM = ("system", "developer")


def context_of(row: Mapping[str, Any]) -> list[Message]:
    """Return the turns of a row's context: a text is a system turn, a list of messages is taken as it is.

    Raises:
        DataError: The row has none, or it is malformed. The message doesn't say which row it is.
    """
    if not row.get(COLUMN):
        raise DataError(
            f"has nothing in '{COLUMN}', which model.objective shows to the teacher alone. Add a text or a list of "
            "messages, name its column in data.columns, or remove the row."
        )
    turns = unsupervised(read_turns(row, COLUMN, "system"))
    if not all(isinstance(turn["content"], str) for turn in turns):
        raise DataError(f"has images in '{COLUMN}', which is read as text alone. Remove them.")
    return turns


def with_context(messages: Sequence[Message], context: Sequence[Message]) -> list[Message]:
    """Return the conversation that the teacher sees.

    A system text of the conversation stays at the beginning: in one turn with the context's, after an empty line, or
    before other turns of the context.
    """
    first, *rest = messages
    if first["role"] not in _SYSTEM:
        return [*context, *messages]
    if context[0]["role"] not in _SYSTEM:
        return [first, *context, *rest]
    return [{**first, "content": f"{context[0]['content']}\n\n{first['content']}"}, *context[1:], *rest]


def both_views(student: Sequence[Encoded], teacher: Sequence[Encoded], longest: int | None) -> list[list[Encoded]]:
    """Return the student's and the teacher's sequence of each sample of a row.

    Args:
        student: Samples without the context.
        teacher: Samples with it.
        longest: Maximum length of a sequence that would be truncated, in tokens; None where none is.

    Raises:
        DataError: The supervised tokens differ, or a sequence would lose some of them.
    """
    ours, theirs = ([_supervised(one) for one in samples] for samples in (student, teacher))
    if ours != theirs:
        counts = " and ".join(str(sum(map(len, each))) for each in (ours, theirs))
        raise DataError(
            f"has other supervised tokens with '{COLUMN}' than without it ({counts} of them), so the teacher's "
            "predictions don't belong to the student's. Write the context as a system text, or set data.chat_template "
            "to a template that renders answers the same after any context."
        )
    length = max((len(one.input_ids) for one in teacher), default=0)
    if longest is not None and length > longest:
        raise DataError(
            f"has {length} tokens with its '{COLUMN}', and truncation would take answers from the teacher that the "
            f"student has. Raise data.max_length={longest}, or set data.overlong=drop."
        )
    return [list(views) for views in zip(student, teacher, strict=True)]


def _supervised(sample: Encoded) -> list[int]:
    return [label for label in sample.labels if label != IGNORE_INDEX]
