"""Which callback or module a metric belongs to: two that log the same name would overwrite each other."""

from __future__ import annotations

import sys
from types import FrameType

from lightning.pytorch import Callback, LightningModule

from shadowlit.errors import ShadowlitError

Writer = tuple[int, str]
"""Whoever logs a metric: identity and name."""


def claim(writers: dict[str, Writer], name: str, writer: Writer) -> None:
    """Let a metric belong to ``writer``; raise if it belongs to another one."""
    first = writers.setdefault(name, writer)
    if first != writer:
        raise ShadowlitError(
            f"{name} would be logged by {first[1]} and by {'another ' * (first[1] == writer[1])}{writer[1]}, and one "
            "value would replace the other. Rename one of the two, in data.validation, data.test, model.metrics, "
            "evaluation.evaluators or the callback, or remove a callback that is listed twice."
        )


def current_writer() -> Writer:
    """Whoever called the function that calls this one.

    It is the nearest callback or module among the callers, with the name of its class; of a module the class that
    defines the method, so that a subclass is told from its base class. Otherwise it is the function that is the hook.
    """
    caller = sys._getframe(2)
    frame: FrameType | None = caller.f_back if caller.f_code.co_name == "log_dict" else caller
    hook = caller.f_code
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith("lightning."):
        hook, one = frame.f_code, frame.f_locals.get("self")
        if isinstance(one, Callback | LightningModule):
            own = type(one).__mro__ if isinstance(one, LightningModule) else ()
            methods = {getattr(vars(kind).get(hook.co_name), "__code__", None): kind for kind in own}
            return id(one), methods.get(hook, type(one)).__name__
        frame = frame.f_back
    return id(hook), hook.co_qualname
