"""The built-in formats of training data; one pure function per format turns its rows into messages.

===================  ==================================================================================
``messages``         ``{"messages": [{"role": "user", "content": "…"}, …]}``
``sharegpt``         ``{"conversations": [{"from": "human", "value": "…"}, …], "system": "…"}``
``alpaca``           ``{"instruction": "…", "input": "…", "output": "…", "system": "…", "history": [["…", "…"]]}``
``prompt_completion``  ``{"prompt": "…", "completion": "…"}``; either may be a list of messages instead
``text``             ``{"text": "…"}``: a document, trained on as it is, without a chat template
===================  ==================================================================================

``system`` and alpaca's ``input`` and ``history`` may be missing or empty. The columns ``question`` and ``answer``, or
``prompt`` and ``response``, are read as ``prompt`` and ``completion``. Any row of turns may have ``tools``, the
definitions of the tools that the assistant may call. :mod:`shadowlit.data.turns` has the fields of a turn.

No text of a row is dropped silently: a column that no format reads is an error, unless its text is that of a
turn, or the column is declared in ``data.ignore_columns``.

Images are parts of a message's content, ``[{"type": "image", "path": "red.png"}, {"type": "text", "text": "…"}]``;
``image``, ``url`` or ``bytes`` may replace ``path``. Alternatively a column ``images`` (or ``image``) holds them, and
``<image>`` in the texts, or image parts without a file, mark their places. A list of texts is concatenated.

Formats from outside the package are described in :mod:`shadowlit.data.custom_formats`, those of preferences in
:mod:`shadowlit.data.preference_formats`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from shadowlit.data.turns import (
    SPEAKERS,
    Message,
    convert_turns,
    field,
    filled,
    from_sharegpt_turns,
    listed,
    read_turns,
    require_answer,
    shown,
    unsupervised,
)
from shadowlit.errors import DataError, counted
from shadowlit.text import is_number

Samples = Literal["conversations", "contexts", "pairs", "labels"]
"""Kind of sample: a conversation, one with a context for a teacher, two answers, or one that is desirable or not."""

PLACEHOLDER = "<image>"
"""Marks the place in a text of an image from the column ``images``."""

DOCUMENT = "document"
"""Role of the only message of a document."""

_IMAGES = ("images", "image")
_TOOLS = ("tools", "functions")
# Columns that other programs follow, and that would have no effect here.
_NO_EFFECT = ("weight", "loss_weight", "train", "chat_template_kwargs")
_END_MARKS = re.compile(r"\s*(<[^<>]*>\s*)*")  # that may follow the last turn of a rendered conversation
_LEAST_COPY = 20  # characters of a text in an unread column that is taken for a copy of a part of a turn


@dataclass(frozen=True)
class Format:
    """A format of conversations.

    Attributes:
        convert: Function of a row, and of whether it may be a prompt without an answer, that returns the messages. It
            raises a DataError for a malformed row, which doesn't say which row it is.
        required: Columns by which ``auto`` detects the format.
        prompt: Columns that a prompt without an answer needs.
        optional: Further columns that are read.
        names: Names of the required columns that ``auto`` recognises instead, each set in the order of ``required``.
    """

    convert: Callable[[Mapping[str, Any], bool], list[Message]]
    required: tuple[str, ...]
    prompt: tuple[str, ...]
    optional: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()

    @property
    def columns(self) -> set[str]:
        """All columns that are read."""
        return {*self.required, *self.optional, *_IMAGES, *_TOOLS}


def convert_row(row: Mapping[str, Any], format: str, *, prompts_only: bool = False) -> list[Message]:
    """Turn a row in a built-in format into messages and check them; ``prompts_only`` accepts a row without an answer.

    Returns:
        Messages as :mod:`shadowlit.data.turns` describes them.

    Raises:
        DataError: The row is malformed, or the numbers of its images and of their places differ. The message doesn't
            say which row it is.
    """
    messages = _with_images(FORMATS[format].convert(row, prompts_only), row)
    if not prompts_only and not any(message["role"] in ("assistant", DOCUMENT) for message in messages):
        hint = " Its pair of answers is for model.objective=DPO and the like." if "chosen" in row else ""
        raise DataError(f"has no assistant turn, so there is nothing to learn. Remove the row or add the answer.{hint}")
    return messages


def detect_format(columns: Iterable[str], *, source: str, prompts_only: bool = False) -> tuple[str, dict[str, str]]:
    """Return the format that the columns of a source belong to; with ``prompts_only`` also those of a prompt alone.

    Returns:
        The format, and the names of the source for the columns that the format reads, where they differ.

    Raises:
        DataError: No format has these columns, or more than one has.
    """
    found = set(columns)
    matching: dict[str, dict[str, str]] = {}
    for needed in ("required", "prompt") if prompts_only else ("required",):
        for name, spec in FORMATS.items() if not matching else ():
            if found.issuperset(getattr(spec, needed)):
                matching[name] = {}
        for name, spec in FORMATS.items() if not matching else ():
            for names in spec.names:
                if found.issuperset(names[: len(getattr(spec, needed))]):
                    matching.setdefault(name, {a: b for a, b in zip(spec.required, names, strict=True) if a != b})
    if not matching:
        raise DataError(f"{source} has the columns {listed(found)}; {_accepted(prompts_only)}. {_remedy(found)}")
    if len(matching) > 1:  # many data sets repeat their conversations as text
        matching.pop("text", None)
    if len(matching) > 1:
        raise DataError(
            f"{source} has the columns of several formats: {', '.join(matching)}. "
            f"Set data.format to one of them, e.g. data.format={next(iter(matching))}."
        )
    return next(iter(matching.items()))


def check_columns(columns: Iterable[str], format: str, *, source: str, prompts_only: bool = False) -> None:
    """Check that a source has the columns of the ``format`` that was set.

    Raises:
        DataError: A column of ``format`` is missing.
    """
    found = set(columns)
    spec = FORMATS[format]
    missing = [name for name in (spec.prompt if prompts_only else spec.required) if name not in found]
    if missing:
        raise DataError(
            f"{source} has the columns {listed(found)}, without {listed(missing)}, which data.format={format} needs; "
            f"{_accepted(prompts_only)}. Set data.format=auto, or name them in data.columns, e.g. "
            f"data.columns={{{missing[0]}: {min(found, default='name')}}}."
        )


def without_ignored(row: Mapping[str, Any], patterns: Sequence[str], path: str = "") -> dict[str, Any]:
    """Return a row without the columns, and the fields of its turns, that match ``data.ignore_columns``.

    The path of a field is that of its column and its keys, without the numbers in lists: ``messages.timestamp``.
    """

    def kept(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return without_ignored(value, patterns, f"{path}.")
        return [kept(one, path) for one in value] if isinstance(value, list | tuple) else value

    return {
        name: kept(value, f"{path}{name}")
        for name, value in row.items()
        if not any(f"{path}{name}" == pattern or fnmatchcase(f"{path}{name}", pattern) for pattern in patterns)
    }


def without_ignored_fields(messages: Sequence[Message], patterns: Sequence[str]) -> list[Message]:
    """Return messages without the fields that match ``data.ignore_columns`` as ``messages.<field>``.

    So a field can be left out by the name that the chat template knows, whatever the row calls it: the tool calls of
    ShareGPT's turns, or reasoning in parts.

    Raises:
        DataError: Nothing is left of a turn.
    """

    def is_ignored(name: str) -> bool:
        return name not in ("role", "content") and any(fnmatchcase(f"messages.{name}", one) for one in patterns)

    kept = [{name: value for name, value in message.items() if not is_ignored(name)} for message in messages]
    for number, (message, before) in enumerate(zip(kept, messages, strict=True)):
        if not message["content"] and "tool_calls" in before and "tool_calls" not in message:
            raise DataError(
                f"has nothing but tool calls in messages[{number}], which data.ignore_columns leaves out. Remove the "
                "row or keep them."
            )
    return kept


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with the names that formats read; ``columns`` has the name of the source for each of them.

    Raises:
        DataError: A column has a name that another one is read by, and one of them would be lost.
    """
    names = {theirs: ours for ours, theirs in columns.items()}
    renamed = {names.get(name, name): value for name, value in row.items()}
    if len(renamed) < len(row):
        ours = next(ours for ours, theirs in columns.items() if ours in row and theirs in row and ours not in names)
        raise DataError(
            f"has the columns '{columns[ours]}' and '{ours}', both of which would be read as '{ours}'. Leave out one "
            f"of them, e.g. data.ignore_columns=[{ours}], or name the right ones in data.columns."
        )
    return renamed


