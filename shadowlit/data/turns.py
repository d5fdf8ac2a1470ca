"""The turns of a conversation as rows hold them, turned into messages for a chat template.

A turn has the fields ``role`` and ``content``, or ``from`` and ``value``. Fields that aren't known here are kept, since
the template may write them; :mod:`shadowlit.data.template` refuses a row with a field that it doesn't write. Null
fields are removed at every depth, since Arrow gives all records of a column the same keys; the nulls in a text of JSON
are the author's, and stay.

A message has:

===================  ==================================================================================
``role``             system, developer, user, assistant or tool
``content``          a text, or parts of text and images; empty where an assistant turn only calls tools
``weight``           factor of the turn's loss, at least 0; absent unless the row sets one
``tool_calls``       ``[{"type": "function", "function": {"name": "…", "arguments": {…}}}]``
``reasoning_content``  the reasoning before an answer
===================  ==================================================================================

and the fields that the row adds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shadowlit.errors import DataError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# Names that data sets use for a role; of a call, the content is the call as JSON.
_CALLS = ("function_call", "tool_call")
SPEAKERS = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", *_CALLS), "assistant"),
    **dict.fromkeys(("observation", "function", "tool_response"), "tool"),
}
_NAMES = ("role", "content")
_SHAREGPT_NAMES = ("from", "value")
_WEIGHTS = ("weight", "loss_weight")
_READ = (*_NAMES, *_SHAREGPT_NAMES, *_WEIGHTS, "train", "function_call")
_IMAGE_PARTS = ("image", "image_url", "path", "url", "bytes", "value")
_PARTS = {
    "text": ("text", "value"),
    "reasoning": ("text", "value"),
    "tool_call": ("value", "tool_call"),
    "image": (*_IMAGE_PARTS, "detail"),
    "image_url": (*_IMAGE_PARTS, "detail"),
}  # fields by the type of the part, of which one holds its content
_THOUGHT = re.compile(r"\s*(<think>.*?</think>)\s*(.*)", re.DOTALL)


def read_turns(row: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """Return the messages in a column that holds a text of ``role`` or a list of turns.

    Raises:
        DataError: The column is missing or holds something else. The message doesn't say which row it is.
    """
    value = row.get(name)
    if isinstance(value, str):
        return [{"role": role, "content": filled(value, name)}]
    if isinstance(value, list):
        return convert_turns(value, name)
    if name not in row:
        raise DataError(f"lacks the field '{name}'. Add it.")
    raise DataError(f"has {shown(value)} in '{name}'; expected a text or a list of messages.")


def convert_turns(turns: Sequence[Any], name: str, names: tuple[str, str] = _NAMES) -> list[Message]:
    """Turn the turns in the column ``name`` into messages.

    Args:
        turns: Turns in order.
        name: Name of the column, for messages.
        names: Fields of the speaker and of the text that are expected; ``role`` and ``content`` are always accepted.

    Raises:
        DataError: There are none, or one is malformed. The message doesn't say which row it is.
    """
    if not turns:
        raise DataError(f"has an empty list in '{name}'. Remove the row.")
    return [_message(turn, f"{name}[{number}]", names) for number, turn in enumerate(turns)]


def from_sharegpt_turns(turns: Sequence[Any], name: str) -> list[Message]:
    """As :func:`convert_turns`, of turns with ``from`` and ``value``."""
    return convert_turns(turns, name, _SHAREGPT_NAMES)


def read_tools(row: Mapping[str, Any], messages: Sequence[Message]) -> tuple[list[Message], list[Any] | None]:
    """Return the definitions of a row's tools, and the messages without those that a turn holds.

    They are in a column ``tools`` (or ``functions``), or in a field of that name of a turn: a list, or a list as JSON.
    A bare function is wrapped as ``{"type": "function", "function": …}``.

    Raises:
        DataError: They are malformed. The message doesn't say which row it is.
    """
    places: list[tuple[str, Any]] = [(f"'{name}'", row.get(name)) for name in ("tools", "functions")]
    rest = []
    for number, message in enumerate(messages):
        places.append((f"the tools of turn {number}", message.get("tools")))
        rest.append({key: value for key, value in message.items() if key != "tools"})
    tools = [tool for where, value in places for tool in _tools(value, where)]
    return rest, tools or None


def unsupervised(turns: Sequence[Message]) -> list[Message]:
    """Return the turns of a prompt, whose assistant turns are context."""
    return [{**turn, "weight": 0.0} if turn["role"] == "assistant" else turn for turn in turns]


def require_answer(turns: list[Message], name: str) -> list[Message]:
    """``turns``, the answer in the column ``name``, if the assistant has a turn in it."""
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"has a '{name}' without an assistant turn. Give the answer the role assistant.")
    return turns


def field(row: Mapping[str, Any], name: str, kind: type, where: str = "", default: Any = None) -> Any:
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


def filled(text: str, name: str) -> str:
    """``text``, unless it is blank."""
    if not text.strip():
        raise DataError(f"has an empty '{name}'. Fill it or remove the row.")
    return text


def without_nulls(value: Any) -> Any:
    """Return a value without the null entries of its objects, at every depth; empty objects and lists are kept."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """Return a value in an error message: its first characters and its type."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} ({type(value).__name__})"


