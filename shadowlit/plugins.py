"""Objects from outside the package: imported by path, or chosen by a name that an installed package offers."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from shadowlit.errors import Interrupted, ShadowlitError, first_line

WITHOUT_SUPER = "its __init__ doesn't call super().__init__()"
"""What is wrong with an object that lacks what its base sets."""


def import_object(path: Any, key: str, expected: str, error: type[ShadowlitError] = ShadowlitError) -> Any:
    """Import the object at a path such as ``package.module.name``.

    Args:
        path: Import path.
        key: Setting that holds the path, for messages.
        expected: What the setting takes, for messages.
        error: Class of the error.

    Raises:
        ShadowlitError: It can't be imported.
    """
    # Not pkgutil.resolve_name, which takes a module that fails to import something for one that doesn't exist.
    module, _, name = str(path).rpartition(".")
    return _loaded(lambda: getattr(import_module(module), name), path, key, expected, error)


def path_of(owner: Any) -> str:
    """Return the import path of a class, or of an object's class."""
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


def described(value: Any) -> str:
    """Return what a user's function has returned, in a few words: ``a Tensor of shape [3]``, ``a dict``, ``None``."""
    shape = getattr(value, "shape", None)
    return "None" if value is None else f"a {type(value).__name__}{'' if shape is None else f' of shape {[*shape]}'}"


@contextlib.contextmanager
def calls(owner: Any, key: str, expected: str) -> Iterator[str]:
    """Name the setting, which is yielded, in whatever a class from outside the package raises in the block.

    Raises:
        ShadowlitError: The block raised something else, which is the cause; ``expected`` is a sentence of its message.
    """
    try:
        yield key
    except (ShadowlitError, Interrupted):
        raise
    except (Exception, SystemExit) as cause:
        if (path := path_of(owner)).startswith("shadowlit."):
            raise
        raise ShadowlitError(f"{key} is {path}, which fails ({reason(owner, cause)}). {expected}") from cause


def reason(owner: Any, error: BaseException) -> str:
    """Return the error in one line, with the last line that it has passed in the file of a class, or of an object's
    class.
    """
    kind = owner if isinstance(owner, type) else type(owner)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return first_line(error) + (f"; {Path(str(file)).name}, line {lines[-1]}" if lines else "")


def known_names(group: str, built_in: Iterable[str]) -> list[str]:
    """Return the names that are built in, and those of installed packages' entry points in the group, sorted."""
    return sorted({*built_in, *(entry.name for entry in _offered(group, tuple(sys.path)))})


def find_function(
    name: str, key: str, kind: str, group: str, built_in: Mapping[str, Any], error: type[ShadowlitError]
) -> Any:
    """Return the built-in object or the function that a name stands for.

    Args:
        name: Key of ``built_in``, name of an entry point, or import path of a function.
        key: Setting that holds the name, for messages.
        kind: What the function is, for messages.
        group: Group of the entry points by which installed packages offer functions.
        built_in: Objects that are known here, by name.
        error: Class of the error.

    Raises:
        ShadowlitError: The name stands for nothing, for several things, or for something that isn't a function.
    """
    known = known_names(group, built_in)
    expected = f"one of {', '.join(known)}, or the import path of a function, e.g. mypackage.{kind}s.my_{kind}"
    found = {
        f"the entry point {entry.value} of {_package_of(entry)}": _loaded(entry.load, name, key, expected, error)
        for entry in _offered(group, tuple(sys.path))
        if entry.name == name
    }
    if name in built_in:
        found = {f"a built-in {kind}": built_in[name], **found}
    elif not found and "." in name:
        found = {"": import_object(name, key, expected, error)}
    if not found:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise error(f"{key} is {name!r}; expected {expected}.{hint}")
    if len({id(one) for one in found.values()}) > 1:
        raise error(
            f"{key} is {name!r}, which is {' and '.join(found)}; expected one {kind} of that name. Uninstall one of "
            "the packages, or give the import path of the function."
        )
    chosen = next(iter(found.values()))
    if name not in built_in and (not callable(chosen) or inspect.isclass(chosen)):
        raise error(f"{key} is {name!r}, which is {chosen!r} and no function; expected {expected}.")
    return chosen


def _loaded(load: Callable[[], Any], name: str, key: str, expected: str, error: type[ShadowlitError]) -> Any:
    try:
        return load()
    except ShadowlitError as cause:  # of a module that registers something
        raise error(f"{key} is {name!r}: {cause}") from cause
    except Interrupted:
        raise
    except (Exception, SystemExit) as cause:  # importing a module runs it
        raise error(
            f"{key} is {name!r}, which can't be imported ({first_line(cause)}); expected {expected}. Correct the name, "
            "or put its package on PYTHONPATH."
        ) from cause


@cache
def _offered(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group in the packages on ``path``, which takes a file per package to find."""
    return tuple(entry_points(group=group))


def _package_of(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown package"
