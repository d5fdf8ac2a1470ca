"""Checks that a chat template writes every text of a conversation, so that no part of a row is lost unnoticed.

A template ignores what it doesn't know: tool calls, reasoning, tools, names. Whether it writes a text can't be read off
the template, and finding the text in what is rendered proves it only for a long one: reasoning "4" is found in the
answer "4". So short texts, and those that aren't found as they are, are rendered once more between two numbers that
occur nowhere else. A text is written if both numbers are, with all of its letters between them, which holds whether the
template trims it, escapes it as JSON, or moves it. Numbers and names of arguments are tried in the same way.

Some templates drop the reasoning of the assistant's earlier turns on purpose, since the model doesn't see it when it
answers later ones. That isn't a loss as long as the turn is rendered with it when the turn itself is generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, groupby
from typing import Any

from shadowlit.data.conversation import FatalDataError
from shadowlit.data.formats import Message, shown
from shadowlit.data.rendering import Chat, RewrittenHistoryError, plain
from shadowlit.errors import DataError

_LONG = 16  # characters of a text that isn't found by accident
_MOST_NAMED = 3  # fields in an error
_TAG_OR_BREAK = re.compile(r"(<[^<>\s]*>|\n)")  # templates split texts there, e.g. at </think>, and write them again
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same thing; the template sees it under all
# How calls, parts and schemas are read, as opposed to what they say; required arguments have names of their own.
_STRUCTURE = frozenset({"id", "index", "type", "required", "strict", "additionalProperties", "$schema"})
_NAME = None  # ends the path of a key that is a text by itself, e.g. the name of an argument

Path = tuple[str | int | None, ...]
New = Mapping[Path, Any]


@dataclass(frozen=True)
class _Leaf:
    """A text or another plain value of a conversation; its path begins with ``messages`` or ``tools``."""

    path: Path
    value: Any

    @property
    def turn(self) -> int | None:
        """The message that it belongs to; None for a tool."""
        return int(self.path[1] or 0) if self.path[0] == "messages" else None

    @property
    def field(self) -> Path:
        """The beginning of its path that ``data.ignore_columns`` can name."""
        return self.path[:3] if self.path[0] == "messages" else self.path[:1]


def require_written(
    chat: Chat, messages: Sequence[Message], text: str, *, ask: bool = False, trained: Collection[int] = ()
) -> None:
    """Check that all texts of the messages and of the tools are in what the template writes.

    Args:
        chat: Template, and tools among its arguments.
        messages: Messages that were rendered.
        text: Text that the template wrote.
        ask: Whether ``text`` has the generation prompt.
        trained: Turns that are supervised in ``text``; they must be complete in it, while other turns of the assistant
            may be shortened when later ones follow.

    Raises:
        RewrittenHistoryError: A trained turn is only complete where it is the last one.
        DataError: A text isn't written.
    """
    given = _without_copies(plain(messages))
    tools = chat.arguments.get("tools") or []
    leaves = [*_leaves_of_messages(given), *_leaves(tools, ("tools",), _FIELDS)]
    everything = "\0".join(str(leaf.value) for leaf in leaves)
    # The same text may occur in several places, of which the template may write only some.
    uncertain = [leaf for leaf in leaves if not _is_certain(leaf.value, text, everything)]

    def render(new: New, until: int | None = None) -> str:
        arguments = {**chat.arguments, "tools": _with(tools, ("tools",), new)} if tools else chat.arguments
        changed = replace(chat, arguments=arguments)
        return changed.render(_with(given[:until], ("messages",), new), ask and until is None)

    lost: dict[Path, str] = {}
    rewritten: dict[Path, str] = {}
    for turn, group in groupby(_unwritten(uncertain, render), key=lambda leaf: leaf.turn):
        missing = list(group)
        own = render if turn is None else partial(render, until=turn + 1)
        missing_at_end = missing if turn is None else _unwritten(missing, own)
        for leaf in missing:
            is_context = turn is not None and turn not in trained and given[turn]["role"] == "assistant"
            if leaf not in missing_at_end and is_context:
                continue
            if (part := _missing_part(leaf, render)) is None:
                continue
            if leaf in missing_at_end and (at_end := _missing_part(leaf, own)) is not None:
                lost[leaf.path] = at_end
            elif turn in trained:
                rewritten[leaf.path] = part
            else:
                lost[leaf.path] = part
    if lost:
        raise _lost(leaves, lost)
    if rewritten:
        raise RewrittenHistoryError(
            f"has {', '.join(_named(leaves, rewritten))}, which the chat template doesn't write once other turns "
            "follow. Train on one sample per turn (encode_turns does), or set data.chat_template to a template that "
            "keeps it."
        )


def _without_copies(messages: list[Message]) -> list[Message]:
    """The messages with reasoning under one name, where it is the same under several."""
    for message in messages:
        first, *others = [name for name in _REASONING if name in message] or [""]
        for name in others:
            if message[name] == message[first]:
                del message[name]
    return messages


def _is_certain(value: Any, text: str, everything: str) -> bool:
    """Whether finding a value in a text proves that it was written."""
    if not isinstance(value, str) or len(value := value.strip()) < _LONG:
        return False
    return 0 < everything.count(value) <= text.count(value)


def _unwritten(leaves: Sequence[_Leaf], render: Callable[[New], str]) -> list[_Leaf]:
    """The leaves that ``render``, a function of what is to be changed, doesn't write when all are marked."""
    new: dict[Path, Any] = {}
    expected: list[list[tuple[str, str, str]]] = []
    num_pieces = 0
    for leaf in leaves:
        new[leaf.path], pieces = _mark(leaf.value, num_pieces)
        expected.append(pieces)
        num_pieces += len(pieces)
    found = _attempt(render, new) if leaves else ""
    return [leaf for leaf, pieces in zip(leaves, expected, strict=True) if not all(_has(found, *p) for p in pieces)]