def listed(names: Iterable[str]) -> str:
    """``'a', 'b'``."""
    return ", ".join(f"'{name}'" for name in sorted(names)) or "(none)"


def _message(turn: Any, where: str, names: tuple[str, str]) -> Message:
    if isinstance(turn, Mapping) and turn.get(names[0]) is None and turn.get("role") is not None:
        names = _NAMES
    speaker_name, content_name = names
    if not isinstance(turn, Mapping):
        raise DataError(f"has {shown(turn)} in {where}; expected an object with '{speaker_name}' and '{content_name}'.")
    speaker = field(turn, speaker_name, str, where)
    if speaker not in SPEAKERS:
        what = "role" if names == _NAMES else "speaker"
        raise DataError(
            f"has the unknown {what} {speaker!r} in {where}; expected one of {', '.join(SPEAKERS)}. Rename it."
        )
    role = SPEAKERS[speaker]
    if names == _SHAREGPT_NAMES and SPEAKERS.get(str(turn.get("role") or speaker)) != role:
        raise DataError(f"has the speaker {speaker!r} and the role {turn['role']!r} in {where}. Keep one of them.")
    other = (set(_NAMES + _SHAREGPT_NAMES) - {"role", "from", content_name}).pop()
    if turn.get(other) not in (None, turn.get(content_name)):
        raise DataError(f"has both '{content_name}' and '{other}' in {where}. Keep the one that holds the text.")
    more = {key: without_nulls(value) for key, value in turn.items() if key not in _READ}
    calls = [*_calls(more.pop("tool_calls", None), where), *_calls(turn.get("function_call"), where)]
    content: Any = turn.get(content_name)
    if isinstance(content, list):
        content, reasoning, in_parts = _parts(content, f"'{content_name}' of {where}")
        calls += in_parts
        if reasoning:
            if more.get("reasoning_content"):
                raise DataError(f"has reasoning both in the parts of {where} and in its 'reasoning_content'. Keep one.")
            more["reasoning_content"] = reasoning
    else:
        content = field(turn, content_name, str, where, default="" if calls else None)
    if speaker in _CALLS:
        thought = _THOUGHT.fullmatch(content)
        content, text = thought.groups() if thought else ("", content)
        calls += _calls(filled(text, f"{content_name}' of '{where}"), where)
    if isinstance(content, str) and role in ("user", "assistant") and not calls:
        filled(content, f"{content_name}' of '{where}")
    message = {"role": role, "content": content, **{key: one for key, one in more.items() if one not in (None, "", [])}}
    if calls:
        message["tool_calls"] = calls
    weight = _weight(turn, where)
    if weight is not None and (role != "assistant" or weight != 1):
        message["weight"] = weight
    return message


