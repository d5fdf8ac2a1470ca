"""Multiple choice: which of the given texts does the model find the most probable answer?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shadowlit.errors import DataError
from shadowlit.evaluation.evaluator import EvalContext, EvalResult, Evaluator
from shadowlit.evaluation.prompts import Asking, context_length
from shadowlit.evaluation.rows import Columns, fingerprint, read_choices, read_items, read_label
from shadowlit.evaluation.sums import SampleSums, mean, standard_error
from shadowlit.pair.pair import ModelPair
from shadowlit.training.metrics import on_device


@dataclass(frozen=True)
class _Choice:
    """``targets`` are predicted from position ``start`` on by input number ``source`` of the row."""

    source: int
    start: int
    targets: tuple[int, ...]
    num_characters: int


@dataclass(frozen=True)
class _Item:
    """A row as tokens; ``inputs`` are the different sequences that have to be run for its choices."""

    index: int
    label: int
    inputs: tuple[tuple[int, ...], ...]
    choices: tuple[_Choice, ...]

    @property
    def length(self) -> int:
        return max(map(len, self.inputs))


class MultipleChoice(Evaluator):
    """Scores each choice by its log-likelihood after the question, and takes the most probable one.

    The numbers are those of lm-evaluation-harness' ``multiple_choice`` tasks (of its ``--apply_chat_template`` with
    ``chat``): prompt and choice are tokenised together, and white space at the prompt's end counts as the choice's.
    Choices that differ in their last token only are scored by one forward pass.

    Metrics: ``score`` = ``accuracy``, the share of rows whose right choice has the highest log-likelihood;
    ``accuracy_norm``, the same with log-likelihoods divided by the choice's length in characters (the harness'
    ``acc_norm``); ``loss``, the mean of −log p(right choice) in nats per row; ``stderr`` of the score;
    ``num_samples``, of which ``num_too_long`` don't fit into ``max_length``: these score 0 and are never cut.

    Samples: ``index``, ``score``, ``prediction`` and ``label`` (numbers of choices, from 0), ``loglikelihoods``; no
    prediction where the row is too long.

    Example::

        MultipleChoice("quiz.jsonl", prompt="question", choices="choices", label="answer")

    Args:
        data: File with the rows: JSONL, JSON or Parquet.
        prompt: The field with the question. A row without it is asked by its ``messages``.
        choices: The field with the list of texts to choose from.
        label: The field with the right one: its number from 0, its text, or its letter from A.
        chat: Ask through the Instruct's chat template, with its generation prompt; false for plain text.
        delimiter: What stands between question and choice in plain text.
        system: A system turn for questions that have none.
        max_length: Longest prompt with a choice, in tokens; null for the model's own context.
        every: Run in the first validation, in every *n*-th validation after it, and in the last one.
        limit: Use only so many rows, evenly spread over the file; null for all.
        batch_size: Rows per process and forward.
    """

    def __init__(
        self,
        data: str,
        prompt: str = "question",
        choices: str = "choices",
        label: str = "answer",
        chat: bool = True,
        delimiter: str = " ",
        system: str | None = None,
        max_length: int | None = None,
        every: int = 1,
        limit: int | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(every, limit, batch_size)
        self.data, self.choices, self.label = data, choices, label
        self.asking = Asking(prompt, chat, system)
        self.delimiter = "" if chat else delimiter
        self.max_length = max_length
        self._items: list[_Item] | None = None
        self._limit_tokens: int | None = None

    def read(self, pair: ModelPair, template_kwargs: dict[str, Any]) -> None:
        """Read and tokenise the rows.

        Raises:
            DataError: No rows, missing or empty fields, fewer than two choices or equal ones, a label that is none of
                them, or a refusal of the chat template; up to five problems in one message.
        """
        self._limit_tokens = context_length(pair, self.max_length)
        items = read_items(
            self.data, self.limit, partial(self._item, tokenizer=pair.tokenizer(), template_kwargs=template_kwargs)
        )
        # Rows of like length share a batch; the longest first, so that memory runs out at once or never.
        self._items = sorted(items, key=lambda item: -item.length)
        num_too_long = sum(map(self._is_too_long, items))
        if num_too_long:
            rank_zero_warn(
                f"{num_too_long} of {len(items)} rows of {self.data} are longer than {self._limit_tokens} tokens and "
                "score 0. Shorten them, or raise max_length if the model takes more."
            )

    def run(self, context: EvalContext) -> EvalResult:
        """Score the rows; a collective, to be called on all ranks alike."""
        assert self._items is not None, "read() comes before run()"
        sums = on_device(SampleSums("score", "squares", "accuracy_norm", "loss", "num_too_long"), context.device)
        num_forwards = max((len(item.inputs) for item in self._items if not self._is_too_long(item)), default=0)
        samples: list[dict[str, Any]] = []
        for rows in self.rank_batches(len(self._items), context):
            own = [self._items[row] for row in rows if row >= 0]
            fitting = [item for item in own if not self._is_too_long(item)]
            scores = _loglikelihoods(fitting, num_forwards, context)
            found = dict(zip((item.index for item in fitting), scores, strict=True))
            batch = [_judge(item, found.get(item.index)) for item in own]
            sums.update([numbers for numbers, _ in batch])
            samples += [sample for _, sample in batch]
        return EvalResult(_metrics(sums.compute()), sorted(samples, key=lambda sample: sample["index"]))

    def signature(self) -> str:
        """A hash of the tokenised rows, and of how long they may be."""
        assert self._items is not None, "read() comes before signature()"
        return fingerprint(type(self).__name__, self._items, self._limit_tokens)

    def _item(
        self, index: int, columns: Columns, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]
    ) -> _Item:
        prompt = self.asking.prompt(columns, tokenizer, template_kwargs).text
        texts = read_choices(columns, self.choices)
        label = read_label(columns, self.label, texts)
        # As the harness splits: the white space at the prompt's end belongs to the choice.
        num_prompt = len(self.asking.tokens(prompt.rstrip(), tokenizer))
        inputs: dict[tuple[int, ...], int] = {}
        choices = []
        for text in texts:
            tokens = self.asking.tokens(prompt + self.delimiter + text, tokenizer)
            targets = tuple(tokens[num_prompt:])
            if not targets or num_prompt == 0:
                raise DataError(f"has a choice without a token of its own after the prompt: {text!r}. Change the row.")
            source = inputs.setdefault(tuple(tokens[:-1]), len(inputs))
            choices.append(_Choice(source, num_prompt - 1, targets, len(text)))
        return _Item(index, label, tuple(inputs), tuple(choices))

    def _is_too_long(self, item: _Item) -> bool:
        return self._limit_tokens is not None and item.length > self._limit_tokens


def _loglikelihoods(items: Sequence[_Item], num_forwards: int, context: EvalContext) -> list[list[float]]:
    """The log-likelihoods of each item's choices; always ``num_forwards`` forward passes, since ranks wait for them."""
    found = [torch.zeros(len(item.choices), dtype=torch.float64) for item in items]
    for source in range(num_forwards):
        asked = [i for i, item in enumerate(items) if source < len(item.inputs)]
        tokens, mask = _pad([items[i].inputs[source] for i in asked] or [(0,)], context.device)
        # Every token of every choice that is answered by these inputs: where it is predicted, and whose it is.
        places = [
            (row * tokens.shape[1] + choice.start + offset, token, i, number)
            for row, i in enumerate(asked)
            for number, choice in enumerate(items[i].choices)
            if choice.source == source
            for offset, token in enumerate(choice.targets)
        ]
        positions, targets = (
            torch.tensor([place[k] for place in places], dtype=torch.int64, device=context.device) for k in (0, 1)
        )
        losses = context.token_losses(tokens, mask, positions, targets).tolist()
        for loss, (_, _, i, number) in zip(losses, places, strict=True):
            found[i][number] -= loss
    return [values.tolist() for values in found]


