"""Who may work in a study's folder: one process at a time, and trainings of one recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def held(file: Path) -> Iterator[bool]:
    """Hold a lock while the block runs, without waiting for it; yields False if another process holds it.

    The system releases the lock of a process that was killed.
    """
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The names of what differs between the identities of two studies, separated by commas; empty if nothing does."""
    return ", ".join(sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)))
