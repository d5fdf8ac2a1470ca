"""Multiple choice: which of the given texts does the model find the most probable answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shadowlit.arguments import takes_plain_values
from shadowlit.errors import DataError
from shadowlit.evaluation.evaluator import EvalContext
from shadowlit.evaluation.prompts import PromptEvaluator, Question
from shadowlit.evaluation.rows import Columns, fingerprint, read_choices, read_label
from shadowlit.evaluation.sums import mean


@dataclass(frozen=True)
class _Choice:
    """``targets`` are predicted from position ``start`` on by input number ``source`` of the row."""

    source: int
    start: int
    targets: tuple[int, ...]
    num_characters: int


@dataclass(frozen=True)
class _Item(Question):
    """A row as tokens; ``inputs`` are the different sequences that have to be run for its choices."""

    label: int
    inputs: tuple[tuple[int, ...], ...]
    choices: tuple[_Choice, ...]

    @property
    def length(self) -> int:
        return max(map(len, self.inputs))


@takes_plain_values("evaluator")
class MultipleChoice(PromptEvaluator[_Item]):
    """Scores each choice by its log-likelihood after the question, and takes the most probable one.

    The numbers are those of lm-evaluation-harness' ``multiple_choice`` tasks (of its ``--apply_chat_template`` with
    ``chat``): prompt and choice are tokenised together, and white space at the prompt's end counts as the choice's.
    Choices that differ in their last token only are scored by one forward pass.

    Metrics: ``score`` = ``accuracy``, the fraction of rows whose correct choice has the highest log-likelihood;
    ``accuracy_norm``, the same with log-likelihoods divided by the choice's length in characters (the harness'
    ``acc_norm``); ``loss``, the mean of −log p(correct choice) in nats per row; ``stderr`` of the score;
    ``num_samples``, of which ``num_too_long`` don't fit into ``max_length``: these score 0 and are never cut.

    Samples: ``index``, ``score``, ``prediction`` and ``label`` (numbers of choices, from 0), ``loglikelihoods``; no
    prediction where the row is too long.

    Example::

        MultipleChoice("quiz.jsonl", prompt="question", choices="choices", label="answer")

    Args:
        data: File with the rows: JSONL, JSON or Parquet.
        prompt: The field with the question. A row without it is asked by its ``messages``.
        choices: The field with the list of texts to choose from.
        label: The field with the correct choice: its number from 0, its text, or its letter from A.
        chat: Ask through the Instruct's chat template, with its generation prompt; false for plain text.
        delimiter: Text between question and choice in plain text.
        system: A system turn for questions that have none.
        max_length: Longest prompt with a choice, in tokens; null for the model's own context.
        every: Run in the first validation, in every *n*-th validation after it, and in the last one.
        limit: Number of rows to use, evenly spread over the file; null for all.
        batch_size: Rows per process and forward pass.
    """

    metric_names = ("score", "accuracy", "accuracy_norm", "loss", "stderr", "num_samples", "num_too_long")
    sums = ("accuracy_norm", "loss")
    too_long = (
        "rows of {data} are longer than {_limit_tokens} tokens and score 0. Shorten them, or raise max_length if the "
        "model takes more."
    )

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
        super().__init__(data, prompt, chat, system, max_length, every, limit, batch_size)
        self.choices, self.label = choices, label
        self.delimiter = "" if chat else delimiter

    def signature(self) -> str:
        """Return a hash of the tokenised rows, and of how long they may be."""
        assert self._items is not None, "read() comes before signature()"
        return fingerprint(type(self).__name__, self._items, self._limit_tokens)

    def _item(
        self, index: int, columns: Columns, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]
    ) -> _Item:
        prompt, _ = self._prompt(columns, tokenizer, template_kwargs)
        texts = read_choices(columns, self.choices)
        label = read_label(columns, self.label, texts)
        # As the harness splits: the white space at the prompt's end belongs to the choice.
        num_prompt = len(self._tokens(prompt.rstrip(), tokenizer))
        inputs: dict[tuple[int, ...], int] = {}
        choices = []
        for text in texts:
            tokens = self._tokens(prompt + self.delimiter + text, tokenizer)
            targets = tuple(tokens[num_prompt:])
            if not targets or num_prompt == 0:
                raise DataError(f"has a choice without a token of its own after the prompt: {text!r}. Change the row.")
            source = inputs.setdefault(tuple(tokens[:-1]), len(inputs))
            choices.append(_Choice(source, num_prompt - 1, targets, len(text)))
        return _Item(index, label, tuple(inputs), tuple(choices))

    def _asks(self, context: EvalContext) -> Callable[[list[_Item]], list[list[float]]]:
        assert self._items is not None
        num_forwards = max((len(item.inputs) for item in self._items if not self._is_too_long(item)), default=0)
        return partial(_loglikelihoods, num_forwards=num_forwards, context=context)

    def _judge(self, item: _Item, answer: list[float] | None) -> tuple[dict[str, float], dict[str, Any]]:
        sample: dict[str, Any] = {"score": 0.0, "prediction": None, "label": item.label}
        if answer is None:
            return {}, {**sample, "loglikelihoods": []}
        prediction = answer.index(max(answer))
        per_character = [value / choice.num_characters for value, choice in zip(answer, item.choices, strict=True)]
        score = float(prediction == item.label)
        numbers = {
            "accuracy_norm": float(per_character.index(max(per_character)) == item.label),
            "loss": -answer[item.label],
        }
        return numbers, {**sample, "score": score, "prediction": prediction, "loglikelihoods": answer}

    def _metrics(self, sums: dict[str, float], num_answers: float) -> dict[str, float]:
        count = sums["num_samples"]
        return {
            "accuracy": mean(sums["score"], count),
            "accuracy_norm": mean(sums["accuracy_norm"], count),
            "loss": mean(sums["loss"], num_answers),
        }


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
