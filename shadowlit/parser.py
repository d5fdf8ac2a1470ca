"""A command line whose errors are short: the key, its value, the cause, and what is expected instead."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import IO, Any, ClassVar, NamedTuple, NoReturn

import jsonargparse
import yaml
from jsonargparse import get_loader, set_loader

from shadowlit.errors import ShadowlitError, first_line
from shadowlit.limits import readable, require_few_values
from shadowlit.masking import MASK, is_secret, mask_text
from shadowlit.plugins import import_object
from shadowlit.text import fitted

_KEY = re.compile(r'Parser key "([^"]+)":?\s*')
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|does not accept option ')([\w.-]+)")
_VALUE = re.compile(r"(?:^ *Given value|Got value): (.*?)(?:\. Got value: .*)?$", re.MULTILINE)
_PART = re.compile(r"NestedArg\(key='(.+)', val='?(.*?)'?\)")
_TYPES = re.compile(r"^ *Subtypes: \[(.*)\]$|Expected an? (?!path but)(.+?)(?:\. Got value: .*)?$", re.MULTILINE)
_OPTION = re.compile(r"Option '(\S+)' is not accepted(?:; known: (.*?)(?:\. Got value: .*)?)?$", re.MULTILINE)
_MISSING = re.compile(r"the following arguments are required: (.+)$", re.MULTILINE)
_ABSENT = re.compile(r"File does not exist: '(.*?)'")
_CLASS = re.compile(r"class_path['\"]?[=:] ?'([\w.]+)'")
_SPEC = {"class_path", "init_args", "dict_kwargs"}
_MAX_VALUE, _MAX_LINES, _MAX_NAMES = 120, 6, 20


_load_yaml = get_loader("yaml")


def _load_value(text: str) -> Any:
    where = "the configuration, or a value on the command line,"
    require_few_values(text, where)
    return readable(lambda: _load_yaml(text), where)


set_loader("yaml", _load_value, (yaml.YAMLError,))  # for every configuration and value that jsonargparse reads


class Known(NamedTuple):
    """What a key takes.

    Attributes:
        expected: What is expected, in words.
        names: Function that returns the known choices, names or import paths.
        base: Class that the choices are derived from.
    """

    expected: str
    names: Callable[[], Iterable[str]] = tuple
    base: type = object


class ShortErrors(jsonargparse.ArgumentParser):
    """A parser that reports an error in a few lines, without listing all of its options, and takes no abbreviated key.

    Attributes:
        known: What keys take, for those whose types don't say it.
    """

    known: ClassVar[Mapping[str, Known]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A key that is cut short would be taken for the longer one, and for another once there are two of them.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and the message."""
        # A class that is given by its path has a parser of its own, whose error becomes a part of this one's.
        if not self.exit_on_error:
            if _OPTION.search(message) and "; known: " not in message:  # the innermost class knows
                message += f"; known: {', '.join(key for key in _keys(self) if not key.endswith('help'))}"
        else:
            message = shorten(message, self.known)
            if unknown := _UNKNOWN.search(message):
                keys, first = _keys(self), unknown[1].partition(".")[0]  # it knows no keys within a mapping
                near, siblings = _nearest(unknown[1], keys)
                near = near or ([] if siblings else difflib.get_close_matches(first, keys, n=1))
                if any(map(is_secret, near)):
                    message = re.sub(rf"({re.escape(unknown[1])}[= ])\S+", rf"\1{MASK}", message)
                message += (
                    f"\nDid you mean {near[0]}?" if near else f"\nKnown: {', '.join(siblings)}." if siblings else ""
                )
            message = fitted(mask_text(message), sys.stderr, taken=len("error: "))
        super().error(message, ex)

    def print_usage(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """Print nothing: a list of all options would hide the error, and the tip says where it is."""


def _nearest(key: str, keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """The key that was probably meant, and, if there is none, the few keys that the parent has.

    ``run.folder`` is nearer to ``export.folder`` by its letters, but whoever writes ``run.`` means a key of the run.
    """
    parent, _, name = key.rpartition(".")
    siblings = sorted(
        {each for each in keys if parent and each.startswith(f"{parent}.") and not each.endswith(".help")}
    )
    near = difflib.get_close_matches(name, [each[len(parent) + 1 :] for each in siblings], n=1)
    if near:
        return [f"{parent}.{near[0]}"], []
    if 0 < len(siblings) <= _MAX_NAMES:
        return [], siblings
    return difflib.get_close_matches(key, keys, n=1), []


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
    if found is not None and (absent := _ABSENT.search(message)):
        return f"{found[1]} is {absent[1]}, which does not exist. Correct the path."
    if found is None or not (values := _VALUE.findall(message)):
        return "\n".join([line for line in message.splitlines() if line.strip()][:_MAX_LINES])
    key, value, details = found[1], values[-1], message[found.end() :]
    if part := _PART.fullmatch(value):
        key, value = f"{key}.{part[1]}", part[2]
    shown = MASK if is_secret(key) else mask_text(value)
    shown = shown if len(shown) <= _MAX_VALUE else f"{shown[:_MAX_VALUE]} …"
    if options := _nested(details):  # of the class that is given by its path
        name, rest = ".".join(option[1] for option in options), details[options[-1].end() :]
        within = _indented(details, options[-1])
        if missing := _MISSING.search(within):
            return f"{key} is {shown}, but {name}.{missing[1]} is missing."
        unknown = _unknown_option(within)
        own = MASK if is_secret(name) or (unknown and unknown[1]) else mask_text(_VALUE.findall(rest)[0])
        whose = "" if part else f", but {name} is {own}"
        return f"{key} is {shown}{whose}{f', which {unknown[0]}' if unknown else f'; expected {_types(rest)}.'}"
    if missing := _MISSING.search(details):
        return f"{key} is {shown}, but {missing[1]} is missing."
    takes = known.get(key) or known.get(key.partition(".")[2]) or Known(_types(details))
    specs = list(_specs(value)) if takes.base is not object or "class_path" in value else []
    names = list(takes.names())
    causes = ((path, _cause(path, beside, takes.base, names)) for path, beside in specs)
    path, cause = next((each for each in causes if each[1]), ("", ""))
    if not cause and (unknown := _unknown_option(details)):
        problem, is_private = unknown
        return f"{key} is {MASK if is_private else shown}, but the class {problem}"
    more = ""
    if len(names) > _MAX_NAMES:
        ends = [name.rpartition(".")[2] for name in names]
        near = difflib.get_close_matches((path or value).rpartition(".")[2], ends)
        similar = [name for name, end in zip(names, ends, strict=True) if end in near]
        more = "" if similar else f", … ({len(names) - _MAX_NAMES} more)"
        names = similar or names[:_MAX_NAMES]
    text = f"{key} is {shown}{f', but {path} {cause}' if cause else ''}; expected {takes.expected}."
    return f"{text}\nKnown: {_listed(names)}{more}." if names else text


def _nested(details: str) -> list[re.Match[str]]:
    """The options that contain each other, down to the one that is wrong: they are indented more and more."""
    found, column = [], -1
    for match in _KEY.finditer(details):
        if (indent := _column(details, match)) <= column:
            break
        found.append(match)
        column = indent
    return found


def _indented(details: str, option: re.Match[str]) -> str:
    """What is reported of an option: the lines after it that are indented more."""
    first, *lines = details[option.end() :].split("\n")
    column = _column(details, option)
    return "\n".join([first, *takewhile(lambda line: len(line) - len(line.lstrip()) >= column, lines)])


def _column(details: str, option: re.Match[str]) -> int:
    return option.start() - details.rfind("\n", 0, option.start())


def _unknown_option(details: str) -> tuple[str, bool] | None:
    """That a class has no such option, and those it has; and whether a secret may be misspelled. None for neither."""
    if not (options := _OPTION.findall(details)):
        return None
    unknown, has = max(options, key=lambda option: len(option[1]))  # of the types of a union
    near = difflib.get_close_matches(unknown, has.split(", "), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    known = f"\nKnown: {has}." if has else ""
    return f"has no option {unknown}.{hint}{known}", any(map(is_secret, near))


def _specs(value: Any, nested: bool = False) -> Iterator[tuple[str, list[str]]]:
    """The import path of every class in a value, or in its text, and the keys that don't belong next to it."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, TypeError, ValueError):  # a path, or a Namespace
            yield from ((path, []) for path in _CLASS.findall(value) or [value])
            return
    if isinstance(value, dict) and "class_path" in value:
        yield str(value["class_path"]), [str(key) for key in value if key not in _SPEC]
        nested = True  # its options may be any strings
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in within:
        if isinstance(each, dict | list):
            yield from _specs(each, nested=True)
        elif isinstance(each, str) and not nested:
            yield each, []


def _cause(path: str, beside: list[str], base: type, names: Iterable[str]) -> str:
    """What is wrong with a class that should be derived from ``base``; empty for nothing that is known."""
    if beside:
        return f"is given {', '.join(beside)} next to class_path, which belongs under init_args"
    if "." not in path:
        known = path in (name.rpartition(".")[2] for name in names)
        return "" if known else "is neither a known name nor an import path"
    try:
        found = import_object(path, "class_path", "a class")
    except ShadowlitError as error:
        return f"can't be imported ({first_line(error.__cause__ or error).removeprefix('AttributeError: ')})"
    if not (isinstance(found, type) and issubclass(found, base)):
        return f"is not a subclass of {base.__name__}"
    left = getattr(found, "__abstractmethods__", ())
    return f"is abstract, since it lacks {', '.join(sorted(left))}" if left else ""


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
