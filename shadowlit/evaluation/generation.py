"""Greedy answers of whatever weights stand in a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase


def greedy_config(folder: Path, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that ends where the Instruct in ``folder`` ends its turns.

    Args:
        folder: the Instruct's folder; its ``generation_config.json`` gives the tokens that end a turn.
        tokenizer: the Instruct's, for the padding token, and the end of a turn where the folder names none.
        max_new_tokens: longest answer, in tokens.
    """
    stop = None
    if (folder / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(folder).eos_token_id
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop if stop is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    input_ids: Tensor,
    attention_mask: Tensor,
    synced_gpus: bool = False,
) -> list[str]:
    """Answer a batch of prompts.

    Args:
        model: a transformers model, wrapped by peft or sharded or neither; evaluated with a key-value cache.
        tokenizer: turns the generated tokens into text, without special tokens.
        config: see :func:`greedy_config`.
        input_ids: ``[B, T]``, left-padded.
        attention_mask: ``[B, T]``, 0 on padding.
        synced_gpus: keep all ranks generating until the last one is done, which sharded models need.

    Returns:
        ``B`` answers.
    """
    was_training = model.training
    model.eval()
    try:
        generated = model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config, synced_gpus=synced_gpus
        )
    finally:
        model.train(was_training)
    return tokenizer.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
