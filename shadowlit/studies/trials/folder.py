"""Locks: one command works in the folder of a study, which has one recipe, and one training in each of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from shadowlit.errors import ShadowlitError
from shadowlit.masking import masked

LOCK = ".lock"
_PATIENCE_S = 60.0
_LONGEST = 80  # of a value in a message


@contextmanager
def vacated(folder: Path) -> Iterator[None]:
    """Hold a training's folder while the block runs, after every process that still works in it has ended.

    A training outlives its killed command for a moment, in which the next one must not clear the folder.

    Raises:
        ShadowlitError: A process has not left the folder within a minute.
    """
    with ExitStack() as stack:
        for file in sorted(folder.glob(f"{LOCK}*")):
            stack.enter_context(_wait_for(file))
        yield


def occupied(folder: Path) -> AbstractContextManager[BaseFileLock]:
    """Hold a training's folder for one of its processes; each rank on this machine has a lock of its own.

    Raises:
        ShadowlitError: Another training has not left the folder within a minute.
    """
    return _wait_for(folder / f"{LOCK}{os.environ.get('LOCAL_RANK', '')}")


def _wait_for(file: Path) -> AbstractContextManager[BaseFileLock]:
    """Hold a lock, which the system releases when its process is killed."""
    try:
        return FileLock(file).acquire(timeout=_PATIENCE_S)
    except Timeout:
        raise ShadowlitError(
            f"a training of an earlier command is still running in {file.parent} after {_PATIENCE_S:.0f} s. Wait "
            f"until it has ended, or end it (fuser {file} shows its process), and start the same command again."
        ) from None


def changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return what differs between the identities of two studies, ``model.lr 0.001 → 0.002``, separated by commas; empty
    if nothing does.

    A configuration is compared by its content, and by its hash where an earlier version has kept no more.
    """
    found = masked(found)  # earlier versions wrote secrets
    unused = "config" if "content" in found else "content"
    old, new = ({key: value for key, value in each.items() if key != unused} for each in (found, wanted))
    return ", ".join(_changed(old, new))


def _changed(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted(old.keys() | new.keys()):
            # Keys of the configuration are those of the user; of overrides too, which are dotted.
            inner = name if key in ("", "content", "overrides") else f"{key}.{name}"
            yield from _changed(old.get(name), new.get(name), inner)
    elif key == "config":
        yield "the configuration's file"
    else:
        yield f"{key} {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
