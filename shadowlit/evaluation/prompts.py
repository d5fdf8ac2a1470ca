"""How an evaluation asks: rows to prompts, as text and as tokens, and what becomes of their answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from shadowlit.data.formats import Message, convert_row
from shadowlit.data.template import render_prompt
from shadowlit.errors import DataError
from shadowlit.evaluation.evaluator import EvalContext, EvalResult, Evaluator
from shadowlit.evaluation.rows import Columns, read_items, read_text
from shadowlit.evaluation.sums import SampleSums
from shadowlit.pair.pair import ModelPair
from shadowlit.training.metrics import on_device


class Prompt(NamedTuple):
    """What the model reads, and the assistant's turn at the end of the row's messages, which it isn't shown."""

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


@dataclass(frozen=True)
class Question:
    """A row of the file, asked as one or several sequences of tokens."""

    index: int

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        raise NotImplementedError


Item = TypeVar("Item", bound=Question)


class PromptEvaluator(Evaluator, Generic[Item]):
    """Asks the questions of a file and judges every answer by itself; rows that are too long score 0, uncut."""

    sums: ClassVar[tuple[str, ...]]  # names of the numbers that _judge gives, besides num_too_long
    too_long: ClassVar[str]  # what the warning says of the rows, with the evaluator's attributes in braces

    def __init__(
        self, data: str, asking: Asking, max_length: int | None, every: int, limit: int | None, batch_size: int
    ) -> None:
        super().__init__(every, limit, batch_size)
        self.data, self.asking, self.max_length = data, asking, max_length
        self._items: list[Item] | None = None
        self._limit_tokens: int | None = None

    def read(self, pair: ModelPair, template_kwargs: dict[str, Any]) -> None:
        """Read and tokenise the rows.

        Raises:
            DataError: No rows, missing, empty or wrong fields, or a refusal of the chat template, up to five problems
                in one message; or no prompt could be short enough.
        """
        self._limit_tokens = self._longest(pair)
        items = read_items(
            self.data, self.limit, partial(self._item, tokenizer=pair.tokenizer(), template_kwargs=template_kwargs)
        )
        # Rows of like length share a batch; the longest first, so that memory runs out at once or never.
        self._items = sorted(items, key=lambda item: -item.length)
        if num_too_long := sum(map(self._is_too_long, items)):
            rank_zero_warn(f"{num_too_long} of {len(items)} {self.too_long.format_map(vars(self))}")

    def run(self, context: EvalContext) -> EvalResult:
        """Ask and judge; a collective, to be called on all ranks alike."""
        assert self._items is not None, "read() comes before run()"
        sums = on_device(SampleSums(*self.sums, "num_too_long"), context.device)
        ask = self._asks(context)
        samples: list[dict[str, Any]] = []
        for rows in self.rank_batches(len(self._items), context):
            own = [self._items[row] for row in rows if row >= 0]
            fitting = [item for item in own if not self._is_too_long(item)]
            answers = dict(zip((item.index for item in fitting), ask(fitting), strict=True))
            batch = [self._judge(item, answers.get(item.index)) for item in own]
            sums.update([numbers for numbers, _ in batch])
            samples += [{"index": item.index, **sample} for item, (_, sample) in zip(own, batch, strict=True)]
        return EvalResult(self._metrics(sums.compute()), sorted(samples, key=lambda sample: sample["index"]))

    def _longest(self, pair: ModelPair) -> int | None:
        """The longest question in tokens; None for any."""
        return context_length(pair, self.max_length)

    def _is_too_long(self, item: Item) -> bool:
        return self._limit_tokens is not None and item.length > self._limit_tokens

    @abstractmethod
    def _item(
        self, index: int, columns: Columns, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]
    ) -> Item:
        """The question in a row."""

    @abstractmethod
    def _asks(self, context: EvalContext) -> Callable[[list[Item]], list[Any]]:
        """A function from a batch of questions to their answers, which ranks call equally often."""

    @abstractmethod
    def _judge(self, item: Item, answer: Any) -> tuple[dict[str, float], dict[str, Any]]:
        """The numbers of a row that are summed, and what is shown of it; the answer is None where it is too long."""

    @abstractmethod
    def _metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics, from the sums over all rows."""