def _missing_part(leaf: _Leaf, render: Callable[[New], str]) -> str | None:
    """The first piece of a leaf that isn't written, "" for all of it, None for nothing.

    The leaf is tried by itself, since a template may take another path because of another leaf's change.
    """
    changed, pieces = _mark(leaf.value, 0)
    found = _attempt(render, {leaf.path: changed})
    missing = [piece for before, piece, after in pieces if not _has(found, before, piece, after)]
    if not missing:
        return None
    unchanged = _attempt(render, {})
    if isinstance(leaf.value, bool) and _attempt(render, {leaf.path: not leaf.value}) not in ("", unchanged):
        return None  # it is a condition
    if not found and str(leaf.value).strip() in unchanged:
        return None  # the template takes no other value
    return missing[0] if len(missing) < len(pieces) else ""


def _attempt(render: Callable[[New], str], new: New) -> str:
    """What the template writes; nothing where it refuses a change."""
    try:
        return render(new)
    except FatalDataError:
        raise
    except DataError:
        return ""


def _mark(value: Any, number: int) -> tuple[Any, list[tuple[str, str, str]]]:
    """The value with marks, and its pieces with the marks before and after each; ``number`` is that of the first."""
    marks = (f"70513{2 * number + i:07d}96" for i in count())
    if not isinstance(value, str):
        mark = next(marks)
        return (mark if isinstance(value, bool) else int(mark)), [(mark, "", "")]
    parts = _TAG_OR_BREAK.split(value)
    if not any(part.strip() for part in parts[::2]):  # nothing but tags
        parts = [value]
    pieces = []
    for i in range(0, len(parts), 2):
        if piece := parts[i].strip():
            before, after = next(marks), next(marks)
            parts[i] = parts[i].replace(piece, f"{before}{piece}{after}", 1)
            pieces.append((before, piece, after))
    return "".join(parts), pieces


def _has(text: str, before: str, piece: str, after: str) -> bool:
    """Whether a piece is in a text between its marks, however it is escaped."""
    start = text.find(before)
    end = text.find(after, start + len(before)) if start >= 0 else -1
    if end < 0:
        return False
    between = text[start + len(before) : end]
    if piece in between or json.dumps(piece)[1:-1] in between:
        return True
    rest = iter(between.casefold())
    return all(character in rest for character in piece.casefold() if character.isalnum())


# Kinds of objects: of calls, parts and tools; with names of parameters; with any keys; and those of unknown fields.
_FIELDS, _SCHEMAS, _FREE, _UNKNOWN = "fields", "schemas", "free", "unknown"


