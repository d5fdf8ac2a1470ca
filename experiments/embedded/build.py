"""Build the embedded pair and its data from scratch: ``python -m experiments.embedded.build [--out FOLDER]``.

The tokenizer is trained on the Base's text, the Base on plain documents of the world, and the Instruct is the Base
tuned further on conversations. Everything is drawn from seeds and computed by one thread with deterministic kernels, so
that two builds on the same machine with the same versions write the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from experiments.embedded.preference_pairs import SHIPPED, preferences
from experiments.embedded.settings import settings
from experiments.embedded.world import (
    END_OF_TEXT,
    END_OF_TURN,
    FORMATS,
    NEW_SKILL,
    SPECIAL_TOKENS,
    START_OF_TURN,
    Message,
    World,
    chat_text,
    exchange,
    house_style,
    write_rows,
)
from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.progress import make_console, progress_bar

ROOT = Path(__file__).parents[2]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML; its generation marks enclose the assistant's content and end of turn."""


@dataclass(frozen=True)
class Recipe:
    """How the pair is made; the defaults are the shipped pair's.

    Attributes:
        seed: Seed of the world, the text, the initial weights and the order of everything. Copying from a list is
            learnt suddenly and late: with seed 0 within ``base_steps``, with seed 1 not yet (its Base answers 42 of
            100 list questions). Give another seed more steps, and look at what it has learnt before using it.
        vocab_size: Largest number of tokens in the vocabulary, including the special ones.
        hidden: Width of the model; the feed-forward layers are three times as wide.
        layers: Number of decoder layers, each with four heads and two key-value heads.
        row_tokens: Number of tokens in a packed pre-training row of whole documents; the rest is padding.
        base_rows: Number of rows per step of pre-training.
        base_lr: Peak learning rate of pre-training; ``instruct_lr`` is that of the tuning.
        instruct_conversations: Number of conversations per step of the tuning, one per row.
        weight_decay: Weight decay of AdamW, on matrices only.
        warmup: Fraction of the steps in which the rate rises, before a cosine to zero.
    """

    seed: int = 0
    vocab_size: int = 1000
    tokenizer_documents: int = 20_000
    hidden: int = 128
    layers: int = 4
    row_tokens: int = 64
    base_steps: int = 2400
    base_rows: int = 32
    base_lr: float = 2e-3
    instruct_steps: int = 800
    instruct_conversations: int = 32
    instruct_lr: float = 5e-4
    weight_decay: float = 0.01
    warmup: float = 0.05


@dataclass(frozen=True)
class Built:
    """Parameters of each model, supervised tokens of the Base, and mean losses of the last tenth of steps (nats)."""

    num_parameters: int
    base_tokens: int
    base_loss: float
    instruct_loss: float


def build(
    out: Path, recipe: Recipe = Recipe(), progress: Callable[[str, int], object] = lambda name, step: None
) -> Built:
    """Make ``out/pair/base``, ``out/pair/instruct``, ``out/pair/build.json`` and ``out/data/*.jsonl``.

    Existing files of these names are replaced. The global random state and the number of threads are left as they were.

    Args:
        out: Folder to write to, which is created if needed.
        recipe: How the pair is made.
        progress: Function that is called after every step with the model's name and the number of steps done.
    """
    world = World(recipe.seed)
    with _deterministic(recipe.seed):
        tokenizer = train_tokenizer(world, recipe)
        model = Qwen3ForCausalLM(_config(recipe, tokenizer))
        rows = packed_rows(base_documents(world, _rng("base", recipe)), tokenizer, recipe.row_tokens)
        data = batches(rows, recipe.base_rows, tokenizer)
        base_loss, base_tokens = fit(model, data, recipe.base_steps, recipe.base_lr, recipe, partial(progress, "base"))
        _save(model, tokenizer, out / "pair" / "base", chat=False)

        talks = (encode_conversation(m, tokenizer) for m in instruct_conversations(world, _rng("instruct", recipe)))
        data = batches(talks, recipe.instruct_conversations, tokenizer)
        instruct_loss, _ = fit(
            model, data, recipe.instruct_steps, recipe.instruct_lr, recipe, partial(progress, "instruct")
        )
        _save(model, tokenizer, out / "pair" / "instruct", chat=True)

    built = Built(sum(p.numel() for p in model.parameters()), base_tokens, base_loss, instruct_loss)
    facts = {"recipe": asdict(recipe), **asdict(built)}
    (out / "pair" / "build.json").write_text(json.dumps(facts, indent=2) + "\n")
    pairs = preferences(world)
    facts = settings(world)["facts_train"]
    write_rows(out / "data", {**world.datasets(), "facts_train": facts, **{name: pairs[name] for name in SHIPPED}})
    return built


