"""The errors a user can cause. Each message says what was found, what was expected and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from shadowlit.masking import mask_text

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class ShadowlitError(ValueError):
    """Base of every error that a user's input or configuration can cause. Secrets in its message are masked.

    Attributes:
        status: Exit status of the command line: 2 for wrong usage, found before anything is loaded, else 1.
    """

    status = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(mask_text(arg) if isinstance(arg, str) else arg for arg in args))


class PairError(ShadowlitError):
    """A Base and an Instruct that do not fit together, or a model folder that cannot be read."""


class DataError(ShadowlitError):
    """A data file, a row or a chat template that cannot be trained on."""


class GraftError(ShadowlitError):
    """A selection, an adapter or a state for which the graft is not defined or not exact."""


class CheckpointError(ShadowlitError):
    """A safetensors folder that is broken, incomplete or inconsistent with what was asked of it."""


class ExportError(ShadowlitError):
    """A target that cannot be written, or a written folder that does not reload as what was validated."""


class EvaluationError(ShadowlitError):
    """A suite, a task, a backend or a model with which a benchmark cannot be run."""


class Interrupted(SystemExit):
    """A signal that ends a command, unlike ``sys.exit`` in a user's module."""


@contextmanager
def as_usage() -> Iterator[None]:
    """Give errors the exit status of wrong usage."""
    try:
        yield
    except ShadowlitError as error:
        error.status = 2
        raise


def first_line(error: BaseException) -> str:
    """Return the error's type and what its first line says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def wrong_names(key: str, names: Iterable[str]) -> list[str]:
    """Return messages about the names in the setting ``key`` that could not be one part of a metric's name."""
    return [
        f"{key} has the name {name!r}; expected letters, digits, '_' and '-'. Rename it."
        for name in names
        if not _NAME.fullmatch(name)
    ]


def counted(number: int, noun: str) -> str:
    """``1 image``, ``2,000 images``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
