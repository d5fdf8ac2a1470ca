"""A conversation as every data module sees it, and how problems with rows are collected and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shadowlit.data.formats import Message
from shadowlit.errors import DataError

IGNORE_INDEX = -100
"""The label of an unsupervised token, as in transformers and ``torch.nn.functional.cross_entropy``."""

MAX_SHOWN = 5
"""How many problems of one kind a message lists; it counts the rest."""


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
    """

    messages: list[Message]
    source: str
    row: int
    line: int | None = None
    tools: list[Any] | None = None
    other: list[Message] | None = None
    desirable: bool | None = None

    def __str__(self) -> str:
        """``sample 17 of train.jsonl (line 18)``."""
        return place(self.source, self.row, self.line)


def collect(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """``[function(item) for item in items]``, with the DataErrors of all items in one.

    The items are rows or conversations: each error begins with ``str(item)``, which says where the item came from.

    Raises:
        DataError: The only error, or up to five of several and their number.
    """
    results: list[Any] = []
    errors: list[str] = []
    for item in items:
        with gathered(errors), located(item):
            results.append(function(item))
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
    shown = "".join(f"\n  {i}. {error}" for i, error in enumerate(errors[:MAX_SHOWN], 1))
    more = f"\n  … and {len(errors) - MAX_SHOWN} more" if len(errors) > MAX_SHOWN else ""
    raise DataError(f"{len(errors)} problems with the data:{shown}{more}")


@contextmanager
def gathered(errors: list[str]) -> Iterator[None]:
    """Collect the messages of DataErrors that are raised in the block, for :func:`raise_all`."""
    try:
        yield
    except DataError as error:
        errors.append(str(error))


@contextmanager
def located(origin: object) -> Iterator[None]:
    """Begin the messages of DataErrors that are raised in the block with the row that they concern."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{origin} {error}") from None


def place(source: str, row: int, line: int | None) -> str:
    """``sample 17 of train.jsonl (line 18)``."""
    return f"sample {row} of {source}" + (f" (line {line})" if line is not None else "")
