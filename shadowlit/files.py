"""Files and folders that are written atomically: a reader finds a complete one or none."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

_PARTIAL = ".partial"
_ABANDONED_S = 3600.0  # nothing that is written here takes so long: whoever began it was killed


@contextmanager
def written_beside(file: Path) -> Iterator[Path]:
    """Yield a path ``<file>.<random>.partial`` to write to, which replaces the file when the block ends without error.

    Its content is on the disk before it is renamed: a power cut can't leave an empty file. Every writer has a path of
    its own, so that several may write the same file at once: the last one's stays. Folders are made as needed. After an
    exception the partial file is removed, and the old file stays. A killed writer leaves its partial file behind; the
    next writer of the same file removes it once it is an hour older than its own.

    Raises:
        OSError: The folder can't be made, the file not renamed, or it is a folder, which stays.
    """
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(file)
    try:
        yield partial
        put_in_place(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(target: Path) -> Path:
    """Return a path of its own next to ``target``, and so on the same file system, to write to before
    :func:`install`.
    """
    return target.with_name(f"{target.name}.{secrets.token_hex(8)}{_PARTIAL}")


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a complete file, or a folder of flushed files, into place, durably; errors are as of :func:`install`."""
    sync(partial)
    install(partial, target)
    sync(target.parent)


def install(partial: Path, target: Path) -> None:
    """Rename a file or folder into place.

    A file replaces a file in one operation. Where one of the two is a folder, the old one is first renamed to a
    :func:`partial_path` and then removed: a kill between the two renames leaves both, complete, next to each other.

    Raises:
        OSError: It can't be renamed.
    """
    _remove_abandoned(target, partial)
    old = partial_path(target)
    if (target.is_dir() or partial.is_dir()) and os.path.lexists(target):
        target.rename(old)
    partial.replace(target)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; a folder is renamed first, so that no half of it keeps its name."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(_PARTIAL):
            path = path.rename(partial_path(path))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk; on Windows folders can't be synced."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(file: Path, text: str) -> Path:
    """Write ``text`` as UTF-8 atomically; return ``file``.

    Raises:
        OSError: It can't be written; the old file is still there.
    """
    with written_beside(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


def require_writable(folder: Path) -> Path:
    """Try whether files can be made in ``folder``; return it, or the nearest folder above it that exists.

    Nothing is left there: a folder of a random name is made and removed again.

    Raises:
        OSError: They can't, or the path leads through a file.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    probe = existing / f".{secrets.token_hex(8)}.partial"
    try:
        probe.mkdir()
    finally:  # a signal may arrive at any time
        with suppress(OSError):
            probe.rmdir()
    return existing


def _remove_abandoned(file: Path, own: Path) -> None:
    """Remove what killed writers of the file have left; times are compared by the clock of the file system alone."""
    now = own.stat().st_mtime
    for other in file.parent.glob(f"{glob.escape(file.name)}.*{_PARTIAL}"):
        try:
            if now - other.stat().st_mtime > _ABANDONED_S:
                remove(other)
        except FileNotFoundError:  # its writer has renamed it meanwhile
            continue


def unused(file: Path) -> Path:
    """Return the file if there is none yet, else the first of ``<stem>-v1``, ``<stem>-v2`` and so on, as of
    checkpoints.
    """
    numbered = (file.with_stem(f"{file.stem}-v{number}") for number in count(1))
    return next(one for one in chain([file], numbered) if not one.exists())
