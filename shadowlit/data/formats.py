"""The built-in formats of training data; one pure function per format turns its rows into messages.

===================  ==================================================================================
``messages``         ``{"messages": [{"role": "user", "content": "…"}, …]}``
``sharegpt``         ``{"conversations": [{"from": "human", "value": "…"}, …], "system": "…"}``
``alpaca``           ``{"instruction": "…", "input": "…", "output": "…", "system": "…"}``
``prompt_completion``  ``{"prompt": "…", "completion": "…"}``; either may be a list of messages instead
``text``             ``{"text": "…"}``: a document, trained on as it is, without a chat template
===================  ==================================================================================

``system`` and alpaca's ``input`` may be missing or empty. Other columns are ignored. An assistant message may have
``"train": false`` (or ``"weight": 0``), which excludes it from the loss.

Images are parts of a message's content, ``[{"type": "image", "path": "red.png"}, {"type": "text", "text": "…"}]``;
``image``, ``url`` or ``bytes`` may replace ``path``. Alternatively a column ``images`` (or ``image``) holds them, and
``<image>`` in the texts, or image parts without a file, mark their places. A list of texts is concatenated.

Formats from outside the package are described in :mod:`shadowlit.data.custom_formats`, those of preferences in
:mod:`shadowlit.data.preference_formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shadowlit.errors import DataError, counted

Message = dict[str, Any]
Samples = Literal["conversations", "pairs", "labels"]
"""Kind of sample: a conversation, a chosen and a rejected answer, or an answer that is desirable or not."""

PLACEHOLDER = "<image>"
"""Marks the place in a text of an image from the column ``images``."""

DOCUMENT = "document"
"""Role of the only message of a document."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_IMAGES = ("images", "image")
# Fields next to role and content that a chat template may use.
_EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Format:
    """A format of conversations.

    Attributes:
        convert: Function of a row, and of whether it may be a prompt without an answer, that returns the messages. It
            raises a DataError for a malformed row, which doesn't say which row it is.
        required: Columns by which ``auto`` detects the format.
        prompt: Columns that a prompt without an answer needs.
        optional: Further columns that are read.
    """

    convert: Callable[[Mapping[str, Any], bool], list[Message]]
    required: tuple[str, ...]
    prompt: tuple[str, ...]
    optional: tuple[str, ...] = ()


def convert_row(row: Mapping[str, Any], format: str, *, prompts_only: bool = False) -> list[Message]:
    """Turn a row in a built-in format into messages and check them; ``prompts_only`` accepts a row without an answer.

    Returns:
        Messages with ``role`` and ``content``, and ``weight: 0.0`` for turns that are not supervised.

    Raises:
        DataError: The row is malformed, or the numbers of its images and of their places differ. The message doesn't
            say which row it is.
    """
    messages = _with_images(FORMATS[format].convert(row, prompts_only), row)
    if not prompts_only and not any(message["role"] in ("assistant", DOCUMENT) for message in messages):
        hint = " Its pair of answers is for model.objective=DPO and the like." if "chosen" in row else ""
        raise DataError(f"has no assistant turn, so there is nothing to learn. Remove the row or add the answer.{hint}")
    return messages


def detect_format(columns: Iterable[str], *, source: str, prompts_only: bool = False) -> str:
    """The format that the columns of a source belong to; with ``prompts_only`` also those of a prompt alone.

    Raises:
        DataError: No format has these columns, or more than one has.
    """
    found = set(columns)
    matching = [name for name, spec in FORMATS.items() if found.issuperset(spec.required)]
    if not matching and prompts_only:
        matching = [name for name, spec in FORMATS.items() if found.issuperset(spec.prompt)]
    if not matching:
        remedy = "Rename the columns."
        if found.issuperset(("chosen", "rejected")):
            remedy = "These are pairs of answers: set model.objective to one of pairs, e.g. DPO."
        raise DataError(f"{source} has the columns {listed(found)}; {_accepted(prompts_only)}. {remedy}")
    if len(matching) > 1:  # many data sets repeat their conversations as text
        matching = [name for name in matching if name != "text"]
    if len(matching) > 1:
        raise DataError(
            f"{source} has the columns of several formats: {', '.join(matching)}. "
            f"Set data.format to one of them, e.g. data.format={matching[0]}."
        )
    return matching[0]


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
            f"{_accepted(prompts_only)}. Set data.format=auto or rename the columns."
        )