def unread_text(
    row: Mapping[str, Any], read: Collection[str], messages: Sequence[Message], *, untyped: bool = False
) -> dict[str, str]:
    """Return the columns with content that reaches no message, each with what it holds.

    Columns of numbers don't count, and neither does a text that a turn has too: many data sets repeat the prompt.

    Args:
        row: Row, by the names of the source.
        read: Columns that are read.
        messages: Messages that the row became.
        untyped: Whether all values are texts, as those of a table, so that a number is a text of one.
    """
    unread: dict[str, str] = {}
    for name, value in row.items():
        if name in read or value is None:
            continue
        if name in _NO_EFFECT:
            unread[name] = shown(value)
        texts = (text for text in texts_in(value) if not (untyped and is_number(text)))
        lost = next((text for text in texts if not _is_copy(text, messages)), None)
        if lost is not None:
            unread[name] = shown(lost)
    return unread


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts in a value, at every depth, that aren't blank; the roles of turns aren't among them."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            if not (name in ("role", "from") and isinstance(one, str) and one in SPEAKERS):
                yield from texts_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts_in(one)


def from_messages(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    """``{"messages": [{"role", "content"}, …]}`` to messages."""
    return with_system(row, convert_turns(field(row, "messages", list), "messages"))


def from_sharegpt(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    """``{"conversations": [{"from", "value"}, …]}`` to messages; turns with role and content are read as well."""
    return with_system(row, from_sharegpt_turns(field(row, "conversations", list), "conversations"))


def from_alpaca(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    r"""``{"instruction", "input", "output", "system", "history"}`` to messages.

    The user says ``instruction + "\n" + input``. ``history`` has the earlier turns, as pairs of a question and an
    answer; its answers are supervised too.
    """
    instruction = field(row, "instruction", str)
    context = field(row, "input", str, default="")
    user = f"{instruction}\n{context}" if instruction and context else instruction or context
    turns: list[Message] = []
    for number, pair in enumerate(field(row, "history", list, default=[])):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"has {shown(pair)} in history[{number}]; expected a list of two texts, a question and its answer. "
                "Correct or remove the row."
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": filled(text, f"history[{number}]")})
    turns.append({"role": "user", "content": filled(user, "instruction")})
    if not (prompts_only and row.get("output") is None):
        turns.append({"role": "assistant", "content": filled(field(row, "output", str), "output")})
    return with_system(row, turns)


def from_prompt_completion(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    """``{"prompt", "completion"}``, strings or lists of messages, to messages; only the completion is supervised."""
    prompt = with_system(row, unsupervised(read_turns(row, "prompt", "user")))
    if prompts_only and row.get("completion") is None:
        return prompt
    return prompt + require_answer(read_turns(row, "completion", "assistant"), "completion")


def from_text(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    """``{"text"}`` to one message of the role ``document``."""
    if prompts_only:
        raise DataError("is plain text, which has no turn to answer. Give prompts as messages.")
    return [{"role": DOCUMENT, "content": filled(field(row, "text", str), "text")}]


FORMATS: dict[str, Format] = {
    "messages": Format(from_messages, ("messages",), ("messages",), ("system",)),
    "sharegpt": Format(from_sharegpt, ("conversations",), ("conversations",), ("system",)),
    "alpaca": Format(from_alpaca, ("instruction", "output"), ("instruction",), ("input", "system", "history")),
    "prompt_completion": Format(
        from_prompt_completion, ("prompt", "completion"), ("prompt",), ("system",),
        (("question", "answer"), ("prompt", "response")),
    ),
    "text": Format(from_text, ("text",), ("text",)),
}  # fmt: skip


def with_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Return the turns, after the system text in the column of its own.

    Raises:
        DataError: The turns begin with another one.
    """
    text = field(row, "system", str, default="")
    if not text or (turns[0]["role"] == "system" and turns[0]["content"] == text):
        return turns
    if turns[0]["role"] in ("system", "developer"):
        raise DataError(
            f"has the system text {shown(text)} in 'system' and another one, {shown(turns[0]['content'])}, as its "
            "first turn. Remove one of them; data.ignore_columns=[system] keeps the turn."
        )
    return [{"role": "system", "content": text}, *turns]


def _with_images(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """Insert the images of a row's column at their places."""
    values = [row[name] for name in _IMAGES if row.get(name) is not None]
    given = [image for value in values for image in (value if isinstance(value, list | tuple) else [value])]
    column = next((name for name in _IMAGES if name in row), None)
    rest, num_places = iter(given), 0
    placed = []
    for message in messages:
        content = message["content"]
        if column is not None and isinstance(content, str) and PLACEHOLDER in content and message["role"] != DOCUMENT:
            content = _at_placeholders(content)
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image" and part["image"] is None:
                    num_places += 1
                    part = {**part, "image": next(rest, None)}
                parts.append(part)
            content = parts
        placed.append({**message, "content": content})
    if num_places != len(given):
        count = f"{counted(len(given), 'image')} in '{column or 'images'}'"
        raise DataError(
            f"has {count}, and {num_places} places for them; expected equally many. Write {PLACEHOLDER} in a turn's "
            "text where each image belongs, or give parts of type image, and a path for each."
        )
    return placed


def _at_placeholders(text: str) -> list[dict[str, Any]]:
    """Split a text at its placeholders, and drop the line breaks next to them, which the template writes."""
    first, *others = text.split(PLACEHOLDER)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first.removesuffix("\n")}]
    for between in others:
        parts += [{"type": "image", "image": None}, {"type": "text", "text": between.removeprefix("\n")}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _is_copy(text: str, messages: Sequence[Message]) -> bool:
    """Whether a text is that of a turn, a long part of one, or the whole conversation."""
    text = text.strip()
    if messages and _is_rendered(text, [one.strip() for message in messages for one in texts_in(message["content"])]):
        return True
    for message in messages:
        own = [one.strip() for one in texts_in({key: one for key, one in message.items() if key != "role"})]
        if text in own or (len(text) >= _LEAST_COPY and any(text in one for one in own)):
            return True
    return False


def _is_rendered(text: str, contents: Sequence[str]) -> bool:
    """Whether a text has the contents of a conversation in their order, and ends with the last one or its end mark."""
    reached = 0
    for content in contents[:-1]:
        at = text.find(content, reached)
        if at < 0:
            return False
        reached = at + len(content)
    last = text.rfind(contents[-1], reached) if contents else -1
    return last >= 0 and _END_MARKS.fullmatch(text, last + len(contents[-1])) is not None


def _accepted(prompts_only: bool) -> str:
    formats = (f"{', '.join(s.prompt if prompts_only else s.required)} ({name})" for name, s in FORMATS.items())
    return "accepted are " + ", or ".join(formats)


# Names that data sets give to the parts of a conversation, for the remedy of columns that no format has.
_USUAL = {
    "prompt": ("question", "query", "input", "inputs", "problem", "instruction", "user", "source"),
    "completion": ("answer", "answers", "response", "output", "solution", "target", "targets", "assistant", "label"),
    "instruction": (),
    "input": ("context",),
    "output": ("response", "answer", "completion"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "text": ("content", "document", "body"),
}
_SETS = (("instruction", "input", "output"), ("prompt", "completion"), ("messages",), ("text",))


def _remedy(found: set[str]) -> str:
    """What to do about columns that no format has."""
    if found.issuperset(("chosen", "rejected")):
        return "These are pairs of answers: set model.objective to one of pairs, e.g. DPO."
    usual = {ours: next((name for name in (ours, *names) if name in found), None) for ours, names in _USUAL.items()}
    needed = next((names for names in _SETS if all(map(usual.get, names))), None)
    mapping = "prompt: <name>, completion: <name>"
    if needed:
        mapping = ", ".join(f"{name}: {usual[name]}" for name in needed if usual[name] != name)
    return f"Name them in data.columns, e.g. data.columns={{{mapping}}}, or rename the columns."
