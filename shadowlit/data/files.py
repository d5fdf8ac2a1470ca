"""Files of rows: JSON, Parquet, tables and lines of text, compressed or not; every error names the file and the remedy.

JSON is parsed here rather than by ``datasets``, whose reader has no line numbers and refuses rows with different keys.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from lzma import LZMAError
from pathlib import Path
from typing import Any, BinaryIO

from shadowlit.data.conversation import Skip, collect, each, place
from shadowlit.data.formats import detect_format
from shadowlit.data.tables import COMPRESSIONS, is_text_table, kind_of, open_bytes, read_text_table
from shadowlit.errors import DataError, counted, first_line

JSON_EXTENSIONS = (".json", ".jsonl", ".ndjson")
EXTENSIONS = (*JSON_EXTENSIONS, ".parquet", ".csv", ".tsv", ".txt")

_ROWS_READ = 1024  # of a Parquet file at a time
_HEAD_BYTES = 2**26  # of a file that can't be read, to find out what it is
_MAGIC = (  # how files begin that aren't text, what they are, and what to do
    (b"\x1f\x8b", "compressed by gzip", "Decompress it into another file: `gzip -dc {} > FILE`."),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "Decompress it into another file: `zstd -dc {} > FILE`."),
    (b"\xfd7zXZ\0", "compressed by xz", "Decompress it into another file: `xz -dc {} > FILE`."),
    (b"BZh", "compressed by bzip2", "Decompress it into another file: `bzip2 -dc {} > FILE`."),
    (b"PK\x03\x04", "a zip archive", "Unpack it, and give the file in it."),
    (b"PAR1", "a Parquet file", "Rename it to *.parquet."),
    (b"ARROW1", "an Arrow file", "Give the folder that 'save_to_disk' wrote, or write the rows as Parquet."),
    (b"version https://git-lfs", "a pointer of Git LFS, not the data", "Fetch the data with `git lfs pull`."),
    (b"<", "a page of HTML or XML", "Download the file itself, not the page that shows it."),
    (b"\0" * 16, "filled with zero bytes from its start", "Copy or download it again."),
)


@dataclass(frozen=True)
class Row:
    """A row as it was read: an object with named columns, unless the file is malformed; see :class:`Conversation`."""

    source: str
    index: int
    line: int | None
    content: Any

    def __str__(self) -> str:
        """``sample 17 of train.jsonl (line 18)``."""
        return place(self.source, self.index, self.line)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns by name.

        Raises:
            DataError: The row is not an object.
        """
        if not isinstance(self.content, dict):
            raise DataError(f"is not an object but {type(self.content).__name__}. Write it as {{...}} or remove it.")
        return self.content


def is_file_of_rows(path: Path) -> bool:
    """Return whether this is a name of a file that can be read, existing or not."""
    return kind_of(path) in EXTENSIONS or path.suffix.lower() in COMPRESSIONS


def read_file(source: str, path: Path, max_rows: int | None = None, skip: Skip | None = None) -> list[Row]:
    """Read the rows of a file.

    Args:
        source: Name of the file for messages.
        path: File; its extension, before that of a compression, says how it is read.
        max_rows: Number of rows that are read, from the beginning; None for all.
        skip: Function that receives the message of each row that can't be read, which is then left out; None raises
            them.

    Raises:
        DataError: The file is empty or can't be read, or rows can't be read; up to five are listed.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty. Give a file with at least one sample.")
    if _is_json(path):
        return _read_json(source, path, max_rows, skip)
    return collect(_sound, islice(_rows_of_table(source, path), max_rows), skip)


def stream_file(source: str, path: Path, max_rows: int | None = None, skip: Skip | None = None) -> Iterator[Row]:
    """Yield the rows of a file, and hold one at a time; as :func:`read_file`, but a JSON file must not be one list."""
    if _is_json(path):
        yield from _stream_json(source, path, max_rows, skip)
    else:
        yield from each(_sound, islice(_rows_of_table(source, path), max_rows), skip)


def _rows_of_table(source: str, path: Path) -> Iterator[Row]:
    if is_text_table(path):
        for index, (line, columns) in enumerate(read_text_table(source, path)):
            yield Row(source, index, line, columns)
    elif path.suffix.lower() == ".parquet":
        for index, columns in enumerate(_read_parquet(source, path)):
            yield Row(source, index, None, columns)
    else:
        raise DataError(
            f"{source} has the extension '{path.suffix}'; expected one of {', '.join(EXTENSIONS)}, except for "
            f".parquet also compressed ({', '.join(COMPRESSIONS)}). Convert the file, or rename it if it is one of "
            "these."
        )


def _sound(row: Row) -> Row:
    """The row, unless it couldn't be read."""
    if isinstance(row.content, DataError):
        raise row.content
    return row


def _is_json(path: Path) -> bool:
    return kind_of(path) in JSON_EXTENSIONS