def unused_columns(columns: Iterable[str], format: str) -> list[str]:
    """The columns that ``format`` doesn't read, sorted."""
    spec = FORMATS[format]
    return sorted(set(columns) - {*spec.required, *spec.optional, *_IMAGES})


def from_messages(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    """``{"messages": [{"role", "content"}, …]}`` to messages."""
    return _turns(_field(row, "messages", list), "messages")


def from_sharegpt(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    """``{"conversations": [{"from", "value"}, …]}`` to messages; turns with role and content are read as well."""
    turns = []
    for number, turn in enumerate(_field(row, "conversations", list)):
        where = f"conversations[{number}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"has {shown(turn)} in {where}; expected an object with 'from' and 'value'.")
        if turn.get("from") is None and turn.get("role") is not None:
            turns.append(turn)
            continue
        speaker = _field(turn, "from", str, where)
        if speaker not in _SPEAKERS:
            raise DataError(
                f"has the unknown speaker {speaker!r} in {where}; expected one of {', '.join(_SPEAKERS)}. Rename it."
            )
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
        turns.append({**rest, "role": _SPEAKERS[speaker], "content": _field(turn, "value", str, where)})
    return _system(row) + _turns(turns, "conversations")


def from_alpaca(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    r"""``{"instruction", "input", "output", "system"}`` to messages: the user says ``instruction + "\n" + input``."""
    instruction = _field(row, "instruction", str)
    context = _field(row, "input", str, default="")
    user = f"{instruction}\n{context}" if instruction and context else instruction or context
    turns = [{"role": "user", "content": _filled(user, "instruction")}]
    if not (prompts_only and row.get("output") is None):
        turns.append({"role": "assistant", "content": _filled(_field(row, "output", str), "output")})
    return _system(row) + turns


def from_prompt_completion(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    """``{"prompt", "completion"}``, strings or lists of messages, to messages; only the completion is supervised."""
    prompt = unsupervised(read_turns(row, "prompt", "user"))
    if prompts_only and row.get("completion") is None:
        return prompt
    return prompt + require_answer(read_turns(row, "completion", "assistant"), "completion")


def from_text(row: Mapping[str, Any], prompts_only: bool = False) -> list[Message]:
    """``{"text"}`` to one message of the role ``document``."""
    if prompts_only:
        raise DataError("is plain text, which has no turn to answer. Give prompts as messages.")
    return [{"role": DOCUMENT, "content": _filled(_field(row, "text", str), "text")}]


FORMATS: dict[str, Format] = {
    "messages": Format(from_messages, ("messages",), ("messages",)),
    "sharegpt": Format(from_sharegpt, ("conversations",), ("conversations",), ("system",)),
    "alpaca": Format(from_alpaca, ("instruction", "output"), ("instruction",), ("input", "system")),
    "prompt_completion": Format(from_prompt_completion, ("prompt", "completion"), ("prompt",)),
    "text": Format(from_text, ("text",), ("text",)),
}


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


def _parts(content: list[Any], where: str) -> str | list[dict[str, Any]]:
    """Check the parts of a message's content; without an image among them, return their text."""
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        place = f"'content' of {where}, part {number}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts.append({"type": "text", "text": _field(part, "text", str, place)})
        elif kind in ("image", "image_url"):
            # Parquet gives every part every key.
            values = (part[key] for key in ("image", "image_url", "path", "url", "bytes") if part.get(key) is not None)
            parts.append({"type": "image", "image": next(values, None)})
        else:
            raise DataError(f"has {shown(part)} in {place}; expected an object of type text or image. Correct it.")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def unsupervised(turns: Sequence[Message]) -> list[Message]:
    """The turns of a prompt, whose assistant turns are context."""
    return [{**turn, "weight": 0.0} if turn["role"] == "assistant" else turn for turn in turns]


def require_answer(turns: list[Message], name: str) -> list[Message]:
    """``turns``, the answer in the column ``name``, if the assistant has a turn in it."""
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"has a '{name}' without an assistant turn. Give the answer the role assistant.")
    return turns


def read_turns(row: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """The messages in a column that holds a text of ``role`` or a list of messages."""
    value = row.get(name)
    if isinstance(value, str):
        return [{"role": role, "content": _filled(value, name)}]
    if isinstance(value, list):
        return _turns(value, name)
    if name not in row:
        raise DataError(f"lacks the field '{name}'. Add it.")
    raise DataError(f"has {shown(value)} in '{name}'; expected a text or a list of messages.")


def _turns(turns: Sequence[Any], name: str) -> list[Message]:
    """Check a list of messages, and keep the fields that are used."""
    if not turns:
        raise DataError(f"has an empty list in '{name}'. Remove the row.")
    return [_turn(turn, f"{name}[{number}]") for number, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"has {shown(turn)} in {where}; expected an object with 'role' and 'content'.")
    role = _field(turn, "role", str, where)
    if role not in ROLES:
        raise DataError(f"has the unknown role {role!r} in {where}; expected one of {', '.join(ROLES)}. Rename it.")
    # Parquet gives every message every key; None means absent.
    extras = {key: turn[key] for key in _EXTRAS if turn.get(key) is not None}
    if isinstance(turn.get("content"), list):
        content = _parts(turn["content"], where)
    else:
        content = _field(turn, "content", str, where, default="" if extras.get("tool_calls") else None)
    if isinstance(content, str) and role in ("user", "assistant") and not extras.get("tool_calls"):
        _filled(content, f"content' of '{where}")
    message = {"role": role, "content": content, **extras}
    if role == "assistant" and not _trained(turn, where):
        message["weight"] = 0.0
    return message


def _trained(turn: Mapping[str, Any], where: str) -> bool:
    """Whether an assistant turn is supervised."""
    train, weight = turn.get("train"), turn.get("weight")
    if train not in (None, True, False):
        raise DataError(f"has 'train': {shown(train)} in {where}; expected true or false.")
    if weight not in (None, 0, 1):
        raise DataError(f"has 'weight': {shown(weight)} in {where}; expected 0 or 1, turns can't be weighed otherwise.")
    return train is not False and weight != 0


def _system(row: Mapping[str, Any]) -> list[Message]:
    text = _field(row, "system", str, default="")
    return [{"role": "system", "content": text}] if text else []


def _field(row: Mapping[str, Any], name: str, kind: type, where: str = "", default: Any = None) -> Any:
    """``row[name]``, checked; ``default`` where it is missing or null, unless that is None."""
    place = f" in {where}" if where else ""
    value = row.get(name)
    if value is None and default is not None:
        return default
    if name not in row:
        raise DataError(f"lacks the field '{name}'{place}. Add it or remove the row.")
    if not isinstance(value, kind):
        expected = "a text" if kind is str else "a list"
        raise DataError(f"has {shown(value)} in '{name}'{place}; expected {expected}. Correct or remove the row.")
    return value


def _filled(text: str, name: str) -> str:
    if not text.strip():
        raise DataError(f"has an empty '{name}'. Fill it or remove the row.")
    return text


def shown(value: Any) -> str:
    """A value in an error message: its first characters and its type."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} ({type(value).__name__})"


def listed(names: Iterable[str]) -> str:
    """``'a', 'b'``."""
    return ", ".join(f"'{name}'" for name in sorted(names)) or "(none)"


def _accepted(prompts_only: bool) -> str:
    formats = (f"{', '.join(s.prompt if prompts_only else s.required)} ({name})" for name, s in FORMATS.items())
    return "accepted are " + ", or ".join(formats)
