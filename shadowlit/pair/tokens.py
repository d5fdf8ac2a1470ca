"""Checks of what two models read: tokenizers, chat templates, ends of turns, and untrained tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from shadowlit.checkpoint.headers import TensorInfo, some_of
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import counted, first_line
from shadowlit.limits import in_time
from shadowlit.pair.folders import Problem
from shadowlit.pair.side import Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens reserved for later use, which no Base saw in training.
_PLACEHOLDER = re.compile(r"reserved|unused|extra_?id|placeholder|dummy", re.IGNORECASE)
# Texts that reveal different merges, normalizers or digit rules of tokenizers with equal vocabularies.
_PROBES = ("Hello, world!  It's 12345.67", "def f(x):\n\treturn x ** 2\n", "Ünïcödé ﬁ 中文 🙂")
# Rows sampled from an embedding to find out what a trained row looks like: at most 64 blocks of 32.
_SAMPLE_BLOCKS = 64
_SAMPLE_BLOCK_ROWS = 32


def check_tokenizers(other: Side, owner: Side) -> Iterator[Problem]:
    """Check that an id means the same token to both models, since both get the ids of the template's owner."""
    if other.tokenizer is None or owner.tokenizer is None:
        return
    if other.tokenizer.get_vocab() != owner.tokenizer.get_vocab():
        yield from _compare_vocabularies(other, owner)
    elif any(_encode(other, text) != _encode(owner, text) for text in _PROBES):
        yield Problem.warning(
            "tokenizer",
            "both have the same tokens, but cut a text differently",
            "the same cuts",
            f"compare merges and normalizers; the {owner.title}'s tokenizer is used, the {other.title} learned with "
            "its own.",
        )


def _compare_vocabularies(other: Side, owner: Side) -> Iterator[Problem]:
    """Tokens on which the two tokenizers disagree; ``owner``, usually the Instruct, owns the template."""
    assert other.tokenizer is not None and owner.tokenizer is not None
    old, new = other.tokenizer.get_vocab(), owner.tokenizer.get_vocab()
    old_at = {i: token for token, i in old.items()}
    new_at = {i: token for token, i in new.items()}
    moved = {i: token for token, i in new.items() if token in old and old[token] != i}
    renamed = {i: token for i, token in new_at.items() if i in old_at and token not in old}
    named = {i for i in renamed if _PLACEHOLDER.search(old_at[i])}
    wrong = sorted({*moved, *renamed} - named)
    if wrong:
        changes = [f"{i} was {old_at.get(i)!r}, is {new_at[i]!r}" for i in wrong]
        yield Problem.error(
            "tokenizer",
            f"{counted(len(wrong), 'id')} with another token in the {other.title} than in the {owner.title}: "
            f"{some_of(changes)}",
            "one meaning per id",
            f"set pair.base to the Base of this Instruct: both must understand the {owner.title}'s ids.",
        )
    if named:
        changes = [f"{i} was {old_at[i]!r}, is {new_at[i]!r}" for i in sorted(named)]
        yield Problem.warning(
            "tokenizer",
            f"{counted(len(named), 'placeholder')} of the {other.title} with a meaning in the {owner.title}: "
            f"{some_of(changes)}",
            "",
            f"nothing, unless they appear in your data: their rows in the {other.title} were never trained.",
        )
    extra = [f"{token!r}" for i, token in sorted(new_at.items()) if token not in old and i not in old_at]
    if extra:
        yield Problem.warning(
            "tokenizer",
            f"only the {owner.title}'s has {counted(len(extra), 'token')}: {some_of(extra)}",
            "the same tokens",
            f"nothing, unless they appear in your data: the {other.title} never saw them (no row at all: see "
            f"'{other.who} vocabulary').",
        )
    lost = [f"{token!r}" for i, token in sorted(old_at.items()) if token not in new and i not in new_at]
    if lost:
        yield Problem.note(
            "tokenizer",
            f"only the {other.title}'s has {counted(len(lost), 'token')}: {some_of(lost)}",
            f"nothing: the {owner.title}'s tokenizer is used.",
        )


def _encode(side: Side, text: str) -> list[int]:
    assert side.tokenizer is not None
    return list(side.tokenizer(text, add_special_tokens=False)["input_ids"])


