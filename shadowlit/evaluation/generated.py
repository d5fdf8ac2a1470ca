"""Generated answers: does the model give the right one when it is asked?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase, TopPLogitsWarper

from shadowlit.arguments import takes_plain_values
from shadowlit.data.collate import PromptCollate
from shadowlit.errors import DataError
from shadowlit.evaluation.evaluator import EvalContext
from shadowlit.evaluation.matching import Match, Matcher
from shadowlit.evaluation.prompts import PromptEvaluator, Question
from shadowlit.evaluation.rows import Columns, fingerprint, read_field
from shadowlit.evaluation.sums import mean
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.pair.pair import ModelPair
from shadowlit.training.generation import Answer, generate, greedy_config

_SANITY_TOKENS = 4  # of an answer in the sanity check: the first one, and some with a cache


@dataclass(frozen=True)
class _Item(Question):
    """A row: what is asked, as text and tokens, and the answers that are right."""

    prompt: str
    tokens: tuple[int, ...]
    references: tuple[str, ...]

    @property
    def length(self) -> int:
        return len(self.tokens)


@takes_plain_values("evaluator")
class Generation(PromptEvaluator[_Item]):
    r"""Generates an answer to every question, and compares it with a reference.

    Greedy unless ``temperature`` is positive. Sampled answers follow from ``seed`` and the row's number in the file:
    they are the same in every validation whose weights are the same, on any number of processes and with any batch
    size, up to roundings of the forward pass, and take nothing from the training's random numbers.

    Metrics: ``score``, the fraction of correct answers; ``stderr``, its standard error; ``num_samples``, of which
    ``num_too_long`` have a prompt that leaves no room for ``max_new_tokens`` in ``max_length`` (these score 0 and are
    never cut); ``num_unfinished``, the answers that were cut at ``max_new_tokens`` (they are scored as they are), and
    ``unfinished``, their fraction of all answers; ``answer_tokens``, the mean length of an answer.

    Samples: ``index``, ``score``, ``prompt`` as the model reads it, ``answer``, ``reference`` (a list where there are
    several), ``finished``; ``too_long`` for prompts that weren't asked.

    Example::

        Generation("math.jsonl", prompt="question", answer="answer", match="numeric", max_new_tokens=256)

    Args:
        data: File with the rows: JSONL, JSON or Parquet.
        prompt: The field with the question. A row without it is asked by its ``messages``, whose last turn isn't shown
            to the model if it is the assistant's.
        answer: The field with the reference: a text or number, or a list of which any is correct. Null for the
            assistant's turn at the end of ``messages``.
        match: How answers are compared. ``exact``: the same text; ``numeric``: the same last number; ``contains``: the
            reference is part of the answer; ``regex``: ``pattern`` is found in the answer. White space around an answer
            never counts.
        pattern: For ``match: regex``; ``{answer}`` in it stands for the escaped reference, e.g. ``'^{answer}(?!\w)'``.
            Without it, no reference is needed, e.g. ``'(?i)^sorry\b'``.
        extract: A regular expression whose last match (its first group) is compared in the answer's place; an answer
            without a match is wrong. Null for the whole answer.
        ignore_case: Whether upper and lower case are treated alike.
        ignore_punctuation: Whether ASCII punctuation is removed from answer and reference.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 for greedy decoding; otherwise the logits are divided by it, and tokens are sampled.
        top_p: Total probability of the most probable tokens from which one is sampled.
        seed: Seed for sampled answers.
        stop: Strings that end an answer, in addition to the Instruct's own end of turn; they aren't part of it.
        chat: Ask through the Instruct's chat template, with its generation prompt; false for plain text.
        system: A system turn for conversations that have none.
        max_length: Longest prompt with its answer, in tokens; null for the model's own context.
        every: Run in the first validation, in every *n*-th validation after it, and in the last one.
        limit: Number of rows to use, evenly spread over the file; null for all.
        batch_size: Rows per process and forward pass.
    """

    metric_names = (
        "score", "stderr", "num_samples", "num_too_long", "num_unfinished", "unfinished", "answer_tokens",
    )  # fmt: skip
    sums = ("num_unfinished", "answer_tokens")
    too_long = (
        "prompts of {data} have more than {_limit_tokens} tokens, so that no {max_new_tokens} fit behind them, and "
        "score 0. Lower max_new_tokens, or shorten them."
    )

    def __init__(
        self,
        data: str,
        prompt: str = "question",
        answer: str | None = None,
        match: Match = "exact",
        pattern: str | None = None,
        extract: str | None = None,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: list[str] | None = None,
        chat: bool = True,
        system: str | None = None,
        max_length: int | None = None,
        every: int = 1,
        limit: int | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(data, prompt, chat, system, max_length, every, limit, batch_size)
        self.answer = answer
        self.matcher = Matcher(match, pattern, extract, ignore_case, ignore_punctuation)
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.stop = stop or []
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
        if temperature < 0:
            raise DataError(f"temperature is {temperature}; expected 0 for greedy answers, or a positive number.")
        if not 0 < top_p <= 1:
            raise DataError(f"top_p is {top_p}; expected a share above 0 and at most 1.")
        if top_p < 1 and temperature == 0:
            raise DataError(f"top_p is {top_p} with temperature=0, which draws nothing. Set temperature=1 or top_p=1.")
        if not all(self.stop):
            raise DataError("stop holds an empty string, which would end every answer at once. Remove it.")

    def signature(self) -> str:
        """Return a hash of the tokenised rows and of all settings that change an answer or its score."""
        assert self._items is not None, "read() comes before signature()"
        sampling = (self.temperature, self.top_p, self.seed) if self.temperature else "greedy"
        settings = (self.matcher, self.max_new_tokens, self._limit_tokens, self.stop, sampling)
        return fingerprint(type(self).__name__, self._items, *settings)

    def _item(
        self, index: int, columns: Columns, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]
    ) -> _Item:
        prompt, last = self._prompt(columns, tokenizer, template_kwargs)
        own = () if last is None else (last,)
        references = own if self.answer is None else _references(columns, self.answer)
        self.matcher.check(references)
        return _Item(index, prompt, tuple(self._tokens(prompt, tokenizer)), references)

    def _longest(self, pair: ModelPair) -> int | None:
        context = super()._longest(pair)
        if context is not None and self.max_new_tokens >= context:
            raise DataError(
                f"max_new_tokens is {self.max_new_tokens}, which leaves no room for a prompt in {context} tokens. "
                "Lower it, or raise max_length if the model takes more."
            )
        return None if context is None else context - self.max_new_tokens

    def _asks(self, context: EvalContext) -> Callable[[list[_Item]], list[Answer]]:
        num_tokens = self.max_new_tokens if context.num_rows is None else min(self.max_new_tokens, _SANITY_TOKENS)
        config = greedy_config(context.pair.template_folder(), context.pair.tokenizer(), num_tokens)
        return partial(self._answers, config=config, context=context)

    def _answers(self, items: Sequence[_Item], config: GenerationConfig, context: EvalContext) -> list[Answer]:
        """The answers; one call of the model's generation in any case, since ranks wait for each other in it."""
        tokenizer = context.pair.tokenizer()
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        rows = [{"input_ids": list(item.tokens), "index": item.index} for item in items]
        if not rows:
            # A rank without rows takes one step, and follows the others' for as long as they need.
            config = copy(config)
            config.max_new_tokens = 1
            rows = [{"input_ids": [pad], "index": -1}]
        batch = PromptCollate(pad)(rows)
        sampler = None
        if self.temperature:
            sampler = RowSampler(
                batch["index"].tolist(),
                seed=self.seed,
                temperature=self.temperature,
                top_p=self.top_p,
                prompt_length=batch["input_ids"].shape[1],
                max_new_tokens=self.max_new_tokens,
            )
        with context.autocast():
            answers = generate(
                context.model,
                tokenizer,
                config,
                batch["input_ids"].to(context.device),
                batch["attention_mask"].to(context.device),
                synced_gpus=context.world_size > 1,
                stop=self.stop,
                sampler=sampler,
            )
        return answers[: len(items)]

    def _judge(self, item: _Item, answer: Answer | None) -> tuple[dict[str, float], dict[str, Any]]:
        reference = item.references[0] if len(item.references) == 1 else list(item.references)
        sample = {"score": 0.0, "prompt": item.prompt, "answer": "", "reference": reference}
        if answer is None:
            return {}, {**sample, "finished": False, "too_long": True}
        score = float(self.matcher.is_match(answer.text, item.references))
        numbers = {"num_unfinished": float(not answer.finished), "answer_tokens": answer.num_tokens}
        return numbers, {**sample, "score": score, "answer": answer.text, "finished": answer.finished}

    def _metrics(self, sums: dict[str, float], num_answers: float) -> dict[str, float]:
        return {
            "num_unfinished": sums["num_unfinished"],
            "unfinished": mean(sums["num_unfinished"], num_answers),
            "answer_tokens": mean(sums["answer_tokens"], num_answers),
        }


