"""Reads files and hub data sets into conversations; every error names the file, the row and the remedy.

JSON is parsed here rather than by ``datasets``, whose reader has no line numbers and refuses rows with different keys.
A source that is read as a whole is held in memory; a stream holds one row at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from shadowlit.data.conversation import Conversation, Skip, collect, each, place
from shadowlit.data.custom_formats import find_format
from shadowlit.data.formats import Samples, check_columns, convert_row, detect_format, unused_columns
from shadowlit.data.images import locate
from shadowlit.data.preference_formats import add_next_answers, convert_labelled, convert_pair, require_columns
from shadowlit.errors import DataError, first_line

EXTENSIONS = (".json", ".jsonl", ".ndjson", ".parquet")

_ROWS_READ = 1024  # of a Parquet file at a time
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?(:(?P<split>.+))?")


def log_message(text: str, is_warning: bool) -> None:
    """Log or warn, on rank zero."""
    (rank_zero_warn if is_warning else rank_zero_info)(text)


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
            DataError: The row is no object.
        """
        if not isinstance(self.content, dict):
            raise DataError(f"is no object but {type(self.content).__name__}. Write it as {{...}} or remove it.")
        return self.content


def read_conversations(
    source: str,
    format: str = "auto",
    *,
    use: str = "train",
    prompts_only: bool = False,
    samples: Samples = "conversations",
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    max_rows: int | None = None,
    skip: Skip | None = None,
    log: Callable[[str, bool], None] = log_message,
) -> list[Conversation]:
    """Read all rows of a file or a hub data set.

    Args:
        source: ``.json`` (a list of objects, or one object per line), ``.jsonl``, ``.parquet``, a folder that
            ``datasets`` can read, or a hub data set ``org/name[/config][@revision][:split]``.
        format: ``auto``, or a format as in :func:`shadowlit.data.custom_formats.find_format`.
        use: ``train``, ``validation`` or ``test``: the split of a folder or hub data set where none is named.
        prompts_only: Accept rows without an answer.
        samples: Kind of sample in a row: a conversation, or a pair or labelled answer, whose built-in format is
            always detected.
        columns: Names that the source has for columns of the format, by the format's names.
        ignore: Columns and fields of turns that are left out.
        max_rows: Number of rows that are read, from the beginning; None for all.
        skip: Function that receives the message of each malformed row, which is then left out; None raises them.
        log: Function that receives messages about the source, and whether each is a warning.

    Raises:
        DataError: The source can't be read, has no rows or the wrong columns, or rows are malformed; up to five
            of those are listed. Or there is no such format.
    """
    rows = read_rows(source, use, max_rows, skip)
    if not rows and skip is None:
        raise DataError(f"{source} has no rows. Give a file with at least one sample.")
    # The columns of one row may be missing in another, which is that row's error and not the file's.
    first = next((row.content for row in rows if isinstance(row.content, dict)), {})
    if samples == "conversations" or prompts_only:
        return collect(_converter(source, first, format, prompts_only, log), rows, skip) if rows else []
    custom = find_format(format)
    if custom is None and rows:
        require_columns(first, samples, source)

    def convert(row: Row) -> Conversation:
        columns = row.columns if custom is None else custom.preference_row(row.columns, samples)
        if samples == "pairs":
            chosen, rejected = convert_pair(columns)
            return Conversation(chosen, source, row.index, row.line, other=rejected)
        prompt, answer, label = convert_labelled(columns)
        return Conversation(prompt + answer, source, row.index, row.line, other=prompt, desirable=label)

    found = collect(convert, rows, skip)
    return add_next_answers(found) if samples == "labels" and found else found


def stream_conversations(
    source: str,
    format: str = "auto",
    *,
    use: str = "train",
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    max_rows: int | None = None,
    skip: Skip | None = None,
) -> Iterator[Conversation]:
    """Yield the rows of a file or a hub data set, and hold only one of them at a time.

    Arguments are as for :func:`read_conversations`, but a ``.json`` file must not be one list.

    Raises:
        DataError: The source can't be read, or the next row is malformed. Or there is no such format.
    """
    rows = stream_rows(source, use, max_rows, skip)
    first = next(rows, None)
    if first is not None:
        columns_of_first = first.content if isinstance(first.content, dict) else {}
        convert = _converter(source, columns_of_first, format, False, lambda text, is_warning: None)
        yield from each(convert, chain([first], rows), skip)


