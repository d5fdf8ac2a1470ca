"""Formats from outside the package: ``data.format`` may name a function that turns a row into a conversation.

The function is named by its import path (``package.module.function``) or by an entry point in the group
``shadowlit.formats``. It is called with each row, a dict of its columns, and returns:

=================  ===================================================================================================
``data.samples``   result
=================  ===================================================================================================
conversations      the messages, ``[{"role": "user", "content": "…"}, …]``, or a text, which is a document to train on
pairs              ``(chosen, rejected)``: two conversations, each a list of messages, that begin with the same prompt
labels             ``(messages, label)``: a conversation that ends with the answer, and whether that is desirable
=================  ===================================================================================================

Messages have the form of the built-in format ``messages`` and are checked in the same way. Prompts (``data.predict``)
may lack the answer. ``auto`` detects built-in formats only. ``docs/formats.md`` has an example.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from shadowlit.data.conversation import located
from shadowlit.data.formats import FORMATS, Message, Samples, convert_row, shown
from shadowlit.errors import DataError

GROUP = "shadowlit.formats"
"""The group of entry points that name formats."""

_BUILT_IN = ("auto", *FORMATS)
_RESULTS = {"pairs": ("chosen", "rejected"), "labels": ("messages", "label")}


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

    def preference_row(self, row: Mapping[str, Any], samples: Samples) -> dict[str, Any]:
        """Turn a row into one of a built-in format of preferences; ``samples`` is pairs or labels.

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
        """A hash of the file that defines the function; None where there is no such file."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self.function))
            return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except (TypeError, OSError):
            return None

    def _call(self, row: Mapping[str, Any]) -> Any:
        try:
            return self.function(dict(row))
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"fails in data.format={self.name} with {type(error).__name__}: {error}. Correct the function, or "
                "correct or remove the row."
            ) from error


def find_format(name: str) -> CustomFormat | None:
    """The format from outside the package that ``data.format`` names; None for ``auto`` and the built-in formats.

    Raises:
        DataError: There is no such format, it can't be imported, it is no function, or the name has several meanings.
    """
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if name in _BUILT_IN and not found:
        return None
    if name in _BUILT_IN or len(found) > 1:
        meanings = ["a built-in format"] if name in _BUILT_IN else []
        meanings += [
            f"the entry point {entry.value} of {entry.dist.name if entry.dist else 'an unknown package'}"
            for entry in found
        ]
        raise DataError(
            f"data.format is {name!r}, which is {' and '.join(meanings)}; expected one format of that name. Uninstall "
            "one of the packages, or give the import path of the function."
        )
    try:
        function = found[0].load() if found else _imported(name)
    except Exception as error:  # importing runs the code of others
        raise _unknown(name, f"can't be imported ({type(error).__name__}: {error})") from error
    if not callable(function) or inspect.isclass(function):
        raise _unknown(name, f"is {shown(function)} and no function")
    return CustomFormat(name, function)


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise LookupError("no format has this name, and it is no import path")
    return getattr(import_module(module), attribute)


def _unknown(name: str, problem: str) -> DataError:
    known = [*_BUILT_IN, *sorted({entry.name for entry in entry_points(group=GROUP)})]
    return DataError(
        f"data.format is {name!r}, which {problem}; expected {', '.join(known)}, or the import path of a function that "
        "turns a row into messages (package.module.function). Correct the name, or put the folder of its module on the "
        "PYTHONPATH."
    )
