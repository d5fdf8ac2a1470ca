"""A command line whose errors are short: the key, its value, the cause, and what is expected instead."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO, ClassVar, NamedTuple, NoReturn

import jsonargparse

_KEY = re.compile(r'Parser key "([^"]+)":?\s*')
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|does not accept option ')([\w.-]+)")
_VALUE = re.compile(r"(?:^ *Given value|Got value): (.*?)(?:\. Got value: .*)?$", re.MULTILINE)
_PART = re.compile(r"NestedArg\(key='(.+)', val='?(.*?)'?\)")
_TYPES = re.compile(r"^ *Subtypes: \[(.*)\]$|Expected an? (?!path but)(.+?)(?:\. Got value: .*)?$", re.MULTILINE)
# What jsonargparse says about each type of a union, the most telling first, and how it is reported here.
_CAUSES = (
    (r"Option '(\S+)' is not accepted", r"but the class has no option \1"),
    (r"the following arguments are required: (.+)$", r"but \1 is missing"),
    (r"Import path (\S+) does not correspond to a subclass of (\w+)", r"but \1 is no subclass of \2"),
    (r"Expected '(\S+)' to be a subclass of (?:<class ')?(.+?)'?>?\.", r"but \1 is no subclass of \2"),
    (r"but (\S+) is (abstract|a protocol)$", r"but \1 is \2"),
    (r"Problem with given class_path '(\S+)':\s+(.+)$", r"but \1 can't be imported (\2)"),
    (
        r"a callable class: (?!Expected)(.+?)\. Got value: Namespace\(class_path='(.+?)'.*$",
        r"but \2 can't be imported (\1)",
    ),
    (r"a callable class: (?!Expected)(.+?)$", r"but it can't be imported (\1)"),
    (r"Expected a dot import path string: (\S+)$", r"but \1 is neither a known name nor an import path"),
)
_MAX_VALUE, _MAX_LINES, _MAX_NAMES = 120, 6, 20


class Known(NamedTuple):
    """What a key takes.

    Attributes:
        expected: What is expected, in words.
        names: Function that returns the known choices, names or import paths.
    """

    expected: str
    names: Callable[[], Iterable[str]] = tuple


class ShortErrors(jsonargparse.ArgumentParser):
    """A parser that reports an error in a few lines, without listing all of its options.

    Attributes:
        known: What keys take, for those whose types don't say it.
    """

    known: ClassVar[Mapping[str, Known]] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and the message."""
        # A class that is given by its path has a parser of its own, whose error becomes a part of this one's.
        if self.exit_on_error:
            message = shorten(message, self.known)
            if unknown := _UNKNOWN.search(message):
                near = difflib.get_close_matches(unknown[1], _keys(self), n=1)
                message += f"\nDid you mean {near[0]}?" if near else ""
        super().error(message, ex)

    def print_usage(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """Print nothing: a list of all options would hide the error, and the tip says where it is."""


def _keys(parser: argparse.ArgumentParser) -> list[str]:
    """The keys of a parser and its subcommands."""
    below = [sub for action in parser._actions for sub in getattr(action, "_name_parser_map", {}).values()]
    return [*(action.dest for action in parser._actions), *(key for sub in below for key in _keys(sub))]


def shorten(message: str, known: Mapping[str, Known]) -> str:
    """Reduce an error of jsonargparse to the key, the value, one cause, and what is expected.

    Args:
        message: Message of jsonargparse, which lists every type of a union with a reason against it.
        known: What keys take.
    """
    found = _KEY.match(message)
    if found is None or not (values := _VALUE.findall(message)):
        return "\n".join([line for line in message.splitlines() if line.strip()][:_MAX_LINES])
    key, value, details = found[1], values[-1], message[found.end() :]
    if part := _PART.fullmatch(value):
        key, value = f"{key}.{part[1]}", part[2]
    shown = value if len(value) <= _MAX_VALUE else f"{value[:_MAX_VALUE]} …"
    if option := _KEY.search(details):  # of the class that is given by its path
        rest = details[option.end() :]
        whose = "" if part else f", but {option[1]} is {_VALUE.findall(rest)[0]}"
        return f"{key} is {shown}{whose}; expected {_types(rest)}."
    matches = ((re.search(pattern, details, re.MULTILINE), report) for pattern, report in _CAUSES)
    cause = next((match.expand(report) for match, report in matches if match), "")
    if " has no option " in cause or cause.endswith(" is missing"):
        return f"{key} is {shown}, {cause}."
    takes = known.get(key) or known.get(key.partition(".")[2]) or Known(_types(details))
    names = list(takes.names())
    if len(names) > _MAX_NAMES:
        ends = [name.rpartition(".")[2] for name in names]
        wanted = (cause.split()[1] if cause else value).rpartition(".")[2]
        near = difflib.get_close_matches(wanted, ends)
        names = [name for name, end in zip(names, ends, strict=True) if end in near] or names[:_MAX_NAMES]
    text = f"{key} is {shown}{f', {cause}' if cause else ''}; expected {takes.expected}."
    return f"{text}\nKnown: {_listed(names)}." if names else text


def _listed(names: Iterable[str]) -> str:
    """Names, those of a module after its name: ``adamw; torch.optim: Adam, SGD``."""
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, end = name.rpartition(".")
        modules.setdefault(module, []).append(end)
    return "; ".join(f"{module}{': ' if module else ''}{', '.join(ends)}" for module, ends in modules.items())


def _types(details: str) -> str:
    found = _TYPES.search(details)
    return readable_types((found[1] or found[2]) if found else "")


def readable_types(types: str) -> str:
    """Types as a user writes them: ``a, b`` for a Literal or a union, ``int`` for ``<class 'int'>``, ``null``."""
    types = re.sub(r"<class '([\w.]+)'>", r"\1", types)
    types = re.sub(r"typing\.Literal\[([^]]*)\]", lambda literal: literal[1].replace("'", ""), types)
    types = re.sub(r"(?:\w+\.)+(?=\w)", "", types)
    types = re.sub(r"^(?:Union|Optional)\[(.*)\]$", r"\1", types)
    return types.replace(" | ", ", ").replace("NoneType", "null").replace("None", "null")