def _converter(
    source: str, first: dict[str, Any], format: str, prompts_only: bool, log: Callable[[str, bool], None]
) -> Callable[[Row], Conversation]:
    """A function that turns a row of a source, whose first row has the columns ``first``, into a conversation."""
    custom = find_format(format)
    if custom is None:
        if format == "auto":
            format = detect_format(first, source=source, prompts_only=prompts_only)
        else:
            check_columns(first, format, source=source, prompts_only=prompts_only)
        if unused := unused_columns(first, format):
            log(f"data: {source} is read as {format}; columns not used: {', '.join(unused)}", False)
    to_messages = partial(convert_row, format=format) if custom is None else custom.convert
    if first.get("tools"):
        log(f"data: {source} has a column 'tools'; tool definitions don't reach the chat template.", True)
    folder = folder_of(source)

    def convert(row: Row) -> Conversation:
        messages = locate(to_messages(row.columns, prompts_only=prompts_only), folder)
        return Conversation(messages, source, row.index, row.line)

    return convert


def folder_of(source: str) -> Path:
    """The folder to which the paths in a source are relative: its own."""
    return (_folder_of(source)[0] or Path(source).expanduser().parent).absolute()


def digest_source(source: str, use: str) -> str | None:
    """A hash of the content of a source, without reading its rows; None where there is none or it can't be read.

    It is a hash of a file's bytes, or the fingerprint that ``datasets`` has for a folder or hub data set. ``source``
    and ``use`` are as in :func:`read_conversations`.
    """
    path = Path(source).expanduser()
    try:
        if path.is_file():
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        return getattr(_open(source, use), "_fingerprint", None)
    except (DataError, OSError):
        return None


def is_remote(source: str) -> bool:
    """Whether ``source`` has to be fetched from the hub."""
    return not Path(source).expanduser().exists() and not _looks_local(source) and not _folder_of(source)[0]


def read_rows(source: str, use: str, max_rows: int | None = None, skip: Skip | None = None) -> list[Row]:
    """Read all rows without conversion; arguments are as in :func:`read_conversations`.

    Raises:
        DataError: The source can't be read, or lines are broken JSON.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{source} is empty. Give a file with at least one sample.")
    if _is_json(path):
        return _read_json(source, path, max_rows, skip)
    return list(islice(_rows_of_table(source, use, streaming=False), max_rows))


def stream_rows(source: str, use: str, max_rows: int | None = None, skip: Skip | None = None) -> Iterator[Row]:
    """Yield the rows without conversion; arguments are as in :func:`read_conversations`.

    Raises:
        DataError: The source can't be streamed, or a line is broken JSON.
    """
    path = Path(source).expanduser()
    if _is_json(path):
        return each(_parse, islice(_streamable_lines(source, path), max_rows), skip)
    return islice(_rows_of_table(source, use, streaming=True), max_rows)


def _is_json(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".json", ".jsonl", ".ndjson")


def _rows_of_table(source: str, use: str, streaming: bool) -> Iterator[Row]:
    """Yield the rows of a Parquet file, a folder or a hub data set."""
    path = Path(source).expanduser()
    if not path.is_file():
        data = _open(source, use, streaming)
    elif path.suffix.lower() == ".parquet":
        data = _read_parquet(source, path)
    else:
        raise DataError(
            f"{source} has the extension '{path.suffix}'; expected one of {', '.join(EXTENSIONS)}. "
            "Convert the file, or rename it if it is one of these."
        )
    for index, columns in enumerate(data):
        yield Row(source, index, None, columns)


def _looks_local(source: str) -> bool:
    path = Path(source)
    if path.suffix.lower() in (*EXTENSIONS, ".csv", ".txt", ".gz", ".zst") or source.startswith((".", "/", "~")):
        return True
    return _HUB.fullmatch(source) is None


def _folder_of(source: str) -> tuple[Path | None, str | None]:
    """The local folder that ``source`` names, and the split that may follow a colon."""
    for name, split in ((source, None), source.rsplit(":", 1) if ":" in source else (source, None)):
        if (path := Path(name).expanduser()).is_dir():
            return path, split
    return None, None


def _read_json(source: str, path: Path, max_rows: int | None, skip: Skip | None) -> list[Row]:
    lines = list(islice(_lines(source, path), max_rows))
    if path.suffix.lower() != ".json" or not lines or not lines[0].content.lstrip().startswith("["):
        return collect(_parse, lines, skip)
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source} is broken JSON in line {error.lineno}, column {error.colno}: {error.msg}. Correct it; "
            "a .json file holds a list of objects, or one object per line."
        ) from None
    return [Row(source, index, None, content) for index, content in enumerate(contents[:max_rows])]


def _streamable_lines(source: str, path: Path) -> Iterator[Row]:
    for line in _lines(source, path):
        if line.index == 0 and line.content.lstrip().startswith("["):
            raise DataError(
                f"{source} is one JSON list, which has to be read as a whole. Write one object per line, or set "
                "data.streaming=false."
            )
        yield line


def _lines(source: str, path: Path) -> Iterator[Row]:
    """Yield the lines of a file that aren't blank; their content is text."""
    index = 0
    with path.open("rb") as stream:  # as text, lines would also end at characters that JSON strings may hold
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{source} is not UTF-8: byte 0x{line[error.start]:02x} in line {number}. Convert it, "
                    f"e.g. `iconv -f latin1 -t utf-8 {source}`."
                ) from None
            if text:
                yield Row(source, index, number, text)
                index += 1


