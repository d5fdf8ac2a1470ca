"""How an evaluation asks: rows to prompts, as text and as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from shadowlit.data.formats import Message, convert_row
from shadowlit.data.template import render_prompt
from shadowlit.errors import DataError
from shadowlit.evaluation.rows import Columns, read_text
from shadowlit.pair.pair import ModelPair


class Prompt(NamedTuple):
    """What the model is asked.

    Attributes:
        text: All of it, as the model reads it.
        answer: The assistant's turn that stood at the end of the row's messages and isn't shown to the model.
    """

    text: str
    answer: str | None


@dataclass(frozen=True)
class Asking:
    """How rows become prompts.

    Attributes:
        field: Holds the question, a text. A row without it is asked by its ``messages``, whose last turn is left out
            if it is the assistant's.
        chat: Ask through the chat template, with its generation prompt; else the text stands alone.
        system: A system turn for conversations that have none; null for none.

    Raises:
        DataError: A system turn is set without a chat.
    """

    field: str
    chat: bool = True
    system: str | None = None

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise DataError(f"system={self.system!r} is set with chat=false, which has no turns. Leave one out.")

    def prompt(
        self, columns: Columns, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
    ) -> Prompt:
        """The prompt of a row.

        Raises:
            DataError: The fields are missing, empty or of the wrong type, or the chat template refuses the turns.
        """
        if not self.chat:
            return Prompt(read_text(columns, self.field), None)
        turns = self._turns(columns)
        last = turns[-1] if turns[-1]["role"] == "assistant" else None
        return Prompt(render_prompt(tokenizer, turns, **template_kwargs), last["content"] if last else None)

    def tokens(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens of a text that begins with a prompt; a template writes the begin-of-sequence token itself."""
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=not (self.chat or begun), verbose=False)["input_ids"]

    def _turns(self, columns: Columns) -> list[Message]:
        if columns.get(self.field) is None and columns.get("messages") is not None:
            turns = convert_row(columns, "messages", prompts_only=True)
        else:
            turns = [{"role": "user", "content": read_text(columns, self.field)}]
        if self.system is not None and turns[0]["role"] not in ("system", "developer"):
            turns = [{"role": "system", "content": self.system}, *turns]
        return turns


def context_length(pair: ModelPair, max_length: int | None) -> int | None:
    """Longest sequence in tokens: ``max_length``, else the smaller of what Base and Instruct say, None for no limit.

    Raises:
        DataError: ``max_length`` isn't positive.
        PairError: A config can't be read.
    """
    if max_length is not None:
        if max_length < 1:
            raise DataError(f"max_length is {max_length}; expected at least 1, or null for the model's own.")
        return max_length
    configs = (pair.base_config().get_text_config(), pair.config().get_text_config())
    lengths = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((length for length in lengths if length), default=None)
