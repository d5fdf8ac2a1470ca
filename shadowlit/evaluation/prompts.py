"""Evaluators that ask the questions in the rows of a file: prompts as text and tokens, and means over the answers."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from shadowlit.data.formats import convert_row
from shadowlit.data.template import render_prompt
from shadowlit.data.tokens import tokens_of
from shadowlit.data.turns import read_tools
from shadowlit.errors import DataError, counted
from shadowlit.evaluation.evaluator import EvalContext, EvalResult, Evaluator
from shadowlit.evaluation.rows import Columns, read_items, read_text
from shadowlit.evaluation.sums import SampleSums, mean, standard_error
from shadowlit.pair.pair import ModelPair
from shadowlit.training.metrics import on_device


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

    sums: ClassVar[tuple[str, ...]]  # names of the numbers that _judge gives
    too_long: ClassVar[str]  # what the warning says of the rows, with the evaluator's attributes in braces

    def __init__(
        self,
        data: str,
        prompt: str,
        chat: bool,
        system: str | None,
        max_length: int | None,
        every: int,
        limit: int | None,
        batch_size: int,
        few_shot: int = 0,
        few_shot_data: str | None = None,
        few_shot_seed: int = 0,
    ) -> None:
        super().__init__(every, limit, batch_size)
        if system is not None and not chat:
            raise DataError(f"system={system!r} is set with chat=false, which has no turns. Leave one out.")
        self.data, self.prompt, self.chat, self.system, self.max_length = data, prompt, chat, system, max_length
        if few_shot < 0 or bool(few_shot) != (few_shot_data is not None):
            raise DataError(
                f"few_shot is {few_shot} and few_shot_data is {few_shot_data!r}; expected a number of examples and the "
                "file that they are taken from, e.g. the training data, or neither."
            )
        self.few_shot, self.few_shot_data, self.few_shot_seed = few_shot, few_shot_data, few_shot_seed
        self._examples: tuple[tuple[str, str], ...] = ()  # questions and answers
        self._items: list[Item] | None = None
        self._limit_tokens: int | None = None

    def read(self, pair: ModelPair, template_kwargs: dict[str, Any]) -> None:
        """Read and tokenise the rows.

        Raises:
            DataError: No rows, missing, empty or wrong fields, or a refusal of the chat template, up to five problems
                in one message; or no prompt could be short enough.
        """
        self._limit_tokens = self._longest(pair)
        self._examples = self._chosen_examples()
        items = read_items(
            self.data, self.limit, partial(self._item, tokenizer=pair.tokenizer(), template_kwargs=template_kwargs)
        )
        # Rows of like length share a batch; the longest first, so that memory runs out at once or never.
        self._items = sorted(items, key=lambda item: -item.length)
        if num_too_long := sum(map(self._is_too_long, items)):
            rank_zero_warn(f"{num_too_long} of {len(items)} {self.too_long.format_map(vars(self))}")

    def run(self, context: EvalContext) -> EvalResult:
        """Ask the questions and judge the answers; a collective, which all ranks must call."""
        assert self._items is not None, "read() comes before run()"
        sums = on_device(SampleSums("score", "squares", "num_too_long", *self.sums), context.device)
        ask = self._asks(context)
        samples: list[dict[str, Any]] = []
        for rows in self.rank_batches(len(self._items), context):
            own = [self._items[row] for row in rows if row >= 0]
            fitting = [item for item in own if not self._is_too_long(item)]
            answers = dict(zip((item.index for item in fitting), ask(fitting), strict=True))
            batch = [self._judge(item, answers.get(item.index)) for item in own]
            for item, (numbers, sample) in zip(own, batch, strict=True):
                numbers["num_too_long"] = float(item.index not in answers)
                numbers["score"], numbers["squares"] = sample["score"], sample["score"] ** 2
                samples.append({"index": item.index, **sample})
            sums.update([numbers for numbers, _ in batch])
        total = sums.compute()
        count, num_too_long = total["num_samples"], total["num_too_long"]
        metrics = {
            "score": mean(total["score"], count),
            "stderr": standard_error(total["score"], total["squares"], count),
            "num_samples": count,
            "num_too_long": num_too_long,
            **self._metrics(total, count - num_too_long),
        }
        return EvalResult(metrics, sorted(samples, key=lambda sample: sample["index"]))

    def _prompt(
        self, columns: Columns, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
    ) -> tuple[str, str | None]:
        """The prompt of a row, and the assistant's turn at the end of its messages, which the model isn't shown."""
        if not self.chat:
            texts = [f"{question}{self._gap}{answer}\n\n" for question, answer in self._examples]
            return "".join([*texts, read_text(columns, self.prompt)]), None
        tools = None
        if columns.get(self.prompt) is None and columns.get("messages") is not None:
            turns, tools = read_tools(columns, convert_row(columns, "messages", prompts_only=True))
        else:
            turns = [{"role": "user", "content": read_text(columns, self.prompt)}]
        if self.system is not None and turns[0]["role"] not in ("system", "developer"):
            turns = [{"role": "system", "content": self.system}, *turns]
        first = int(turns[0]["role"] in ("system", "developer"))
        shown: list[dict[str, Any]] = [
            {"role": role, "content": text}
            for example in self._examples
            for role, text in zip(("user", "assistant"), example, strict=True)
        ]
        turns = [*turns[:first], *shown, *turns[first:]]
        answer = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
        return render_prompt(tokenizer, turns, **{"tools": tools, **template_kwargs}), answer

    @property
    def _gap(self) -> str:
        """Text between an example's question and its answer in plain text."""
        return " "

    def _chosen_examples(self) -> tuple[tuple[str, str], ...]:
        """Draw the examples: the same ones for every question and model, none of them a question that is asked."""
        if self.few_shot_data is None:
            return ()
        asked = set(read_items(self.data, None, lambda _, columns: _plain(self._question(columns))))
        pool = read_items(
            self.few_shot_data, None, lambda _, columns: (self._question(columns), self._example_answer(columns))
        )
        first = {_plain(question): (question, answer) for question, answer in reversed(pool)}  # of each question
        others = [first[key] for key in dict.fromkeys(_plain(question) for question, _ in pool) if key not in asked]
        if len(others) < self.few_shot:
            raise DataError(
                f"few_shot is {self.few_shot}, but {self.few_shot_data} has {counted(len(others), 'row')} with a "
                f"question that is not in {self.data}; examples may not be questions that are asked. Lower few_shot, "
                "or give another file."
            )
        return tuple(random.Random(self.few_shot_seed).sample(others, self.few_shot))

    def _question(self, columns: Columns) -> str:
        """The text of a row's question: its field, or the last turn of the user in its messages."""
        if columns.get(self.prompt) is None and columns.get("messages") is not None:
            turns = [turn for turn in convert_row(columns, "messages", prompts_only=True) if turn["role"] == "user"]
            if turns:
                return turns[-1]["content"]
        return read_text(columns, self.prompt)

    @abstractmethod
    def _example_answer(self, columns: Columns) -> str:
        """The right answer to the question in a row, as an example shows it."""

    def _tokens(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens of a text that begins with a prompt; a chat template writes the begin-of-sequence token itself."""
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokens_of(tokenizer, text, add_special_tokens=not (self.chat or begun))

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
        """Numbers of a row that are summed, and its sample with the score; the answer is None where it is too long."""

    @abstractmethod
    def _metrics(self, sums: dict[str, float], num_answers: float) -> dict[str, float]:
        """Further metrics, from the sums over all rows."""


def _plain(question: str) -> str:
    """A question by which it is recognised whatever its white space and capitals are."""
    return " ".join(question.split()).casefold()


def context_length(pair: ModelPair, max_length: int | None) -> int | None:
    """Return the longest sequence in tokens: ``max_length``, else the smaller limit of Base and Instruct, None without
    one.

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
