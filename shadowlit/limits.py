"""Limits for a user's texts: expressions and templates that never end, and YAML that stands for too many values."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import yaml

from shadowlit.errors import ShadowlitError, first_line

_Result = TypeVar("_Result")

TIME_LIMIT_S = 10.0
"""Processor time that a user's regular expression or chat template may take; they need well below a millisecond."""

_MAX_VALUES = 100_000


class _OutOfTime(BaseException):
    """A time limit is exceeded. Not an Exception, which jinja would catch, to rewrite its traceback."""


def in_time(function: Callable[[], _Result]) -> _Result:
    """``function()``, unless it takes longer than ``TIME_LIMIT_S``.

    Raises:
        TimeoutError: It does. Outside of the main thread, the thread that it runs in lasts until the process ends.
    """
    if _can_interrupt():
        try:
            with _time_limit():
                return function()
        except _OutOfTime:
            raise TimeoutError(f"it takes more than {TIME_LIMIT_S:g} s, as if it never ended") from None
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(TIME_LIMIT_S)


def _can_interrupt() -> bool:
    """Whether a time limit works here: in the main thread, on systems with timers, and not within another one."""
    return (
        threading.current_thread() is threading.main_thread()
        and hasattr(signal, "setitimer")  # not on Windows
        and not any(signal.getitimer(signal.ITIMER_VIRTUAL))
        and signal.getsignal(signal.SIGVTALRM) is not None
    )


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise _OutOfTime in the block after ``TIME_LIMIT_S``, if that is possible here."""
    if not _can_interrupt():
        yield
        return

    def stop(*_: Any) -> None:
        raise _OutOfTime

    # Of the process's own time: the other timer is taken by libraries, and runs on while the process is stopped.
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def bounded_matching(what: str) -> Iterator[None]:
    """Let matching a user's regular expression in the block take at most ten seconds of this process's time.

    ``(a+)+$`` takes time that grows exponentially with the length of a text that it doesn't match. Only the main thread
    can be interrupted, and only on systems that have timers: elsewhere there is no limit.

    Args:
        what: The setting and its value, for the message.

    Raises:
        ShadowlitError: It takes longer.
    """
    try:
        with _time_limit():
            yield
    except _OutOfTime:
        raise ShadowlitError(
            f"{what}, whose matching took more than {TIME_LIMIT_S:g} s, and might never end; expected a regular "
            "expression without a repetition inside of a repetition, as in '(a+)+'. Write it without."
        ) from None


def load_yaml(text: str, where: str) -> Any:
    """Load YAML's plain values from a text.

    Args:
        text: The text.
        where: File or setting that has it, for the message.

    Raises:
        ShadowlitError: Its aliases stand for too many values, it is nested too deeply, or a number has too many digits.
        yaml.YAMLError: It is not YAML.
    """
    require_few_values(text, where)
    return readable(lambda: yaml.safe_load(text), where)


def readable(load: Callable[[], _Result], where: str) -> _Result:
    """Return what ``load`` returns for a text; YAML's errors that are none of its own become a ShadowlitError."""
    try:
        return load()
    except RecursionError:
        problem = "is nested too deeply; expected a few levels. Write it flatter"
    except yaml.YAMLError:
        raise
    except ValueError as error:  # of Python's int or date
        problem = f"holds a number or date that can't be read ({first_line(error)}). Write another, or quote it"
    raise ShadowlitError(f"{where} {problem}.")


def require_few_values(text: str, where: str) -> None:
    """Raise if the aliases in a YAML text stand for more values than any configuration has: each may multiply them.

    Raises:
        ShadowlitError: They do.
    """
    if "&" not in text or "*" not in text:
        return
    try:
        number = readable(lambda: _num_values(yaml.compose(text, Loader=yaml.SafeLoader), {}), where)
    except yaml.YAMLError:  # whoever loads it reports it
        return
    if number > _MAX_VALUES:
        found = "infinitely many" if math.isinf(number) else f"{number:,}"
        raise ShadowlitError(
            f"{where} stands for {found} values, since its aliases (*name) repeat one another; expected at most "
            f"{_MAX_VALUES:,}. Write out what they stand for."
        )


def _num_values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """The number of values that a node stands for, each alias counted as what it repeats."""
    if id(node) not in known:
        known[id(node)] = math.inf  # for an alias to what it is in
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [value for _, value in node.value]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]