def _parse(row: Row) -> Row:
    """The row with its content parsed, which was a line of text."""
    try:
        return replace(row, content=json.loads(row.content))
    except json.JSONDecodeError as error:
        raise DataError(
            f"is broken JSON: {error.msg} in column {error.colno}. Correct or remove the line; each line holds one "
            "whole object."
        ) from None


def _read_parquet(source: str, path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_READ):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} is no readable Parquet file ({first_line(error)}). Write it again.") from None


def _open(source: str, use: str, streaming: bool = False) -> Any:
    """A folder or a hub data set, as ``datasets`` opens it."""
    folder, split = _folder_of(source)
    if folder:
        return _open_folder(source, folder, split, use, streaming)
    if _looks_local(source):
        parent = Path(source).expanduser().absolute().parent
        raise DataError(f"{source} does not exist (looked in {parent}). Correct the path.")
    return open_hub(source, use, streaming)


def _open_folder(source: str, folder: Path, split: str | None, use: str, streaming: bool) -> Any:
    import datasets

    try:
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(folder))  # mapped into memory, and read where it is used
        else:
            data = datasets.load_dataset(str(folder), streaming=streaming)
    except Exception as error:
        raise DataError(
            f"the folder {source} is no data set that can be read ({first_line(error)}). Name a file, or a folder "
            "of Parquet or JSONL files."
        ) from error
    return _choose_split(source, data, split, use)


def open_hub(source: str, use: str, streaming: bool = False) -> Any:
    """A hub data set, downloaded into the local cache unless it is streamed.

    Raises:
        DataError: It can't be read, or has no such split.
    """
    import datasets

    parts = _HUB.fullmatch(source)
    assert parts is not None
    try:
        data = datasets.load_dataset(
            parts["repo"], name=parts["config"], revision=parts["revision"], streaming=streaming
        )
    except Exception as error:  # hub, network and parsing errors share no base class
        raise DataError(
            f"the data set '{source}' can't be read from the hub, and there is no such file ({first_line(error)}). "
            "Expected a file, a folder or org/name[/config][@revision][:split]; correct the name, or without "
            "network give a local file."
        ) from error
    return _choose_split(source, data, parts["split"], use)


def _choose_split(source: str, data: Any, split: str | None, use: str) -> Any:
    """The named split; without a name the only one, or the one named like its use."""
    if not isinstance(data, dict):
        return data
    names = list(data)
    if split is None:
        split = names[0] if len(names) == 1 else use
    if split not in names:
        raise DataError(
            f"the data set '{source}' has the splits {', '.join(names)}, and no '{split}'. Name one after a colon, "
            f"e.g. '{source.split(':')[0]}:{names[0]}'."
        )
    return data[split]
