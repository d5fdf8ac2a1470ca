"""Formats from outside the package: ``data.format`` may name a function that turns a row into a conversation.

The function is named by its import path (``package.module.function``) or by an entry point in the group
``shadowlit.formats``. It is called with each row, a dict of its columns, and returns:

=================  ===================================================================================================
``data.samples``   result
=================  ===================================================================================================
conversations      the messages, ``[{"role": "user", "content": "…"}, …]``, or a text, which is a document to train on
contexts           ``(messages, teacher_context)``: a conversation, and a text or messages that its teacher sees first
pairs              ``(chosen, rejected)``: two conversations, each a list of messages, that begin with the same prompt
labels             ``(messages, label)``: a conversation that ends with the answer, and whether that is desirable
=================  ===================================================================================================

Messages have the form of the built-in format ``messages`` and are checked in the same way. Prompts (``data.predict``)
may lack the answer. ``auto`` detects built-in formats only. ``docs/how-to/data-format.md`` has an example.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowlit.data.conversation import located
from shadowlit.data.formats import FORMATS, Samples, convert_row
from shadowlit.data.turns import Message, shown
from shadowlit.errors import DataError, Interrupted
from shadowlit.plugins import find_function, known_names

GROUP = "shadowlit.formats"
"""The group of entry points that name formats."""

_RESULTS = {
    "contexts": ("messages", "teacher_context"),
    "pairs": ("chosen", "rejected"),
    "labels": ("messages", "label"),
}


@dataclass(frozen=True)
class CustomFormat:
    """A format from outside the package: the value of ``data.format``, and the function that it names."""

    name: str
    function: Callable[[dict[str, Any]], Any]

    def convert(self, row: Mapping[str, Any], *, prompts_only: bool = False) -> list[Message]:
        """Turn a row into messages, checked as those of the built-in formats are.

        Raises:
            DataError: The function fails, or returns something else. The message doesn't say which row it is.
        """
        made = self._call(row)
        format = "text" if isinstance(made, str) else "messages"
        with located(f"as read by data.format={self.name}"):
            return convert_row({format: made}, format, prompts_only=prompts_only)

    def row_of_two(self, row: Mapping[str, Any], samples: Samples) -> dict[str, Any]:
        """Turn a row into one of a built-in format of preferences or contexts; ``samples`` isn't conversations.

        Raises:
            DataError: The function fails, or doesn't return a tuple of two.
        """
        made, names = self._call(row), _RESULTS[samples]
        if not isinstance(made, tuple) or len(made) != 2:
            raise DataError(
                f"becomes {shown(made)} by data.format={self.name}; expected ({', '.join(names)}), since "
                f"model.objective needs {samples}. Correct the function."
            )
        return dict(zip(names, made, strict=True))

    def digest(self) -> str | None:
        """Return a hash of the function's import path and of the file that defines it; None where there is no such
        file.
        """
        function = inspect.unwrap(self.function)
        try:
            file = inspect.getsourcefile(function)
            source = None if file is None else Path(file).read_bytes()
        except (TypeError, OSError):
            return None
        path = f"{function.__module__}.{function.__qualname__}"
        return None if source is None else hashlib.sha256(path.encode() + source).hexdigest()

    def _call(self, row: Mapping[str, Any]) -> Any:
        try:
            return self.function(dict(row))
        except (DataError, Interrupted):
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"fails in data.format={self.name} with {type(error).__name__}: {error}. Correct the function, or "
                "correct or remove the row."
            ) from error


def format_names() -> list[str]:
    """``auto``, the built-in formats and those that installed packages offer."""
    return known_names(GROUP, ("auto", *FORMATS))


def find_format(name: str) -> CustomFormat | None:
    """Return the format from outside the package that ``data.format`` names; None for ``auto`` and the built-in
    formats.

    Raises:
        DataError: There is no such format, it can't be imported or is not a function, or the name has several meanings.
    """
    if not isinstance(name, str):  # a function, which neither a configuration nor a cache could name
        raise DataError(
            f"data.format is {name!r}; expected a name or the import path of a function, e.g. "
            f"'{getattr(name, '__module__', 'mypackage')}.{getattr(name, '__qualname__', 'my_format')}'."
        )
    built_in = dict.fromkeys(("auto", *FORMATS))
    function = find_function(name, "data.format", "format", GROUP, built_in, DataError)
    return None if function is None else CustomFormat(name, function)
