"""Reads files, folders and hub data sets into conversations; every error names the file, the row and the remedy.

A source that is read as a whole is held in memory; a stream holds one row at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from shadowlit.data.contexts import COLUMN, context_of
from shadowlit.data.conversation import Conversation, Skip, collect, each, located
from shadowlit.data.custom_formats import CustomFormat, find_format
from shadowlit.data.files import Row, is_file_of_rows, read_file, stream_file
from shadowlit.data.formats import (
    FORMATS,
    Samples,
    check_columns,
    convert_row,
    detect_format,
    rename,
    unread_text,
    without_ignored,
    without_ignored_fields,
)
from shadowlit.data.images import locate
from shadowlit.data.preference_formats import (
    PREFERENCES,
    add_next_answers,
    convert_labelled,
    convert_pair,
    read_columns,
    require_columns,
)
from shadowlit.data.tables import is_text_table
from shadowlit.data.turns import Message, listed, read_tools
from shadowlit.errors import DataError, first_line
from shadowlit.pair.hub import unreachable

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?(:(?P<split>.+))?")
_TRIED = 100  # rows that may be wrong before the first one with the columns of a format
_ANSWERS = {"chosen", "rejected"}
Log = Callable[[str, bool], None]


def log_message(text: str, is_warning: bool) -> None:
    """Log or warn, on rank zero."""
    (rank_zero_warn if is_warning else rank_zero_info)(text)


def read_conversations(
    source: str,
    format: str = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    use: str = "train",
    prompts_only: bool = False,
    samples: Samples = "conversations",
    strict: bool = True,
    max_rows: int | None = None,
    skip: Skip | None = None,
    log: Log = log_message,
) -> list[Conversation]:
    """Read all rows of a file or a hub data set.

    Args:
        source: ``.json`` (a list of objects, or one object per line), ``.jsonl``, ``.csv``, ``.tsv``, ``.txt`` (a
            document per line), these compressed, or ``.parquet``; a folder that ``datasets`` can read; or a hub data
            set ``org/name[/config][@revision][:split]``.
        format: ``auto``, or a format as in :func:`shadowlit.data.custom_formats.find_format`.
        columns: Names that the source has for columns of the format, by the format's names.
        ignore: Columns and fields of turns that are left out; see :func:`shadowlit.data.formats.without_ignored`.
        use: ``train``, ``validation`` or ``test``: the split of a folder or hub data set where none is named.
        prompts_only: Accept rows without an answer.
        samples: Kind of sample in a row: a conversation, or a pair or labelled answer, whose built-in format is
            always detected. A conversation's context is read from training data only, and no matter elsewhere.
        strict: Raise if a column has text that reaches no turn, instead of logging it.
        max_rows: Number of rows that are read, from the beginning; None for all.
        skip: Function that receives the message of each malformed row, which is then left out; None raises them.
        log: Function that receives messages about the source, and whether each is a warning.

    Raises:
        DataError: The source can't be read, has no rows or the wrong columns, or rows are malformed; up to five
            of those are listed. Or there is no such format.
    """
    wrong: list[str] = []
    rows = read_rows(source, use, max_rows, skip and wrong.append)
    if not rows and not wrong:
        raise DataError(f"{source} has no rows. Give a file with at least one sample.")
    names = {name for row in rows if isinstance(row.content, dict) for name in row.content}
    reader = _Reader(source, format, dict(columns or {}), ignore, prompts_only, samples, use == "train")
    _prepare(reader, rows, names, log, skip)
    found = collect(reader.convert, rows, skip and wrong.append)
    if skip is not None:
        for message in wrong:
            skip(message)
    if reader.unread and strict:
        raise DataError(reader.about_unread())
    if reader.unread:
        log(f"data: {reader.about_unread()}", False)
    return add_next_answers(found) if samples == "labels" and not prompts_only and found else found


def stream_conversations(
    source: str,
    format: str = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    use: str = "train",
    max_rows: int | None = None,
    skip: Skip | None = None,
) -> Iterator[Conversation]:
    """Yield the rows of a file or a hub data set, and hold only one of them at a time.

    Arguments are as for :func:`read_conversations`, but a JSON file must not be one list.

    Raises:
        DataError: The source can't be read, or the next row is malformed or has text that reaches no turn. Or there is
            no such format.
    """
    rows = stream_rows(source, use, max_rows, skip)
    reader = _Reader(source, format, dict(columns or {}), ignore)
    looked_at = _prepare(reader, rows, None, lambda text, is_warning: None, skip)
    for conversation in each(reader.convert, chain(looked_at, rows), skip):
        if reader.unread:
            raise DataError(reader.about_unread())
        yield conversation


def _prepare(reader: _Reader, rows: Iterable[Row], names: set[str] | None, log: Log, skip: Skip | None) -> list[Row]:
    """Prepare a reader by the first row with columns, and return the rows that were read for it.

    The columns of one row may be missing in another, which is that row's error and not the file's. So where such rows
    are left out, later rows are tried too. ``names`` are those of all columns; None takes those of the row.
    """
    looked_at: list[Row] = []
    problem: DataError | None = None
    for row in rows:
        looked_at.append(row)
        if isinstance(row.content, dict):
            try:
                reader.prepare(row.content, names or set(row.content), log)
                return looked_at
            except DataError as error:
                problem = problem or error
        if len(looked_at) >= _TRIED or (problem and skip is None):
            break
    if problem is not None:
        raise problem
    if looked_at:
        reader.prepare({}, names or set(), log)  # raises
    return looked_at


@dataclass
class _Reader:
    """Turns the rows of a source into conversations, and notes the columns with text that no turn has."""

    source: str
    format: str
    columns: dict[str, str]
    ignore: Sequence[str]
    prompts_only: bool = False
    samples: Samples = "conversations"
    trains: bool = True
    unread: dict[str, str] = field(default_factory=dict)  # an example of each

    def prepare(self, first: Mapping[str, Any], names: set[str], log: Log) -> None:
        """Find out how rows are read, from the first one and the names of all columns."""
        self._custom: CustomFormat | None = find_format(self.format)
        self._folder = folder_of(self.source)
        self._is_untyped = is_text_table(Path(self.source))
        first = without_ignored(first, self.ignore)
        self._check_mapping(names)
        with located(self.source):
            first = rename(first, self.columns)
        self._read: set[str] = set(first)
        if self._custom is not None:
            return
        if self.samples in PREFERENCES and not self.prompts_only:
            require_columns(first, self.samples, self.source)
            return
        if self.format == "auto":
            self.format, more = detect_format(first, source=self.source, prompts_only=self.prompts_only)
            self.columns |= more
            with located(self.source):
                first = rename(first, more)
            if more:
                log(f"data: {self.source} is read with data.columns={_as_yaml(more)}", False)
        else:
            check_columns(first, self.format, source=self.source, prompts_only=self.prompts_only)
        # The answers to a prompt aren't shown to the model, whatever they are.
        self._read = FORMATS[self.format].columns | (_ANSWERS if self.prompts_only else set())
        if self.samples == "contexts":
            self._read.add(COLUMN)
        unused = sorted(set(first) - self._read)
        if unused:
            log(f"data: {self.source} is read as {self.format}; columns not used: {', '.join(unused)}", False)

    def convert(self, row: Row) -> Conversation:
        """The conversation in a row.

        Raises:
            DataError: The row is malformed. The message doesn't say which row it is.
        """
        columns = rename(without_ignored(row.columns, self.ignore) if self.ignore else row.columns, self.columns)
        if self.samples in PREFERENCES and not self.prompts_only:
            return self._preference(row, columns)
        if self._custom is not None and self.samples == "contexts" and not self.prompts_only:
            columns = self._custom.row_of_two(columns, self.samples)
            messages = convert_row(columns, "messages")
        elif self._custom is not None:
            messages = self._custom.convert(columns, prompts_only=self.prompts_only)
        else:
            messages = convert_row(columns, self.format, prompts_only=self.prompts_only)
            self._note_unread(row, columns, self._read, messages)
        messages, tools = self._finish(columns if self._custom is None else {}, locate(messages, self._folder))
        context = context_of(columns) if self.samples == "contexts" and self.trains else None
        return Conversation(messages, row.source, row.index, row.line, tools, context=context)

    def _finish(self, columns: Mapping[str, Any], messages: list[Message]) -> tuple[list[Message], list[Any] | None]:
        """The messages as the chat template sees them, and the tools."""
        messages, tools = read_tools(columns, messages)
        if self.ignore:
            messages = without_ignored_fields(messages, self.ignore)
            tools = without_ignored({"tools": tools}, self.ignore).get("tools")
        return messages, tools

    def about_unread(self) -> str:
        """What is wrong with the columns that aren't read."""
        names = {theirs: ours for ours, theirs in self.columns.items()}
        shown = ", ".join(f"'{names.get(name, name)}' ({example})" for name, example in self.unread.items())
        return (
            f"{self.source} has columns with content that the model wouldn't see: {shown}. Leave them out with "
            f"data.ignore_columns=[{', '.join(self.unread)}] (or ignore_columns of this source), or name the columns "
            "of the conversation in data.columns."
        )

    def _preference(self, row: Row, columns: dict[str, Any]) -> Conversation:
        if self._custom is not None:
            columns = self._custom.row_of_two(columns, self.samples)
        if self.samples == "pairs":
            messages, other = convert_pair(columns)
            label = None
        else:
            prompt, answer, label = convert_labelled(columns)
            messages, other = prompt + answer, prompt
        if self._custom is None:
            self._note_unread(row, columns, read_columns(columns, self.samples), [*messages, *other])
        messages, tools = self._finish(columns, messages)
        other, of_other = self._finish({}, other)
        if of_other and of_other != tools:
            raise DataError("has tools in a turn of 'rejected' that 'chosen' doesn't have. Write them as a column.")
        return Conversation(messages, row.source, row.index, row.line, tools, other=other, desirable=label)

    def _note_unread(self, row: Row, columns: dict[str, Any], read: set[str], messages: Sequence[Message]) -> None:
        if not read.issuperset(columns):
            for name, text in unread_text(columns, read, messages, untyped=self._is_untyped).items():
                self.unread.setdefault(name, f"{text} in {row}")

    def _check_mapping(self, names: set[str]) -> None:
        missing = [theirs for theirs in self.columns.values() if theirs not in names]
        taken = [ours for ours in self.columns if ours in names and ours not in self.columns.values()]
        if missing:
            raise DataError(
                f"{self.source} has the columns {listed(names)}, without {listed(missing)}, which data.columns names. "
                "Correct data.columns."
            )
        if taken and not all(name not in without_ignored(dict.fromkeys(names), self.ignore) for name in taken):
            raise DataError(
                f"{self.source} has a column {listed(taken)} itself, for which data.columns names another. Remove the "
                f"entry, or add {listed(taken)} to data.ignore_columns."
            )