def _written_tokens(
    tokenizer: PreTrainedTokenizerBase, parts: bool, **options: Any
) -> tuple[list[int], list[int] | None]:
    """The special and added tokens that a chat template writes; raises whatever the template raises.

    With ``parts``, contents are given in parts, which templates of vision-language models may insist on. ``options``
    are those of ``apply_chat_template``.

    Returns:
        The tokens of a small conversation and of a prompt for an answer, sorted; and the tokens after the last answer,
        in order, or None if the template does not write the answer as it is.
    """
    question, reply = "Hello.", "Hello, how can I help?"

    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}

    turns = [turn("user", question), turn("assistant", reply)] * 2
    try:  # a system turn shows more tokens, but some templates refuse it
        conversation = [turn("system", "Be brief."), *turns]
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
    except Exception:
        conversation = turns
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
    prompt = str(
        tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True, **options)
    )
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def used(part: str) -> list[int]:
        return [i for i in tokenizer(part, add_special_tokens=False)["input_ids"] if i in special]

    _, answer, tail = text.rpartition(reply)
    return sorted({*used(text), *used(prompt)}), used(tail) if answer else None


def check_template(
    base: Side, instruct: Side, owner: Side, replaced: str | None, template_kwargs: Mapping[str, Any]
) -> Iterator[Problem]:
    """Check that the chat template exists, can be rendered, and ends a turn with a token at which generation stops.

    It is the owner's, unless it is ``replaced`` by another text.
    """
    if (tokenizer := owner.tokenizer) is None:
        return
    own = tokenizer.chat_template
    if replaced is not None:
        yield Problem.note(
            "chat template",
            f"data.chat_template is used, {'which replaces that of' if own else 'since there is none in'} the "
            f"{owner.title}'s tokenizer",
            "nothing for the training; an export has the Instruct's own files, so put the template into its folder as "
            "chat_template.jinja, or give it to the server.",
        )
    elif not own:
        yield Problem.error(
            "chat template",
            f"the {owner.title}'s tokenizer has none",
            "the template it was trained with",
            f"put its chat_template.jinja into the {owner.title}'s folder, set data.chat_template to the file, or use "
            "the other model's by setting pair.template_owner; a model without chat is not an Instruct.",
        )
        return
    elif isinstance(own, dict) and "default" not in own:
        yield Problem.error(
            "chat template",
            f"the {owner.title}'s tokenizer has {len(own)} named templates ({some_of(sorted(own))}), and none is named "
            "default",
            "one template, or a default",
            "set data.chat_template to a file with one of them, such as additional_chat_templates/<name>.jinja in the "
            f"{owner.title}'s folder, or save that file there as chat_template.jinja.",
        )
        return
    try:
        parts = owner.get("vision_config") is not None
        options = {**template_kwargs, "chat_template": replaced}
        ids, ends = in_time(partial(_written_tokens, tokenizer, parts, **options))
    except Exception as error:
        own_file = f"chat_template.jinja in the {owner.title}'s folder, or set data.chat_template to another file"
        file = own_file if replaced is None else "the file of data.chat_template"
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        yield Problem.error(
            "chat template",
            f"it cannot be rendered ({first_line(error)}{line})",
            "a template that renders user and assistant turns",
            f"repair {file}.",
        )
        return
    if ends is not None:
        yield from _check_end_of_turn(owner, ends)
    yield from _check_template_rows(base, instruct, owner, ids)
    yield from _check_untrained(base, instruct, owner, ids)


def _check_end_of_turn(owner: Side, ends: list[int]) -> Iterator[Problem]:
    """Generation stops at the first of the tokens with which the template ends an assistant's turn."""
    assert owner.tokenizer is not None
    if not ends:
        yield Problem.warning(
            "end of turn",
            "the chat template ends an assistant's turn with no special token",
            "one, which the model learns to stop at",
            "add it to the template, or expect generations that run on.",
        )
        return
    if owner.generation is None and owner.has("generation_config.json"):
        return  # unreadable, and reported
    stops = (owner.generation or {}).get("eos_token_id") or owner.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    end = ends[0]
    if end not in stops:
        name = owner.tokenizer.convert_ids_to_tokens(end)
        yield Problem.warning(
            "end of turn",
            f"the template ends a turn with {name!r} (id {end}), but generation stops at {stops or 'nothing'}",
            "generation to stop at the token that ends a turn",
            f"add {end} to eos_token_id in the {owner.title}'s generation_config.json, or generations run on.",
        )


