"""A conversation as every data module sees it, and how problems with rows are collected and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shadowlit.data.formats import Message
from shadowlit.errors import DataError
from shadowlit.masking import mask_text

IGNORE_INDEX = -100
"""The label of an unsupervised token, as in transformers and ``torch.nn.functional.cross_entropy``."""

MAX_SHOWN = 5
"""How many problems of one kind a message lists; it counts the rest."""


class FatalDataError(DataError):
    """An error that would recur in every row and take its time in each, so that it is raised at once."""


class DataErrors(DataError):
    """Several errors in one.

    Attributes:
        messages: The message of each.
    """

    def __init__(self, text: str, messages: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.messages = [mask_text(message) for message in messages] or [str(self)]


@dataclass(frozen=True)
class Conversation:
    """The messages of one row, and where they came from.

    Attributes:
        messages: ``{"role", "content", …}`` in order. ``weight`` is the factor of a turn's loss, at least 0, and 1
            where it is missing; every other key is for the chat template.
        source: The file or hub data set, as the user named it.
        row: 0-based index in the source.
        line: 1-based line of a JSONL file, else None.
        tools: Definitions of the tools that the assistant may call, as the chat template takes them.
        other: The conversation with the second answer of a preference sample, else None.
        desirable: The label of a labelled answer, else None.
        source_index: Number of the source among those of its set, which may have the same name twice.
        context: Turns before ``messages`` that a teacher alone sees, else None.
    """

    messages: list[Message]
    source: str
    row: int
    line: int | None = None
    tools: list[Any] | None = None
    other: list[Message] | None = None
    desirable: bool | None = None
    source_index: int = 0
    context: list[Message] | None = None

    def __str__(self) -> str:
        """``sample 17 of train.jsonl (line 18)``."""
        return place(self.source, self.row, self.line)


def answer_text(messages: Sequence[Message]) -> str | None:
    """Return the text of the final answer; None if the last turn is not the assistant's, or has no text."""
    last = messages[-1] if messages else {}
    content = last.get("content") if last.get("role") == "assistant" else None
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content


Skip = Callable[[str], None]
"""Receives the message of a row that is left out."""


def each(function: Callable[[Any], Any], items: Iterable[Any], skip: Skip | None = None) -> Iterator[Any]:
    """Yield ``function(item)`` of the items, which are rows or conversations.

    Errors begin with ``str(item)``, which says where the item came from.

    Args:
        function: Function of an item.
        items: Rows or conversations.
        skip: Function that receives the message of an item that fails, which is then left out; None raises it.

    Raises:
        DataError: An item fails, and ``skip`` is None or the error is fatal.
    """
    for item in items:
        try:
            with located(item):
                result = function(item)
        except DataError as error:
            if skip is None or isinstance(error, FatalDataError):
                raise
            skip(str(error))
            continue
        yield result


def collect(function: Callable[[Any], Any], items: Iterable[Any], skip: Skip | None = None) -> list[Any]:
    """Return the results of :func:`each`, with the DataErrors of all items in one.

    Raises:
        DataError: The only error, or up to five of several and their number; not with ``skip``.
    """
    errors: list[str] = []
    results = list(each(function, items, skip or errors.append))
    raise_all(errors)
    return results


def raise_all(errors: list[str]) -> None:
    """Raise what was collected, if anything.

    Raises:
        DataError: ``errors`` isn't empty; up to five are listed.
    """
    if not errors:
        return
    errors = list(dict.fromkeys(errors))  # a tokenizer without a template would be reported once per set
    if len(errors) == 1:
        raise DataError(errors[0])
    raise DataErrors(f"{len(errors)} problems with the data:{some_of(errors)}", errors)


def some_of(messages: Sequence[str]) -> str:
    """Return up to five of the messages as a numbered list, one in each line, and how many there are beyond these."""
    shown = "".join(f"\n  {i}. {message}" for i, message in enumerate(messages[:MAX_SHOWN], 1))
    return shown + (f"\n  … and {len(messages) - MAX_SHOWN} more" if len(messages) > MAX_SHOWN else "")


@contextmanager
def gathered(errors: list[str]) -> Iterator[None]:
    """Collect the messages of DataErrors that are raised in the block, for :func:`raise_all`, unless one is fatal."""
    try:
        yield
    except FatalDataError:
        raise
    except DataError as error:
        errors += error.messages if isinstance(error, DataErrors) else [str(error)]


@contextmanager
def located(origin: object) -> Iterator[None]:
    """Begin the messages of DataErrors that are raised in the block with the row or setting that they concern."""
    try:
        yield
    except DataErrors as error:  # each message needs it where they become part of a longer list
        raise DataErrors(f"{origin} {error}", [f"{origin} {message}" for message in error.messages]) from None
    except DataError as error:
        raise type(error)(f"{origin} {error}") from None


def place(source: str, row: int, line: int | None) -> str:
    """``sample 17 of train.jsonl (line 18)``."""
    return f"sample {row} of {source}" + (f" (line {line})" if line is not None else "")
