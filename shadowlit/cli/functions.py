"""Commands that are typed functions: turning the words of a command line into arguments."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar, TypeAlias, get_origin, get_type_hints

from jsonargparse import auto_cli

from shadowlit.allocator import keep_freed_memory
from shadowlit.errors import Interrupted, ShadowlitError
from shadowlit.parser import Known, ShortErrors

# Changes of a configuration by dotted key, and lists of values, as they are written. In those of type Any jsonargparse
# would create the objects that `class_path` and `init_args` describe.
Changes: TypeAlias = dict
Values: TypeAlias = list


def _transforms() -> list[str]:
    import shadowlit.delta.transforms  # noqa: F401 - late, since torch takes seconds; it registers them
    from shadowlit.delta.registry import transform_names

    return transform_names()


class Parser(ShortErrors):
    """The parser of a command; its errors are short.

    Attributes:
        functions: The functions of the command, by its name or those of its subcommands.
    """

    functions: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    known: ClassVar = {
        "transforms": Known(
            'a list of names with their parameters, e.g. [{"name": "dare", "density": 0.2}]', _transforms
        ),
        "parameters": Known('values by the name of the parameter, e.g. {"size": 1e-4}'),
    }

    def format_help(self) -> str:
        """Return the help, whose first line shows which parameters can be given as words."""
        if function := self.functions.get(self.prog.rpartition(" ")[2]):
            self.usage = f"{self.prog} {' '.join(_words(function))} [--key=value ...]"
        return str(super().format_help())


def _words(function: Callable[..., Any]) -> Iterator[str]:
    """The parameters that are usually given as words, see :func:`spell_out`: the first, and more without a default."""
    kinds = get_type_hints(function)
    for i, parameter in enumerate(inspect.signature(function).parameters.values()):
        required = parameter.default is parameter.empty
        if i and not required:
            return
        name = f"{parameter.name.upper()}{' ...' if get_origin(kinds[parameter.name]) is list else ''}"
        yield name if required else f"[{name}]"


@contextlib.contextmanager
def _ends_cleanly() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into Interrupted: by default SIGTERM kills Python without any clean-up."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)  # a background job ignores SIGINT, and should
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) in usual]

    def stop(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        raise Interrupted(128 + number)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@_ends_cleanly()
def run_function(name: str, module: str, args: Sequence[str]) -> None:
    """Run the function ``name`` of ``module``, or one of the module's ``COMMANDS``; its docstring is the ``--help``.

    If no subcommand is given, the module's ``DEFAULT`` is run. SIGINT and SIGTERM raise an exception in the function,
    so that it removes what it was writing.

    Args:
        name: Name of the command.
        module: Module that implements it.
        args: Words and options that follow the command.

    Raises:
        ShadowlitError: There are more words without an option than parameters.
        SystemExit: 130 after SIGINT, 143 after SIGTERM.
    """
    keep_freed_memory()
    found = importlib.import_module(module)
    components = getattr(found, "COMMANDS", None) or getattr(found, name)
    if callable(components):
        args = spell_out(components, args)
    else:
        # Options without a subcommand belong to the default one; --help describes all of them.
        options_only = not args or (args[0].startswith("-") and args[0] not in ("-h", "--help"))
        args = [found.DEFAULT, *args] if hasattr(found, "DEFAULT") and options_only else list(args)
        if args and args[0] in components:
            args = [args[0], *spell_out(components[args[0]], args[1:])]
    own = type("Parser", (Parser,), {"functions": {name: components} if callable(components) else components})
    auto_cli(components, args=args, as_positional=False, parser_class=own, prog=f"shadowlit {name}")


def spell_out(function: Callable[..., Any], args: Sequence[str]) -> list[str]:
    """Rewrite words as options: ``A B --dry-run`` becomes ``--base=A --tuned=B --dry_run=true``.

    Words before the first option are assigned to the parameters in order, or all to the first one if it is a list. If
    an option's parameter is a list, it takes all words up to the next option. A switch needs no value.

    Raises:
        ShadowlitError: There are more words than parameters.
    """
    kinds = get_type_hints(function)
    names = list(inspect.signature(function).parameters)
    first = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    words, options = args[:first], args[first:]
    if words and get_origin(kinds[names[0]]) is list:
        spelled = [f"--{names[0]}={json.dumps(list(words))}"]
    elif len(words) > len(names):
        raise ShadowlitError(f"{len(words)} words were given ({' '.join(words)}); expected at most {len(names)}.")
    else:
        spelled = [f"--{name}={word}" for name, word in zip(names, words, strict=False)]
    taken = 0
    for i, option in enumerate(options):
        if i < taken:
            continue
        key, equals, value = option.partition("=")
        key = "--" + key[2:].replace("-", "_") if key.startswith("--") else key
        if get_origin(kinds.get(key[2:])) is list:
            taken = next((j for j in range(i + 1, len(options)) if options[j].startswith("-")), len(options))
            members = [value, *options[i + 1 : taken]] if equals else list(options[i + 1 : taken])
            written = len(members) == 1 and members[0].startswith("[")  # already a list
            spelled.append(f"{key}={members[0] if written else json.dumps(members)}")
            continue
        follows = options[i + 1] if i + 1 < len(options) else "--"
        if kinds.get(key[2:]) is bool and not equals and follows.lower() not in ("true", "false"):
            equals, value = "=", "true"
        spelled.append(f"{key}{equals}{value}")
    return spelled
