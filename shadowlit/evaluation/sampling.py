"""Sampling whose random numbers belong to the rows: neither batches nor ranks nor the training's generator matter."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from shadowlit.grafting.arithmetic import accumulation_dtype


class RowSampler(LogitsProcessor):
    """Draws the next token of each row from its distribution and leaves only that one possible.

    Inverse transform sampling: with ``u`` uniform in [0, 1), the token is the first whose cumulative probability
    exceeds ``u``. The ``u`` of a row's t-th token follows from the seed, the row's number and t alone.

    Args:
        rows: Numbers of the ``B`` rows of the batch.
        seed: Another seed gives other answers.
        temperature: Divides the logits; positive.
        top_p: Only the most probable tokens that have this share of the probability together are drawn.
        prompt_length: Length of the padded prompts, in tokens.
        max_new_tokens: Longest answer, in tokens.
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