def _pad(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask ``[B, T]``, padded on the right."""
    length = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return tokens, mask


def _judge(item: _Item, loglikelihoods: list[float] | None) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of a row that are summed, and what is shown of it."""
    sample: dict[str, Any] = {"index": item.index, "score": 0.0, "prediction": None, "label": item.label}
    if loglikelihoods is None:
        return {"num_too_long": 1}, {**sample, "loglikelihoods": []}
    prediction = _best(loglikelihoods)
    per_character = [value / choice.num_characters for value, choice in zip(loglikelihoods, item.choices, strict=True)]
    score = float(prediction == item.label)
    numbers = {
        "score": score,
        "squares": score,
        "accuracy_norm": float(_best(per_character) == item.label),
        "loss": -loglikelihoods[item.label],
    }
    return numbers, {**sample, "score": score, "prediction": prediction, "loglikelihoods": loglikelihoods}


def _best(values: list[float]) -> int:
    """Index of the highest value; the first of equal ones."""
    return values.index(max(values))


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    count = sums["num_samples"]
    score = mean(sums["score"], count)
    return {
        "score": score,
        "accuracy": score,
        "accuracy_norm": mean(sums["accuracy_norm"], count),
        "loss": mean(sums["loss"], count - sums["num_too_long"]),
        "stderr": standard_error(sums["score"], sums["squares"], count),
        "num_samples": count,
        "num_too_long": sums["num_too_long"],
    }
