"""Answers generated with the weights that are loaded: greedy, or drawn by a sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from shadowlit.training.head import evaluating
from shadowlit.training.parallel import within_forward


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: Text without special tokens, cut before a stop string.
        num_tokens: Number of tokens without the end of turn, but with those of a stop string.
        finished: Whether it ended by an end of turn or a stop string rather than by the limit.
    """

    text: str
    num_tokens: int
    finished: bool


class StopStrings(StoppingCriteria):
    """Ends a row as soon as its generated text, without the ``prompt_length`` tokens of the prompt, has a stop string.

    Attributes:
        lengths: Number of generated tokens at which each row ended; None for rows that have not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int, num_rows: int):
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        self.lengths: list[int | None] = [None] * num_rows
        # A token has a byte at least; some decoders trim the space of the first ones, which mustn't belong to a string.
        self.window = max((len(string.encode()) for string in stop), default=0) + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Return ``[B]``, true for rows that have ended."""
        length = input_ids.shape[1] - self.prompt_length
        tails = input_ids[:, self.prompt_length :][:, -self.window :].tolist()
        for row, tail in enumerate(tails):
            if self.lengths[row] is None:
                text = self.tokenizer.decode(tail)
                if any(string in text for string in self.stop):
                    self.lengths[row] = length
        return torch.tensor([ended is not None for ended in self.lengths], device=input_ids.device)


def greedy_config(folder: Path, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding of at most ``max_new_tokens``, which ends where the Instruct in ``folder`` ends its turns.

    The tokens that end a turn come from ``generation_config.json``, or else from the Instruct's tokenizer.
    """
    stop = None
    if (folder / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(folder).eos_token_id
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop if stop is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        # What is left open is filled from the model: a config made for training may turn the cache off, and a chat
        # model may bring a penalty.
        use_cache=True,
        repetition_penalty=1.0,
    )


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    input_ids: Tensor,
    attention_mask: Tensor,
    images: Mapping[str, Tensor] | None = None,
    *,
    synced_gpus: bool = False,
    stop: Sequence[str] = (),
    sampler: LogitsProcessor | None = None,
) -> list[Answer]:
    """Answer a batch of left-padded prompts ``[B, T]`` with a key-value cache, ``config`` from :func:`greedy_config`.

    Args:
        model: A transformers model, wrapped by peft or sharded or neither.
        tokenizer: Tokenizer that decodes the answers.
        config: Limits and ends of the answers.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 0 on padding.
        images: Outputs of the processor for the prompts' images, by the names of the model's arguments.
        synced_gpus: Whether all ranks generate until the last one is done, which sharded models need.
        stop: Further strings that end an answer.
        sampler: Sampler of the tokens, e.g. a :class:`~shadowlit.evaluation.generated.RowSampler`; None for greedy.
    """
    prompt_length = input_ids.shape[1]
    stopping = StopStrings(tokenizer, stop, prompt_length, len(input_ids))
    with evaluating(model):
        method: Any = model.generate
        answer = partial(
            method,
            input_ids=input_ids,
            attention_mask=attention_mask,
            **(images or {}),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler] if sampler is not None else []),
            stopping_criteria=StoppingCriteriaList([stopping] if stop else []),
            synced_gpus=synced_gpus,
        )
        # peft's generate calls the model within, and so passes by the hooks of the unit that holds the embeddings.
        generated = within_forward(model, answer) if isinstance(model, PeftModel) else answer()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [
        _answer(tokenizer, tokens, ends, length, stop)
        for tokens, length in zip(generated[:, prompt_length:].tolist(), stopping.lengths, strict=True)
    ]


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    ends: list[int | None],
    length: int | None,
    stop: Sequence[str],
) -> Answer:
    """The answer in a row of generated tokens, which padding follows once it has ended."""
    tokens = tokens[:length]
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    assert isinstance(text, str)
    for string in stop:
        text = text.split(string)[0]
    return Answer(text, len(tokens[:end]), finished=end is not None or length is not None)