def _leaves_of_messages(messages: Sequence[Message]) -> Iterator[_Leaf]:
    """The leaves of messages, without what says how they belong together."""
    called = {name for message in messages for name in _called(message)}
    for number, message in enumerate(messages):
        for name, value in message.items():
            if name in ("role", "tool_call_id"):
                continue
            if name == "name" and message["role"] == "tool" and value in called:
                continue
            kind = _FIELDS if name in ("content", "tool_calls", "function_call") else _UNKNOWN
            yield from _leaves(value, ("messages", number, name), kind)


def _called(message: Message) -> Iterator[str]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield function["name"]


def _leaves(value: Any, path: Path, kind: str) -> Iterator[_Leaf]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if kind == _FIELDS and key in _STRUCTURE:
                continue
            if kind in (_SCHEMAS, _FREE):
                yield _Leaf((*path, key, _NAME), key)
            yield from _leaves(item, (*path, key), _kind(key, item, kind))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number), kind)
    elif value is not None and str(value).strip():
        yield _Leaf(path, value)


def _kind(key: str, item: Any, kind: str) -> str:
    """What the keys of an object in the field ``key`` are."""
    if kind in (_FREE, _UNKNOWN):
        return kind
    if kind == _FIELDS and key == "arguments":
        return _FREE
    if kind == _FIELDS and key in ("properties", "$defs", "definitions"):
        return _SCHEMAS
    # Some tools list their parameters without a schema around them.
    if key == "parameters" and isinstance(item, Mapping) and not isinstance(item.get("type", item.get("$ref")), str):
        return _FIELDS if "properties" in item else _SCHEMAS
    return _FIELDS


def _with(value: Any, path: Path, new: New) -> Any:
    """The value with some of its leaves replaced."""
    if isinstance(value, Mapping):
        return {new.get((*path, key, _NAME), key): _with(item, (*path, key), new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with(item, (*path, number), new) for number, item in enumerate(value)]
    return new.get(path, value)


def _lost(leaves: list[_Leaf], lost: Mapping[Path, str]) -> DataError:
    names = list(_named(leaves, lost))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    fields = {leaf.field for leaf in leaves if leaf.path in lost}
    needed = {_column(field) for field in fields if not _may_be_ignored(field, leaves, lost)}
    columns = sorted({_column(field) for field in fields} - needed)
    it = "it" if len(names) == 1 else "them"
    ignore = f"add {' and '.join(map(repr, columns))} to data.ignore_columns, " if columns else ""
    return DataError(
        f"has {', '.join(names[:_MOST_NAMED])}{more}, which the chat template doesn't write, so that the model would "
        f"not see {it}. Set data.chat_template to a template that writes {it}, {ignore}or remove {it}."
    )


def _named(leaves: list[_Leaf], lost: Mapping[Path, str]) -> Iterator[str]:
    """``'reasoning_content' in messages[1]`` for each field that is lost, or what is lost of it."""
    firsts: dict[Path, _Leaf] = {}
    for leaf in leaves:
        if leaf.path in lost:
            firsts.setdefault(leaf.field, leaf)
    for field, leaf in firsts.items():
        place = f" in messages[{leaf.turn}]" if leaf.turn is not None else ""
        if _is_whole(field, leaves, lost):
            yield f"'{field[-1]}'{place}"
            continue
        path = leaf.path[: -1 if leaf.path[-1] is _NAME else None]
        inner = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path[len(field) :])
        yield f"a part of '{field[-1]}{inner}'{place}, {shown(lost[leaf.path] or leaf.value)}"


def _may_be_ignored(field: Path, leaves: list[_Leaf], lost: Mapping[Path, str]) -> bool:
    """Whether a field is lost as a whole, and something is left of its turn without it."""
    has_content = any(leaf.field == (*field[:2], "content") for leaf in leaves)
    is_needed = field[-1] == "content" or (field[-1] == "tool_calls" and not has_content)
    return not is_needed and _is_whole(field, leaves, lost)


def _is_whole(field: Path, leaves: list[_Leaf], lost: Mapping[Path, str]) -> bool:
    return all(lost.get(leaf.path) == "" for leaf in leaves if leaf.field == field)


def _column(field: Path) -> str:
    """The field as ``data.ignore_columns`` names it."""
    return f"messages.{field[2]}" if field[0] == "messages" else "tools"
