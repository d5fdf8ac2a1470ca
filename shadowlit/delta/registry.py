"""The registry of transforms: which function a name stands for, and which parameters it has.

A name is that of a function with the decorator :func:`transform`, of an entry point in the group
``shadowlit.transforms`` of an installed package, or the import path of any function,
``mypackage.transforms.sign_only``.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from torch import Tensor

from shadowlit.arguments import fits
from shadowlit.errors import GraftError
from shadowlit.plugins import find_function, known_names

GROUP = "shadowlit.transforms"
"""Group of the entry points by which installed packages offer transforms."""
NOISE, SEED = "noise", "seed"
"""Parameter of a function that gets random numbers, and the parameter by which a user chooses them."""
SIGNS, DATA, ROWS = "gradient_signs", "data", "rows"
"""Parameter of a function that gets signs of the Instruct's gradient, and those by which a user chooses its rows."""

Where = Callable[[str], str]  # from the name of a parameter to what messages call it
_Function = TypeVar("_Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Transform:
    """A function of an update by the name under which it is chosen.

    A pure function ``(update, *, parameters) -> update`` of a tensor of any shape, in float32. An elementwise one, of
    whose result each element depends on the same element of the arguments only, may be applied to a shard of a tensor.
    """

    name: str
    function: Callable[..., Tensor]
    elementwise: bool = False

    @property
    def is_random(self) -> bool:
        """Whether the function takes ``noise``."""
        return NOISE in inspect.signature(self.function).parameters

    @property
    def needs_gradient(self) -> bool:
        """Whether the function takes ``gradient_signs``, which only a training can compute."""
        return SIGNS in inspect.signature(self.function).parameters

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that a user chooses, with their types and defaults."""
        _, *found = inspect.signature(self.function).parameters.values()
        own = [p for p in found if p.name not in (NOISE, SIGNS)]
        chosen = {p.name: p.replace(annotation=_type_of(p, self.function)) for p in own}
        kind = inspect.Parameter.KEYWORD_ONLY
        if self.is_random:
            chosen[SEED] = inspect.Parameter(SEED, kind, default=0, annotation=int)
        if self.needs_gradient:
            chosen[DATA] = inspect.Parameter(DATA, kind, annotation=str)
            chosen[ROWS] = inspect.Parameter(ROWS, kind, default=31, annotation=int)
        return chosen


_registered: dict[str, Transform] = {}


def transform(name: str, *, elementwise: bool = False) -> Callable[[_Function], _Function]:
    """Register a function of a tensor, ``(update, *, <typed keyword parameters>) -> Tensor``, and return it unchanged.

    The parameters and their defaults are those of the configuration and of the command line. One called ``noise`` is
    not chosen by the user: it is a tensor of uniform random numbers in [0, 1), one per element of the update, drawn
    from the user's ``seed`` (0 by default) and the tensor's name. Nor is one called ``gradient_signs``: -1, 0 or 1 for
    each element of the update, the sign of the loss's gradient at the untouched Instruct that most of the user's
    ``rows`` of ``data`` have (31 by default), 0 without a majority; it works in a training only. The function must not
    change its input.

    Args:
        name: Name by which the function is chosen.
        elementwise: Whether each element of the result depends on the same element of ``update``, ``noise`` and
            ``gradient_signs`` only.
            Under FSDP2 only such functions can be applied, to each rank's shard.

    Raises:
        GraftError: Another function has the name, or the function has another form.
    """

    def register(function: _Function) -> _Function:
        _require_function(function)
        other = _registered.get(name)
        if other is not None and _path(other.function) != _path(function):  # a notebook's cell may run again
            paths = f"{_path(other.function)} and {_path(function)}"
            raise GraftError(
                f"two transforms are registered as {name!r}: {paths}. Rename one of them, or give its import path."
            )
        _registered[name] = Transform(name, function, elementwise)
        return function

    return register


def transform_names() -> list[str]:
    """Return the names of the registered transforms and of those that installed packages offer."""
    return known_names(GROUP, _registered)


def find(name: str, key: str = "name") -> Transform:
    """Return the transform of a name: a registered one, an entry point's, or the function at an import path.

    Raises:
        GraftError: There is none, there are several, or what the name stands for is not a function. The message calls
            the setting ``key``.
    """
    registered = {known: one.function for known, one in _registered.items()}
    function = find_function(name, key, "transform", GROUP, registered, GraftError)
    _require_function(function, f"{key} is {name!r}: ")
    decorated = (known for known in _registered.values() if known.function is function)
    return _registered.get(name) or next(decorated, Transform(name, function))


def _require_function(function: Any, prefix: str = "") -> None:
    """Raise unless this is a Python function of an update and of parameters with names."""
    parameters = inspect.signature(function).parameters.values() if inspect.isfunction(function) else ()
    if parameters and not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return
    found = f"{_path(function)}{inspect.signature(function)}" if inspect.isfunction(function) else repr(function)
    raise GraftError(
        f"{prefix}{found} is not a transform; expected a function (update: Tensor, *, <named parameters>) -> Tensor, "
        "without *args and **kwargs."
    )


def _path(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def checked(found: Transform, given: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """Return the parameters of a transform: the given ones, and defaults for the rest.

    Raises:
        GraftError: A parameter is unknown, missing or of another type; ``where`` gives its name in the message.
    """
    parameters = found.parameters
    has = ", ".join(str(p) for p in parameters.values()) or "no parameters"
    for name, value in given.items():
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise GraftError(f"{where(name)} is given, but {found.name!r} has no such parameter; it has {has}.{hint}")
        if not fits(value, parameters[name].annotation):
            kind = inspect.formatannotation(parameters[name].annotation)
            raise GraftError(f"{where(name)} is {value!r}; expected {kind}. {found.name!r} has {has}.")
    missing = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty and name not in given]
    if missing:
        raise GraftError(f"{where(missing[0])} is missing; {found.name!r} has {has}. Give it a value.")
    return {name: given.get(name, p.default) for name, p in parameters.items()}


def _type_of(parameter: inspect.Parameter, function: Callable[..., Tensor]) -> Any:
    """The type of one parameter; ``Any`` where it has none, or one that is imported for type checkers only."""
    alone = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    if parameter.annotation is not inspect.Parameter.empty:
        with contextlib.suppress(NameError):
            return typing.get_type_hints(alone, function.__globals__)[parameter.name]
    return Any
