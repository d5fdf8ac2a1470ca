"""Reads files and hub data sets into conversations; every error names the file, the row and the remedy.

JSON is parsed here rather than by ``datasets``, whose reader has no line numbers and refuses rows with different keys.
A source that is read as a whole is held in memory; a stream holds one row at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from shadowlit.data.conversation import Conversation, collect, located, place
from shadowlit.data.custom_formats import find_format
from shadowlit.data.formats import Samples, check_columns, convert_row, detect_format, unused_columns
from shadowlit.data.images import locate
from shadowlit.data.preference_formats import add_next_answers, convert_labelled, convert_pair, require_columns
from shadowlit.errors import DataError, counted, first_line

EXTENSIONS = (".json", ".jsonl", ".ndjson", ".parquet")

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
        log: Function that receives messages about the source, and whether each is a warning.

    Raises:
        DataError: The source can't be read, has no rows or the wrong columns, or rows are malformed; up to five
            of those are listed. Or there is no such format.
    """
    rows = read_rows(source, use)
    if not rows:
        raise DataError(f"{source} has no rows. Give a file with at least one sample.")
    # The columns of one row may be missing in another, which is that row's error and not the file's.
    first = next((row.content for row in rows if isinstance(row.content, dict)), {})
    if samples == "conversations" or prompts_only:
        return collect(_converter(source, first, format, prompts_only, log), rows)
    custom = find_format(format)
    if custom is None:
        require_columns(first, samples, source)

    def convert(row: Row) -> Conversation:
        columns = row.columns if custom is None else custom.preference_row(row.columns, samples)
        if samples == "pairs":
            chosen, rejected = convert_pair(columns)
            return Conversation(chosen, source, row.index, row.line, other=rejected)
        prompt, answer, label = convert_labelled(columns)
        return Conversation(prompt + answer, source, row.index, row.line, other=prompt, desirable=label)

    found = collect(convert, rows)
    return add_next_answers(found) if samples == "labels" else found


def stream_conversations(source: str, format: str = "auto", *, use: str = "train") -> Iterator[Conversation]:
    """Yield the rows of a file or a hub data set, and hold only one of them at a time.

    Arguments are as for :func:`read_conversations`, but a ``.json`` file must not be one list.

    Raises:
        DataError: The source can't be read, or the next row is malformed. Or there is no such format.
    """
    convert: Callable[[Row], Conversation] | None = None
    for row in stream_rows(source, use):
        if convert is None:
            columns = row.content if isinstance(row.content, dict) else {}
            convert = _converter(source, columns, format, False, lambda text, is_warning: None)
        with located(row):
            conversation = convert(row)
        yield conversation


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


def read_rows(source: str, use: str) -> list[Row]:
    """Read all rows without conversion; ``source`` and ``use`` are as in :func:`read_conversations`.

    Raises:
        DataError: The source can't be read, or lines are broken JSON.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{source} is empty. Give a file with at least one sample.")
    return _read_json(source, path) if _is_json(path) else list(_rows_of_table(source, use, streaming=False))


def stream_rows(source: str, use: str) -> Iterator[Row]:
    """Yield the rows without conversion; ``source`` and ``use`` are as in :func:`read_conversations`.

    Raises:
        DataError: The source can't be streamed, or a line is broken JSON.
    """
    path = Path(source).expanduser()
    return _stream_json(source, path) if _is_json(path) else _rows_of_table(source, use, streaming=True)


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


def _read_json(source: str, path: Path) -> list[Row]:
    with _named_by_content(source, path):
        lines = list(_lines(source, path))
        if not lines or not lines[0].content.lstrip().startswith("["):
            return collect(_parse, lines)
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() != ".json":
            return collect(_parse, lines)
        at = f" in line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{source} is broken JSON{at}: {_reason(error)}. Correct it; a .json file holds a list of objects, or one "
            "object per line."
        ) from None
    return [Row(source, index, None, content) for index, content in enumerate(contents)]


def _stream_json(source: str, path: Path) -> Iterator[Row]:
    with _named_by_content(source, path):
        for line in _lines(source, path):
            if line.index == 0 and line.content.lstrip().startswith("["):
                raise DataError(
                    f"{source} is one JSON list, which has to be read as a whole. Write one object per line, or set "
                    "data.streaming=false."
                )
            with located(line):
                row = _parse(line)
            yield row


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
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
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
    with path.open("rb") as stream:  # as text, lines would also end at characters that JSON strings may hold
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


def _parse(row: Row) -> Row:
    """The row with its content parsed, which was a line of text."""
    try:
        return replace(row, content=json.loads(row.content))
    except (ValueError, RecursionError) as error:
        at = f" in column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"is broken JSON: {_reason(error)}{at}. Correct or remove the line; each line holds one whole object."
        ) from None


def _reason(error: Exception) -> str:
    """Why a text is no JSON that can be read."""
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


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
        raise DataError(f"{source} is no readable Parquet file{told} ({first_line(error)}). {remedy}") from None


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