def _parts(content: list[Any], where: str) -> tuple[str | list[dict[str, Any]], str, list[Any]]:
    """The parts of a turn: its text or, with images, its parts of text and images; its reasoning; its tool calls."""
    parts: list[dict[str, Any]] = []
    reasoning, calls = "", []
    for number, part in enumerate(content):
        place = f"{where}, part {number}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _PARTS:
            _require_read(part, place)
        if kind in ("text", "reasoning"):
            text = field(part, "value" if part.get("text") is None and "value" in part else "text", str, place)
            if kind == "text":
                parts.append({"type": "text", "text": text})
            else:
                reasoning += text
        elif kind == "tool_call":
            calls += _calls(part.get("value", part.get("tool_call")), place)
        elif kind in ("image", "image_url"):
            # Parquet gives every part every key.
            values = (part[key] for key in _IMAGE_PARTS if part.get(key) is not None)
            parts.append({"type": "image", "image": next(values, None)})
        else:
            raise DataError(
                f"has {shown(part)} in {place}; expected an object of type text, reasoning, tool_call or image. "
                "Correct it."
            )
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts), reasoning, calls
    return parts, reasoning, calls


def _require_read(part: Mapping[str, Any], place: str) -> None:
    """Raise if a part has content that isn't read."""
    given = {name: value for name, value in part.items() if name != "type" and value not in (None, "", [], {})}
    unread = sorted(set(given) - set(_PARTS[part["type"]]))
    if unread:
        raise DataError(
            f"has {listed(unread)} in {place}, which the model would not see. Remove it, or name its path in "
            "data.ignore_columns, e.g. 'messages.content.citations'."
        )
    if len(given) > 1 and "image" not in part["type"]:
        raise DataError(f"has the content of {place} in {listed(given)}. Keep one of them.")


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, from one or several, as objects or JSON; bare functions are wrapped."""
    if value is None:
        return []
    value = _parsed(without_nulls(value), f"a tool call in {where}")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = _parsed(call, f"a tool call in {where}")
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"has the tool call {shown(call)} in {where}; expected an object with 'name' and 'arguments', or one "
                "with such an object in 'function'. Correct it."
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"'arguments' of the tool call '{function['name']}' in {where}")
        if not isinstance(arguments, Mapping):
            raise DataError(
                f"has {shown(arguments)} in 'arguments' of the tool call '{function['name']}' in {where}; expected an "
                "object. Correct it."
            )
        outer = {} if function is call else {key: one for key, one in call.items() if key != "function"}
        calls.append({"type": "function", **outer, "function": {**function, "arguments": dict(arguments)}})
    return calls


def _tools(value: Any, where: str) -> list[Any]:
    value = _parsed(without_nulls(value) or None, f"tools in {where}")
    if not value:
        return []
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        tool = _parsed(tool, f"tools in {where}")
        if not isinstance(tool, Mapping):
            raise DataError(
                f"has {shown(tool)} in {where}; expected the definition of a tool, an object with 'name', "
                "'description' and 'parameters'. Correct it."
            )
        is_bare = "function" not in tool and "name" in tool and tool.get("type") in (None, "function")
        tools.append(
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} if is_bare else tool
        )
    return tools


def _parsed(value: Any, what: str) -> Any:
    """``value``, parsed if it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(
            f"has {what} that is not JSON ({error.msg}): {shown(value)}. Correct or remove the row."
        ) from None


def _weight(turn: Mapping[str, Any], where: str) -> float | None:
    """The factor of a turn's loss that a row sets; None for none."""
    train = turn.get("train")
    if train not in (None, True, False):
        raise DataError(f"has 'train': {shown(train)} in {where}; expected true or false.")
    given = {name: turn[name] for name in _WEIGHTS if turn.get(name) is not None}
    for name, value in given.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise DataError(
                f"has '{name}': {shown(value)} in {where}; expected the factor of the turn's loss, a number of at "
                "least 0."
            )
    if len(factors := {float(value) for value in given.values()}) > 1:
        raise DataError(f"has a weight and another loss_weight in {where}. Keep one of them.")
    if train is not None and not train:  # 0 equals False
        return 0.0
    return next(iter(factors), 1.0 if train else None)