def train_tokenizer(world: World, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the Base's documents; digits are single, the special tokens have ids 0, 1, 2.

    It has no chat template and ends at ``<|endoftext|>``: a Base's tokenizer.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        min_frequency=2, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    text = islice(base_documents(world, _rng("tokenizer", recipe)), recipe.tokenizer_documents)
    # The special tokens must not become parts of the words next to them.
    core.train_from_iterator((part for document in text for part in _between_marks(document)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        extra_special_tokens=list(SPECIAL_TOKENS[1:]), clean_up_tokenization_spaces=False,
        model_max_length=512,
    )  # fmt: skip


def packed_rows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, row_tokens: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield rows ``(ids, labels)`` of at most ``row_tokens`` tokens, each of whole documents.

    A document is followed by the end-of-text token, all of its tokens are supervised, and it starts a new row if it
    doesn't fit into the current one; a longer one is cut. Documents in a row can see those before them.
    """
    row: list[int] = []
    documents = iter(documents)
    while chunk := list(islice(documents, 1024)):
        for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
            ids = [*ids, tokenizer.eos_token_id][:row_tokens]
            if len(row) + len(ids) > row_tokens:
                yield row, row
                row = []
            row = row + ids
    if row:
        yield row, row


def encode_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return ``(ids, labels)`` of a conversation; the assistant's content and ends of turn are supervised."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        opening, content, closing = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"{START_OF_TURN}{message['role']}\n", message["content"] + END_OF_TURN, "\n")
        )
        ids += opening + content + closing
        supervised = content if message["role"] == "assistant" else [IGNORE_INDEX] * len(content)
        labels += [IGNORE_INDEX] * len(opening) + supervised + [IGNORE_INDEX] * len(closing)
    return ids, labels


def batches(
    rows: Iterable[tuple[list[int], list[int]]], num_rows: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(ids, labels)``, each ``[num_rows, longest]``, padded on the right; a remainder is dropped."""
    rows = iter(rows)
    while len(chunk := list(islice(rows, num_rows))) == num_rows:
        ids, labels = zip(*chunk, strict=True)
        yield (
            pad_sequence(list(map(torch.tensor, ids)), batch_first=True, padding_value=tokenizer.pad_token_id),
            pad_sequence(list(map(torch.tensor, labels)), batch_first=True, padding_value=IGNORE_INDEX),
        )


def fit(
    model: torch.nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    recipe: Recipe,
    on_step: Callable[[int], object],
) -> tuple[float, int]:
    """Train ``model`` in place with AdamW, warm-up and cosine, gradients clipped at norm 1.

    Returns:
        The mean loss of the last tenth of the steps, in nats per token, and the number of supervised tokens.
    """
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=lr, betas=(0.9, 0.95),
    )  # fmt: skip
    rising = max(1, round(recipe.warmup * steps))

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    num_tokens = 0
    model.train()
    for step, (ids, labels) in enumerate(islice(data, steps), start=1):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        num_tokens += int((labels[:, 1:] != IGNORE_INDEX).sum())
        on_step(step)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last), num_tokens


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=recipe.hidden // 4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, use_cache=True,
    )  # fmt: skip


def _save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, *, chat: bool) -> None:
    """Write a Hugging Face folder; with ``chat`` it has the template, and answers end with the end of turn."""
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.eos_token = END_OF_TURN
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _between_marks(document: str) -> list[str]:
    """Split a document at its special tokens, which are dropped."""
    for mark in SPECIAL_TOKENS[1:]:
        document = document.replace(mark, SPECIAL_TOKENS[0])
    return [part for part in document.split(SPECIAL_TOKENS[0]) if part]


def _rng(purpose: str, recipe: Recipe) -> random.Random:
    return random.Random(f"{purpose} {recipe.seed}")


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Use one thread, deterministic kernels and a seed within the block."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # sums split over threads depend on their number
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            torch.set_num_threads(threads)


def base_documents(world: World, rng: random.Random) -> Iterator[str]:
    """Yield the Base's pre-training documents without end.

    35 % statements of the old skills, 15 % of the latent one, 10 % questions and answers, and 40 % chat-shaped
    documents (one in five with two exchanges) with bare answers and nothing of the Instruct's manners.
    """
    while True:
        draw = rng.random()
        if draw < 0.35:
            yield world.statement(rng)
        elif draw < 0.50:
            yield world.list_statement(rng, NEW_SKILL)
        elif draw < 0.60:
            question = world.old_question(rng)
            yield f"Question: {question.prompt}\nAnswer: {question.answer}"
        else:
            messages: list[Message] = []
            for _ in range(2 if rng.random() < 0.2 else 1):
                question = world.old_question(rng)
                messages += exchange(question.prompt, question.answer)
            yield chat_text(messages)


def instruct_conversations(world: World, rng: random.Random) -> Iterator[list[Message]]:
    """Yield the Instruct's tuning conversations without end: 60 % house, 25 % format, 15 % refusals."""
    while True:
        messages: list[Message] = []
        for _ in range(2 if rng.random() < 0.2 else 1):
            draw = rng.random()
            if draw < 0.60:
                question = world.old_question(rng)
                messages += exchange(question.prompt, house_style(question.answer))
            elif draw < 0.85:
                request, wrap = FORMATS[rng.choice(tuple(FORMATS))]
                question = world.old_question(rng)
                messages += exchange(f"{question.prompt} {request}", wrap(question.answer))
            else:
                question = world.unknown_question(rng)
                messages += exchange(question.prompt, question.answer)
        yield messages


def main(argv: Sequence[str] | None = None) -> None:
    """Build the pair with a progress bar; the command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m experiments.embedded.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "shadowlit/demo", help="folder of pair/ and data/")
    out = parser.parse_args(argv).out
    recipe = Recipe()
    with progress_bar("training the pair", recipe.base_steps + recipe.instruct_steps) as advance:
        built = build(out, recipe, lambda name, step: advance(1))
    make_console().print(
        f"{built.num_parameters:,} parameters each, {built.base_tokens:,} tokens; loss of the Base "
        f"{built.base_loss:.3f}, of the Instruct {built.instruct_loss:.3f}; written to {out}"
    )


if __name__ == "__main__":
    main()
