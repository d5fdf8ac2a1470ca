"""Renders conversations by the chat template of a tokenizer; whatever goes wrong in it becomes a DataError."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from shadowlit import limits
from shadowlit.data.conversation import FatalDataError
from shadowlit.data.formats import Message
from shadowlit.data.images import Span
from shadowlit.errors import DataError, first_line

MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""The marks that enclose what the assistant generates, in templates that have them."""


_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})


class RewrittenHistoryError(DataError):
    """A template renders a turn differently once other turns follow it."""


@dataclass(frozen=True)
class Chat:
    """A chat template and its arguments.

    Attributes:
        tokenizer: Tokenizer that the template belongs to; its special tokens are arguments as well.
        source: The template.
        arguments: Further arguments, e.g. ``enable_thinking``, and ``tools``.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> Chat:
        """Return the template that ``apply_chat_template`` would choose, which may be a special one for tools.

        Raises:
            DataError: The tokenizer has no chat template, only named ones, or isn't fast.
        """
        name = tokenizer.name_or_path or "the Instruct"
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {name} has no chat template. Use the Instruct's folder with its "
                "chat_template.jinja, or set data.chat_template to the path of a jinja file."
            )
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer of {name} is not a fast one, and can't tell which characters a token covers. "
                "Convert it to a tokenizer.json."
            )
        try:
            return cls(tokenizer, tokenizer.get_chat_template(tools=arguments.get("tools")), arguments)
        except ValueError:
            raise DataError(
                f"the tokenizer of {name} has the chat templates {', '.join(sorted(tokenizer.chat_template))}, none "
                "of which is the default. Set data.chat_template to the path of a jinja file."
            ) from None

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant generates."""
        return MARKS.search(self.source) is not None

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """Return the conversation as text, with the generation prompt if ``ask``.

        Raises:
            DataError: The template refuses the conversation or fails.
            FatalDataError: The template doesn't end in time.
        """
        return self._render(messages, add_generation_prompt=ask)[0]

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the conversation as text, and the characters between the template's marks; errors as for
        :meth:`render`.

        ``return_assistant_tokens_mask`` of ``apply_chat_template`` would look up the token of a span's first character
        and leave out the whole span where there is none, e.g. for a space that the tokenizer's offsets trim
        (transformers#34172).
        """
        return self._render(messages, return_assistant_tokens_mask=True)

    def _render(self, messages: Sequence[Message], **options: Any) -> tuple[str, Any]:
        def render() -> Any:  # annotated as a text upstream
            return render_jinja_template(
                conversations=[plain(messages)],
                chat_template=self.source,
                **{**self.tokenizer.special_tokens_map, **self.arguments, **options},
            )

        try:
            texts, spans = limits.in_time(render)
        except TimeoutError:
            raise FatalDataError(
                f"is not rendered by the chat template within {limits.TIME_LIMIT_S:g} s{_turns(messages)}, as if the "
                "template never ended. Correct its loops, or set data.chat_template to another template."
            ) from None
        except Exception as error:  # a template is code: it can raise anything
            raise _refusal(error, messages) from None
        return texts[0], spans[0] if spans else []


def load_template(path: str) -> str:
    """Read a chat template from a jinja file.

    Raises:
        DataError: There is no such file, or it is not a jinja template.
    """
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={path} can't be read: {error}. Give the path of a jinja file.") from None
    _parse(template, f"data.chat_template={path}")
    if not template.strip():
        raise DataError(f"data.chat_template={path} is empty. Give the path of a jinja file with a chat template.")
    return template


def check_template(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
    """Check that there is a chat template, and that it uses all arguments: jinja would ignore a typo.

    Raises:
        DataError: The tokenizer has no chat template or isn't a fast one, or the template doesn't use an argument.
    """
    chat = Chat.of(tokenizer, {})
    parsed = _parse(chat.source, f"the chat template of {tokenizer.name_or_path or 'the Instruct'}")
    known = jinja2.meta.find_undeclared_variables(parsed) - _GIVEN - set(tokenizer.special_tokens_map)
    unknown = sorted(set(template_kwargs) - known)
    if unknown:
        raise DataError(
            f"data.template_kwargs has {', '.join(unknown)}, which the chat template doesn't use; it knows "
            f"{', '.join(sorted(known)) or 'no arguments'}. Correct or remove it."
        )


def renders_date(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> bool:
    """Return whether the template writes today's date, so that the tokens change from day to day (Llama 3.2)."""
    return "strftime_now" in Chat.of(tokenizer, {}).source and "date_string" not in template_kwargs


def _parse(template: str, name: str) -> jinja2.nodes.Template:
    # Only the extension of transformers knows the marks; parsing doesn't need them.
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return environment.parse(MARKS.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise broken_template(name, error) from None


def plain(messages: Sequence[Message]) -> list[Message]:
    """Return messages as a template expects them: without weights and nulls, with the place of each image, not the
    image.
    """
    result = []
    for message in messages:
        content = message.get("content")
        if content is None:  # next to tool calls; most templates concatenate it
            content = ""
        elif not isinstance(content, str):
            content = [{"type": "image"} if part["type"] == "image" else part for part in content]
        rest = {key: value for key, value in message.items() if key != "weight" and value is not None}
        result.append({**rest, "content": content})
    return result


def _refusal(error: Exception, messages: Sequence[Message]) -> DataError:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return broken_template("the chat template", error)
    reason = str(error) if isinstance(error, jinja2.TemplateError) else first_line(error)
    return DataError(
        f"is refused by the chat template: '{reason}'{_turns(messages)}. Change the conversation, e.g. move a "
        "system text into the first user turn, or set data.chat_template to a template that takes it."
    )


def _turns(messages: Sequence[Message]) -> str:
    return f" (its turns: {', '.join(message['role'] for message in messages) or 'no turn at all'})"


def broken_template(name: str, error: jinja2.TemplateSyntaxError) -> DataError:
    """Return the error of a text that isn't a jinja template."""
    return DataError(f"{name} is not a jinja template: {error.message} in line {error.lineno}. Correct it.")
