"""Files of rows that are text: comma- or tab-separated tables and lines, compressed or not.

Every value is read as the text that the file has; types aren't guessed, so that the answer "007" or "NA" stays one.
"""

from __future__ import annotations

import csv
import io
import lzma
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from shadowlit.errors import DataError, first_line

COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4", ".xz")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_FIELD = 2**31 - 1  # characters; the default of 131,072 is shorter than many documents


def kind_of(path: Path) -> str:
    """Return the extension of a file without that of its compression, in lower case: ``.jsonl`` of ``a.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed as its extension says.

    Raises:
        OSError: It can't be opened. Reading raises it as well, e.g. where the compressed stream is incomplete.
    """
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        return path.open("rb")
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="detect")))


def is_text_table(path: Path) -> bool:
    """Return whether :func:`read_text_table` reads a file with this name."""
    return kind_of(path) in (".txt", *_DELIMITERS)


def read_text_table(source: str, path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Yield the 1-based line and the columns of every row; a line of a ``.txt`` file is a row ``{"text": …}``.

    Blank lines are skipped. A row with another number of fields than the header is yielded as an error.

    Raises:
        DataError: The file isn't UTF-8, its quotes aren't closed, or its header is missing or names a column twice.
    """
    kind = kind_of(path)
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as stream:
            if kind in _DELIMITERS:
                yield from _separated(source, stream, _DELIMITERS[kind])
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, {"text": line.rstrip("\r\n")}
    except UnicodeDecodeError as error:
        wide = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")  # the mark with which UTF-16 begins
        found = "UTF-16 text" if wide else f"not UTF-8: byte 0x{error.object[error.start]:02x}"
        command = f"iconv -f {'UTF-16' if wide else 'latin1'} -t utf-8 {shlex.quote(str(path))} > rows{kind}"
        raise DataError(f"{source} is {found}; expected UTF-8. Convert it, e.g. `{command}`.") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{source} can't be read ({first_line(error)}). Write it again.") from None


def _separated(source: str, stream: Any, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        yield from _rows(source, reader, delimiter)
    except csv.Error as error:
        raise DataError(
            f"{source} is not a table in line {reader.line_num}: {error}. A field that begins with a double quote ends "
            "with one, and the quotes within it are doubled. Correct the row."
        ) from None


def _rows(source: str, reader: Any, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    header: list[str] = next(reader, [])
    if not all(name.strip() for name in header) or len(set(header)) < len(header):
        raise DataError(
            f"{source} has the header {', '.join(header) or '(empty)'}; expected a different name for every column in "
            "the first line. Correct it."
        )
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            yield (
                reader.line_num,
                DataError(
                    f"has {len(row)} fields, and the header {len(header)} ({', '.join(header)}). Correct the row; a "
                    f"field with {delimiter!r} or a line break is enclosed in double quotes."
                ),
            )
            continue
        yield reader.line_num, dict(zip(header, row, strict=True))
