"""Limits for a user's texts: regular expressions that would never end, and YAML that stands for too many values."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import yaml

from shadowlit.errors import ShadowlitError

_MATCHING_S = 10.0
_MAX_VALUES = 100_000


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
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise ShadowlitError(
            f"{what}, whose matching took more than {_MATCHING_S:g} s, and might never end; expected a regular "
            "expression without a repetition inside of a repetition, as in '(a+)+'. Write it without."
        )

    # Of the process's own time: the other timer is taken by libraries, and runs on while the process is stopped.
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MATCHING_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def load_yaml(text: str, where: str) -> Any:
    """Load YAML's plain values from a text.

    Args:
        text: The text.
        where: File or setting that has it, for the message.

    Raises:
        ShadowlitError: Its aliases stand for too many values.
        yaml.YAMLError: It is no YAML.
    """
    require_few_values(text, where)
    return yaml.safe_load(text)


def require_few_values(text: str, where: str) -> None:
    """Raise if the aliases in a YAML text stand for more values than any configuration has: each may multiply them.

    Raises:
        ShadowlitError: They do.
    """
    if "&" not in text or "*" not in text:
        return
    try:
        number = _num_values(yaml.compose(text, Loader=yaml.SafeLoader), {})
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