def _read_json(source: str, path: Path, max_rows: int | None, skip: Skip | None) -> list[Row]:
    with _named_by_content(source, path):
        lines = list(islice(_lines(source, path), max_rows))
        if not lines or not lines[0].content.lstrip().startswith("["):
            return collect(_parse, lines, skip)
    try:
        with _readable(source, path) as stream:
            contents = json.loads(stream.read().decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if kind_of(path) != ".json":
            return collect(_parse, lines, skip)
        at = f" in line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{source} is broken JSON{at}: {_reason(error)}. Correct it; a .json file holds a list of objects, or one "
            "object per line."
        ) from None
    return [Row(source, index, None, content) for index, content in enumerate(contents[:max_rows])]


def _stream_json(source: str, path: Path, max_rows: int | None, skip: Skip | None) -> Iterator[Row]:
    with _named_by_content(source, path):
        for line in islice(_lines(source, path), max_rows):
            if line.index == 0 and line.content.lstrip().startswith("["):
                raise DataError(
                    f"{source} is one JSON list, which has to be read as a whole. Write one object per line, or set "
                    "data.streaming=false."
                )
            yield from each(_parse, [line], skip)


@contextmanager
def _named_by_content(source: str, path: Path) -> Iterator[None]:
    """Replace an error about a line or a byte by one about the whole file, if its beginning shows what it really is."""
    try:
        yield
    except DataError:
        if found := _content_of(path):
            kind, remedy = found
            raise DataError(f"{source} is {kind}; expected JSON in UTF-8, one object per line. {remedy}") from None
        raise


def _content_of(path: Path) -> tuple[str, str] | None:
    """What a file is that should be JSON lines, and what to do; None if it begins as they do."""
    try:
        with open_bytes(path) as stream:
            head = stream.read(_HEAD_BYTES)
    except (OSError, EOFError, LZMAError):  # a damaged compressed file
        return None
    file = shlex.quote(str(path))
    for magic, kind, remedy in _MAGIC:
        if head.lstrip().startswith(magic):
            return kind, remedy.format(file)
    encoding = json.detect_encoding(head)
    if not encoding.startswith("utf-8"):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        return f"{name[:6]} text", f"Convert it: `iconv -f {name} -t UTF-8 {file} > rows.jsonl`."
    text = head.decode("utf-8-sig", errors="ignore").lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        value, end = {}, 2 if text.startswith("{\n") else 0
    num_lines = text.count("\n", 0, end) + 1
    if not text.startswith("{") or num_lines == 1:
        return None
    kind, choice = f"one JSON object over {num_lines if value else 'many'} lines", "."
    kind += ", followed by more" if text[end:].strip() and value else ""
    for key, rows in value.items():
        if _are_rows(rows):
            kind, choice = f"{kind}, with {counted(len(rows), 'row')} in {key!r}", f".[{json.dumps(key)}][]"
            break
    return kind, f"Write each row on a line of its own: `jq -c {shlex.quote(choice)} {file} > rows.jsonl`."


def _are_rows(value: Any) -> bool:
    """Whether a value in a row is a list of rows itself."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    try:
        return bool(detect_format(value[0], source="", prompts_only=True))
    except DataError:
        return False


def _lines(source: str, path: Path) -> Iterator[Row]:
    """Yield the lines of a file that aren't blank; their content is text."""
    index = 0
    with _readable(source, path) as stream:  # as text, lines would also end at characters that JSON strings may hold
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{source} is not UTF-8: byte 0x{line[error.start]:02x} in line {number}. Convert it, "
                    f"e.g. `iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > rows.jsonl`."
                ) from None
            if text:
                yield Row(source, index, number, text)
                index += 1


@contextmanager
def _readable(source: str, path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed; errors of reading name the file."""
    try:
        with open_bytes(path) as stream:
            yield stream
    except (OSError, EOFError, LZMAError) as error:
        raise DataError(f"{source} can't be read ({first_line(error)}). Copy or write it again.") from None


def _parse(row: Row) -> Row:
    """The row with its content parsed, which was a line of text."""
    try:
        return replace(row, content=json.loads(row.content, object_pairs_hook=_unique))
    except (ValueError, RecursionError) as error:
        at = f" in column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"is broken JSON: {_reason(error)}{at}. Correct or remove the line; each line holds one whole object."
        ) from None


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose keys is there twice: the parser would keep the last value alone."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _TwiceError(f"the key {twice!r} is there twice in one object")
    return content


def _reason(error: Exception) -> str:
    """Why a text is not JSON that can be read."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return str(error) if isinstance(error, _TwiceError) else first_line(error)


def _read_parquet(source: str, path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_READ):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        with path.open("rb") as stream:
            is_json = stream.read(1) in (b"{", b"[")
        kind, remedy = _content_of(path) or (("JSON", "Rename it to *.jsonl.") if is_json else ("", "Write it again."))
        told = f" but {kind}" if kind else ""
        raise DataError(f"{source} is not a readable Parquet file{told} ({first_line(error)}). {remedy}") from None