class RowSampler(LogitsProcessor):
    """Draws the next token of each row from its distribution and leaves only that one possible.

    Inverse transform sampling: with ``u`` uniform in [0, 1), the token is the first whose cumulative probability
    exceeds ``u``. The ``u`` of a row's t-th token follows from the seed, the row's number and t alone, independent of
    batches, ranks and the training's generator. Options as of :class:`Generation`; ``rows`` are the numbers of the
    batch's rows, and ``prompt_length`` is the length of the padded prompts in tokens.
    """

    def __init__(
        self,
        rows: Sequence[int],
        *,
        seed: int,
        temperature: float,
        top_p: float,
        prompt_length: int,
        max_new_tokens: int,
    ) -> None:
        self.temperature, self.prompt_length = temperature, prompt_length
        self.warp = TopPLogitsWarper(top_p) if top_p < 1 else None
        generators = [random.Random(f"{seed} {row}") for row in rows]
        self.uniform = torch.tensor([[g.random() for _ in range(max_new_tokens)] for g in generators]).double()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``[B, V]`` logits: 0 for the drawn token, -inf for all others."""
        scores = scores / self.temperature
        if self.warp is not None:
            scores = self.warp(input_ids, scores)
        cumulative = torch.softmax(scores.to(accumulation_dtype(scores.device)), dim=-1).cumsum(dim=-1)
        step = input_ids.shape[1] - self.prompt_length
        drawn = self.uniform[:, step, None].to(cumulative) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, drawn, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def _references(columns: Columns, name: str) -> tuple[str, ...]:
    """The references in field ``name``: a text, a number, or a list of them."""
    value = read_field(columns, name)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in values):
        raise DataError(f"has {value!r} in '{name}'; expected a text, a number or a list of them. Correct it.")
    return tuple(map(str, values))