def _check_template_rows(base: Side, instruct: Side, owner: Side, ids: list[int]) -> Iterator[Problem]:
    """Every token of the tokenizer has a row in both models; rows that the Base lacks come from the Instruct."""
    assert owner.tokenizer is not None
    vocabulary = owner.tokenizer.get_vocab()
    for side in (base, instruct):
        rows = min((info.shape[0] for info in side.vocabulary().values()), default=None)
        beyond = [t for t, i in vocabulary.items() if rows is not None and i >= rows]
        if not beyond:
            continue
        needed = [t for t in beyond if vocabulary[t] in ids]
        written = ", some of which the chat template writes" if needed else ""
        found = f"the {side.title}'s embedding has {counted(rows or 0, 'row')}, too few for "
        found += f"{counted(len(beyond), 'token')} of the {owner.title}'s tokenizer{written}: "
        found += some_of(map(repr, needed or beyond))
        if side is base:
            yield Problem.warning(
                "base vocabulary",
                found,
                "a row for every token",
                "nothing: while the Base trains it gets the Instruct's rows for them, which fit it less than its own.",
            )
        else:
            yield Problem(
                "error" if needed else "warning",
                "instruct vocabulary",
                found,
                "a row for every token",
                "give the tokenizer that belongs to these weights; a text with one of these tokens stops the training.",
            )


def _check_untrained(base: Side, instruct: Side, owner: Side, ids: list[int]) -> Iterator[Problem]:
    """Tokens of the template that the Base never learned; see :func:`untrained_rows`."""
    if base.reader is None or base.tokenizer is None or owner.tokenizer is None:
        return
    seen: dict[int, list[str]] = {}
    for name, info in base.vocabulary().items():
        if info.is_weight:
            within = [i for i in ids if i < info.shape[0]]
            for i, reason in _find_untrained(base.reader, info, within, base.tokenizer).items():
                seen.setdefault(i, []).append(f"{reason} in {name}")
    if seen:
        tokens = [f"{owner.tokenizer.convert_ids_to_tokens(i)!r} ({', '.join(why)})" for i, why in sorted(seen.items())]
        tied = any(side.get("tie_word_embeddings") for side in (base, instruct))  # of which an adapter is refused
        lora = "" if tied else "; with LoRA also model.adapter.modules_to_save=[embed_tokens, lm_head]"
        yield Problem.warning(
            "untrained tokens",
            f"the chat template writes {counted(len(seen), 'token')} that the Base seems never to have learned: "
            f"{some_of(tokens)}",
            "rows like those of other tokens",
            f"train the embeddings too and graft them ({'full tuning, ' if tied else ''}graft.select=all{lora}), "
            "or do nothing: with graft.select=linear the grafted model has the Instruct's rows, and only the Base's "
            "training uses the untrained ones.",
        )


def _find_untrained(
    reader: TensorReader, info: TensorInfo, ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> dict[int, str]:
    """Why tokens among ``ids`` look untrained; reads their rows, those of placeholders, and a sample of all others."""
    num_rows = info.shape[0]
    step = max(1, num_rows // _SAMPLE_BLOCKS)
    size = min(step, _SAMPLE_BLOCK_ROWS)
    spans = [(start, min(start + size, num_rows)) for start in range(0, num_rows, step)]
    placeholders = [i for t, i in tokenizer.get_vocab().items() if _PLACEHOLDER.search(t) and i < num_rows]
    spans += [(i, i + 1) for i in {*ids, *placeholders[:_SAMPLE_BLOCKS], num_rows - 1}]
    rows: dict[int, torch.Tensor] = {}
    for start, stop in spans:
        part = reader.read_slice(info.name, (slice(start, stop),)).float()
        rows.update(zip(range(start, stop), part, strict=True))
    order = sorted(rows)
    reasons = untrained_rows(torch.stack([rows[i] for i in order]))
    return {i: reasons[k] for k, i in enumerate(order) if i in ids and k in reasons}


def untrained_rows(rows: torch.Tensor) -> dict[int, str]:
    """Find rows of an embedding that look as if they had never been trained, and why.

    A row is called untrained if it is all zero (no element above 1e-16), equal to another row (placeholders that were
    initialised together and never changed), or if its norm is below a quarter of the median norm (initialised small, or
    only shrunk by weight decay). The first two criteria are those of unsloth's ``fix_untrained_tokens``; the third
    finds rows that weight decay has left unequal. A row that was initialised with the norm of trained rows, and with
    values of its own, is not found.

    Args:
        rows: ``[R, H]``, rows of distinct tokens, in floating point.

    Returns:
        Reasons by position in ``rows``.
    """
    norms = rows.norm(dim=1)
    median = norms.median()
    keys = [row.tobytes() for row in rows.numpy()]
    count = Counter(keys)
    others = torch.tensor([count[key] - 1 for key in keys])
    zero = rows.abs().amax(dim=1) <= 1e-16
    reasons: dict[int, str] = {}
    for i in (zero | (others > 0) | (norms < median / 4)).nonzero().flatten().tolist():
        if zero[i]:
            reasons[i] = "all zero"
        elif others[i]:
            reasons[i] = f"equal to {others[i]} other rows"
        else:
            reasons[i] = f"norm {norms[i]:.2g}, median {median:.2g}"
    return reasons
