"""Single files that are there complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(file: Path) -> Iterator[Path]:
    """Yield the path ``<file>.partial`` to write to, which takes the file's place when the block ends well.

    Folders are made as needed. After an exception the partial file is removed, and what was there before stays.

    Raises:
        OSError: The folder can't be made or the file not renamed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(file: Path, text: str) -> Path:
    """Write ``text`` as UTF-8 in one step; return ``file``.

    Raises:
        OSError: It can't be written; what was there before is still there.
    """
    with written_beside(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file
