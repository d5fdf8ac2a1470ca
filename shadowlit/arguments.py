"""Arguments given in Python as a configuration gives them: plain values become what their types ask for."""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeVar

from shadowlit.errors import ShadowlitError

_PLAIN = (str, int, float, list, tuple, Mapping, os.PathLike, type(None))
_Class = TypeVar("_Class", bound=type)


def takes_plain_values(section: str) -> Callable[[_Class], _Class]:
    """Let a class take its arguments as the section of a configuration has them, e.g. ``adapter={"r": 4}``.

    A plain value that doesn't have the type of its argument is read as YAML's is, and paths are taken for strings;
    objects of other classes are passed on as they are. A value that can't be read is a :class:`ShadowlitError`.

    Args:
        section: Section of the configuration, for messages.
    """

    def decorate(cls: _Class) -> _Class:
        init = cls.__init__  # type: ignore[misc]
        signature, hints = inspect.signature(init), functools.cache(lambda: typing.get_type_hints(init))

        @functools.wraps(init)
        def read(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                if isinstance(value, _PLAIN) and not fits(value, kind := hints().get(name, Any)):
                    value = _without_paths(value)
                    bound.arguments[name] = value if fits(value, kind) else _parsed(f"{section}.{name}", value, kind)
            init(*bound.args, **bound.kwargs)

        cls.__init__ = read  # type: ignore[misc]
        return cls

    return decorate


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _parsed(key: str, value: Any, kind: Any) -> Any:
    """A value as jsonargparse reads it for a key of this type; raise a ShadowlitError if it doesn't fit."""
    from jsonargparse import ArgumentError  # late: most values fit

    from shadowlit.parser import Known, ShortErrors, readable_types, shorten

    expected = readable_types(str(kind))
    if is_dataclass(kind) and not isinstance(value, Mapping):
        raise ShadowlitError(f"{key} is {value!r}; expected {expected}.")
    parser = ShortErrors(exit_on_error=False)
    parser.add_argument(f"--{key}", type=list[kind])  # of a list, for one dataclass would have an option per field
    try:
        found = parser.instantiate(parser.parse_object({key: [value]}))
    except ArgumentError as error:
        raise ShadowlitError(shorten(f"{error}\nGot value: {value}", {key: Known(expected)})) from error
    return found[key][0]


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value has a type, with the values in it; an int is a float too, but no bool is a number."""
    if kind is Any:
        return True
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return any(fits(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (int, float):
        return isinstance(value, int | origin) and not isinstance(value, bool)
    if isinstance(origin, type) and not isinstance(value, origin):
        return False
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return not inner or all(fits(member, inner[-1]) for member in members)