def folder_of(source: str) -> Path:
    """Return the folder to which the paths in a source are relative: its own."""
    return (_folder_of(source)[0] or Path(source).expanduser().parent).absolute()


def digest_source(source: str, use: str) -> str | None:
    """Return a hash of the content of a source, without reading its rows; None where there is none or it can't be read.

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
    """Return whether ``source`` has to be fetched from the hub."""
    return not Path(source).expanduser().exists() and not _looks_local(source) and not _folder_of(source)[0]


def read_rows(source: str, use: str, max_rows: int | None = None, skip: Skip | None = None) -> list[Row]:
    """Read all rows without conversion; arguments are as in :func:`read_conversations`.

    Raises:
        DataError: The source can't be read, or lines are broken JSON.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(source, path, max_rows, skip)
    return list(islice(_rows_of(source, use, streaming=False), max_rows))


def stream_rows(source: str, use: str, max_rows: int | None = None, skip: Skip | None = None) -> Iterator[Row]:
    """Yield the rows without conversion; arguments are as in :func:`read_conversations`.

    Raises:
        DataError: The source can't be streamed, or a line is broken JSON.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return stream_file(source, path, max_rows, skip)
    return islice(_rows_of(source, use, streaming=True), max_rows)


def _rows_of(source: str, use: str, streaming: bool) -> Iterator[Row]:
    """Yield the rows of a folder or a hub data set."""
    for index, columns in enumerate(_open(source, use, streaming)):
        yield Row(source, index, None, columns)


def _as_yaml(mapping: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{ours}: {theirs}' for ours, theirs in mapping.items())}}}"


def _looks_local(source: str) -> bool:
    if is_file_of_rows(Path(source)) or source.startswith((".", "/", "~")):
        return True
    return _HUB.fullmatch(source) is None


def _folder_of(source: str) -> tuple[Path | None, str | None]:
    """The local folder that ``source`` names, and the split that may follow a colon."""
    for name, split in ((source, None), source.rsplit(":", 1) if ":" in source else (source, None)):
        if (path := Path(name).expanduser()).is_dir():
            return path, split
    return None, None


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
            f"the folder {source} is not a data set that can be read ({first_line(error)}). Name a file, or a folder "
            "of Parquet or JSONL files."
        ) from error
    return _choose_split(source, data, split, use)


def open_hub(source: str, use: str, streaming: bool = False) -> Any:
    """Return a hub data set, downloaded into the local cache unless it is streamed.

    Raises:
        DataError: It can't be read, or has no such split.
    """
    import datasets

    parts = _HUB.fullmatch(source)
    assert parts is not None
    reason = unreachable()
    before = datasets.config.HF_HUB_OFFLINE
    try:
        # Without a network the client would repeat every request for half a minute before it reads its cache.
        datasets.config.HF_HUB_OFFLINE = before or reason is not None
        data = datasets.load_dataset(
            parts["repo"], name=parts["config"], revision=parts["revision"], streaming=streaming
        )
    except Exception as error:  # hub, network and parsing errors share no base class
        raise DataError(
            f"the data set '{source}' can't be read from the hub, and there is no such file "
            f"({reason or first_line(error)}). "
            "Expected a file, a folder or org/name[/config][@revision][:split]; correct the name, or without "
            "network give a local file."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
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
