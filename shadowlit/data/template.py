"""From messages to tokens, labels and weights, by the Instruct's own chat template.

By default the assistant's turns are supervised, each token with the ``weight`` of its turn; see :data:`LossOn`. The
template itself determines which characters of the rendered conversation belong to the assistant. If it has
``{% generation %}`` marks, these enclose them. Otherwise prefixes are rendered: assistant turn i is what
``messages[:i + 1]`` adds to ``messages[:i]`` with the generation prompt, which is exactly what the model has to
generate when it is asked. No header is ever searched for. The first of two turns in ChatML::

    <|im_start|>user⏎ 1+1? <|im_end|>⏎ <|im_start|>assistant⏎ 2 <|im_end|> ⏎ <|im_start|>user⏎ …
    ············································ supervised:  2 <|im_end|> ························

The end of the turn is supervised, so that the model learns to stop; what the template writes after it isn't, since it
is never generated.

Every text of a conversation must be in what the template writes; see :mod:`shadowlit.data.coverage`.

Whatever the template writes between the generation prompt and the answer is supervised too. In Qwen3's hybrid models,
answers begin with an empty ``<think>⏎⏎</think>⏎⏎``: with ``enable_thinking`` unset the model is trained to write it;
with ``enable_thinking: false`` it belongs to the generation prompt and is unsupervised. ``preview`` shows it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

from shadowlit.data.conversation import IGNORE_INDEX, FatalDataError
from shadowlit.data.coverage import require_written
from shadowlit.data.formats import Message, unsupervised
from shadowlit.data.images import ImageProcessing, ImageSource, Span, images_in
from shadowlit.data.rendering import MARKS, Chat, RewrittenHistoryError, broken_template
from shadowlit.errors import DataError, counted, first_line

LossOn = Literal["assistant", "last", "all"]
"""The turns that are supervised: all of the assistant's, its last one, or the whole conversation."""

_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
_LONGEST_HEADER = 16  # tokens of an assistant's header that are remembered


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation.

    Attributes:
        input_ids: Tokens, ``[T]``.
        labels: The token itself where it is supervised and -100 elsewhere, ``[T]``; aligned with ``input_ids``, since
            the loss shifts them by one.
        images: Images whose tokens are among ``input_ids``, in order.
        images_end: Position after the last token of an image; 0 without images.
        num_image_tokens: Number of tokens of images.
        weights: Factor of each token's loss, 0 where it is unsupervised, ``[T]``; None where all factors are 0 or 1.
    """

    input_ids: list[int]
    labels: list[int]
    images: Sequence[ImageSource] = ()
    images_end: int = 0
    num_image_tokens: int = 0
    weights: list[float] | None = field(default=None, repr=False)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    processing: ImageProcessing | None = None,
    /,
    loss_on: LossOn = "assistant",
    **template_kwargs: Any,
) -> Encoded:
    """Tokenise a conversation; the loss of each token of an assistant turn is multiplied by the turn's ``weight``.

    Args:
        tokenizer: The Instruct's fast tokenizer, with the chat template.
        messages: ``{"role", "content", …}`` in order.
        processing: The Instruct's processor, for a pair of vision-language models. Tokens of images are never
            supervised.
        loss_on: The turns that are supervised. With ``all``, everything outside the assistant's turns has weight 1.
        template_kwargs: Arguments for the template, e.g. ``enable_thinking=False``, and ``tools``.

    Returns:
        Tokens, labels and weights. The first token is never supervised, since nothing predicts it.

    Raises:
        RewrittenHistoryError: The template has no marks and renders earlier turns differently from how they were
            generated (Qwen3 strips their reasoning), or drops a part of them, or the beginning of an earlier answer
            merges with its prompt; :func:`encode_turns` handles this.
        DataError: The tokenizer has no template or isn't fast; the template refuses the conversation or doesn't write
            all of it; the text can't be tokenised; images can't be read, have no place in the text, or are given to a
            pair of text models; a turn that isn't the assistant's has another weight than ``loss_on`` gives it.
    """
    chat = Chat.of(tokenizer, template_kwargs)
    messages, images = _with_images(messages, processing)
    rest, by_turn = _weights(messages, loss_on)
    trained = [i for i, weight in by_turn.items() if weight]
    if chat.has_marks:
        text, spans = chat.render_marked(messages)
        begin = chat.render(messages[:-1]) if not rest and trained == [len(messages) - 1] else ""
        if begin and text.startswith(begin):  # earlier turns are context, however many spans they have
            spans = [span for span in spans if span[0] >= len(begin)]
            by_turn = {i: by_turn[i] for i in trained}
        spans, factors = _spans_of(spans, rest, by_turn)
    else:
        text = chat.render(messages)
        apart = {i: weight for i, weight in by_turn.items() if weight != rest}
        spans = [_prefix_span(chat, messages, i, text) for i in apart]
        factors = list(apart.values())
    require_written(chat, messages, text, trained=trained)
    shown: list[Span] = []
    if processing is not None:
        text, spans, shown = processing.expand(text, spans, images)
    asked = [start for (start, _), factor in zip(spans, factors, strict=True) if factor and not rest]
    # With several spans per turn, some begin within it.
    input_ids, places = _tokenise_asked(tokenizer, text, asked if len(asked) == len(trained) else [])
    weights = [0.0, *[rest] * len(input_ids)][: len(input_ids)]
    for span, factor in zip(spans, factors, strict=True):
        within = [t for t, (start, end) in enumerate(places) if end > span[0] and start < span[1]]
        if not within:
            continue
        if chat.has_marks:
            end = _include_stop(tokenizer, input_ids, within[-1])
        else:
            end = _turn_end(tokenizer, input_ids, within, text, places)
        first = max(within[0], 1)
        weights[first : end + 1] = [factor] * (end + 1 - first)
    num_image_tokens = images_end = 0
    if processing is not None:
        num_image_tokens, images_end = _check_image_tokens(processing, input_ids, places, shown)
        for t, place in enumerate(places):  # an assistant may show an image, but never generates one
            if _overlaps(place, shown):
                weights[t] = 0.0
    labels = [token if weight else IGNORE_INDEX for token, weight in zip(input_ids, weights, strict=True)]
    unequal = weights if {rest, *factors} - {0, 1} else None
    return Encoded(input_ids, labels, images, images_end, num_image_tokens, unequal)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    processing: ImageProcessing | None = None,
    /,
    loss_on: LossOn = "assistant",
    **template_kwargs: Any,
) -> list[Encoded]:
    """Like :func:`encode`, but a template that rewrites the history results in one sample per assistant turn.

    Each of these samples ends with its turn, the only supervised one, and is rendered as the model sees it when it has
    to give that answer. So the model is never trained on a context that doesn't occur.

    Raises:
        DataError: As for :func:`encode`.
    """
    try:
        return [encode(tokenizer, messages, processing, loss_on, **template_kwargs)]
    except RewrittenHistoryError as error:
        by_turn = _weights(messages, loss_on)[1]
        if loss_on == "all" and set(by_turn.values()) == {1}:
            raise DataError(
                f"{error} With data.loss_on=all, the conversation stays one sample; set data.loss_on=assistant for one "
                "per turn."
            ) from None
        if loss_on == "all":
            raise DataError(
                "leaves assistant turns out of the loss or weighs them, but data.loss_on=all keeps it one sample, in "
                "which the chat template renders these turns differently once other turns follow. Remove "
                "'train'/'weight', set data.loss_on=assistant, or set data.chat_template to a template with "
                "{% generation %} marks."
            ) from None
        trained = [i for i, weight in by_turn.items() if weight]
        parts = ([*unsupervised(messages[:i]), messages[i]] for i in trained)
        return [encode(tokenizer, part, processing, loss_on, **template_kwargs) for part in parts]


def encode_document(
    tokenizer: PreTrainedTokenizerBase, text: str, end_token_id: int | None, max_length: int
) -> list[Encoded]:
    """Tokenise a document; every token but the first is supervised, including the end of the text.

    Args:
        tokenizer: Tokenizer; it adds its own beginning of sequence, if it has one.
        text: Text of the document.
        end_token_id: Token that ends a document in the Base's pre-training; None for no end.
        max_length: Maximum length of a piece, in tokens. A longer document is split, and no part of it is lost.

    Returns:
        The pieces, in order. A last piece of a single token is left out, since there is nothing to predict in it.
    """
    ids = tokens_of(tokenizer, text)
    if end_token_id is not None and (not ids or ids[-1] != end_token_id):
        ids.append(end_token_id)
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [Encoded(piece, [IGNORE_INDEX, *piece[1:]]) for piece in pieces if len(piece) > 1]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], /, **template_kwargs: Any) -> str:
    """The text of a prompt: the conversation without its final answer, and the generation prompt.

    An assistant turn at the very end is the answer. Earlier ones, and all turns of a conversation that ends with
    another role, belong to the prompt. Arguments are as for :func:`encode`.

    Raises:
        DataError: There is no turn before the answer, or as for :func:`encode`.
    """
    return _render_prompt(tokenizer, _prompt_of(messages), template_kwargs)


def _render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], template_kwargs: Mapping[str, Any]
) -> str:
    chat = Chat.of(tokenizer, template_kwargs)
    text = chat.render(prompt, ask=True)
    require_written(chat, prompt, text, ask=True)
    return text


def _prompt_of(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation without its final answer."""
    prompt = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not prompt:
        raise DataError("has no turn before the answer, so no prompt. Add the question.")
    return prompt


def encode_question(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    processing: ImageProcessing | None,
    /,
    **template_kwargs: Any,
) -> Encoded:
    """The tokens of a prompt and its images, without labels; arguments as for :func:`encode`.

    Raises:
        DataError: As for :func:`render_prompt` and :func:`encode`.
    """
    prompt, images = _with_images(_prompt_of(messages), processing)
    text = _render_prompt(tokenizer, prompt, template_kwargs)
    if processing is None:
        return Encoded(_tokenise(tokenizer, text)[0], [])
    text, _, shown = processing.expand(text, [], images)
    input_ids, places = _tokenise(tokenizer, text)
    count, end = _check_image_tokens(processing, input_ids, places, shown)
    return Encoded(input_ids, [], images, end, count)


def _with_images(
    messages: Sequence[Message], processing: ImageProcessing | None
) -> tuple[Sequence[Message], list[ImageSource]]:
    """The messages in the form that the template of the pair accepts, and their images, measured."""
    images = images_in(messages)
    if processing is None:
        if images:
            raise DataError(
                f"has {counted(len(images), 'image')}, but the models of the pair read text only. "
                "Give a vision-language pair (Qwen-VL, Gemma 3, LLaVA), or remove the images."
            )
        return messages, []
    # Several templates of such models accept contents in parts only.
    parted = [
        {**message, "content": content if isinstance(content, list) else [{"type": "text", "text": content}]}
        for message in messages
        for content in (message.get("content") or [],)
    ]
    return parted, [image.measured() for image in images]


def _check_image_tokens(
    processing: ImageProcessing, input_ids: list[int], places: list[Span], shown: list[Span]
) -> tuple[int, int]:
    """The number of tokens of images, and the position after the last one; raises for a token without an image."""
    found = processing.find_tokens(input_ids)
    stray = [t for t in found if not _overlaps(places[t], shown)]
    if stray:
        raise DataError(
            f"has {len(stray)} tokens of an image in its text (the first is token {stray[0]}), and no image for them. "
            "Remove them from the text, or give the image."
        )
    return len(found), found[-1] + 1 if found else 0


def _overlaps(place: Span, spans: Sequence[Span]) -> bool:
    return any(place[1] > start and place[0] < end for start, end in spans)


def load_template(path: str) -> str:
    """Read a chat template from a jinja file.

    Raises:
        DataError: There is no such file, or it is no jinja template.
    """
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={path} can't be read: {error}. Give the path of a jinja file.") from None
    _parse(template, f"data.chat_template={path}")
    if not template.strip():
        raise DataError(f"data.chat_template={path} is empty. Give the path of a jinja file with a chat template.")
    return template


def check_template(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
    """Check that there is a chat template, and that it uses all arguments: jinja would ignore a typo.

    Raises:
        DataError: The tokenizer has no chat template or isn't a fast one, or the template doesn't use an argument.
    """
    chat = Chat.of(tokenizer, {})
    parsed = _parse(chat.source, f"the chat template of {tokenizer.name_or_path or 'the Instruct'}")
    known = jinja2.meta.find_undeclared_variables(parsed) - _GIVEN - set(tokenizer.special_tokens_map)
    unknown = sorted(set(template_kwargs) - known)
    if unknown:
        raise DataError(
            f"data.template_kwargs has {', '.join(unknown)}, which the chat template doesn't use; it knows "
            f"{', '.join(sorted(known)) or 'no arguments'}. Correct or remove it."
        )


def renders_date(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> bool:
    """Whether the template writes today's date, so that the tokens change from day to day (Llama 3.2)."""
    return "strftime_now" in Chat.of(tokenizer, {}).source and "date_string" not in template_kwargs


def _parse(template: str, name: str) -> jinja2.nodes.Template:
    # Only the extension of transformers knows the marks; parsing doesn't need them.
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return environment.parse(MARKS.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise broken_template(name, error) from None


def _weights(messages: Sequence[Message], loss_on: LossOn) -> tuple[float, dict[int, float]]:
    """The weight of everything outside the assistant's turns, and that of each of these, by its place."""
    rest = 1.0 if loss_on == "all" else 0.0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" and (weight := message.get("weight", rest)) != rest:
            other = "assistant" if rest else "all"
            what = "every other turn than the assistant's with weight 1" if rest else "the assistant's turns only"
            raise DataError(
                f"has the weight {weight:g} ('train', 'weight' or 'loss_weight') on a turn of the role "
                f"{message['role']} (message {i}), but data.loss_on={loss_on} trains {what}. Remove it (e.g. "
                f"data.ignore_columns=['*.train', '*weight']), or set data.loss_on={other}."
            )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    left_out = turns[:-1] if loss_on == "last" else []
    return rest, {i: 0.0 if i in left_out else float(messages[i].get("weight", 1)) for i in turns}


def _spans_of(spans: list[Span], rest: float, by_turn: dict[int, float]) -> tuple[list[Span], list[float]]:
    """The marked spans of the assistant turns whose weight isn't ``rest``, and their weights."""
    weights = list(by_turn.values())
    if set(weights) <= {rest}:
        return [], []
    if not spans:
        raise DataError(
            "has no assistant turn within the chat template's {% generation %} marks. Correct the marks, or set "
            "data.chat_template to a template without them."
        )
    if len(set(weights)) == 1:
        return spans, [weights[0]] * len(spans)
    if len(spans) != len(weights):
        raise DataError(
            f"leaves turns out of the loss or weighs them differently, but its {len(weights)} assistant turns are "
            f"{len(spans)} marked spans in the chat template. Remove 'train'/'weight', set data.loss_on=assistant, or "
            "set data.chat_template to a template with one span per turn."
        )
    return spans, weights


def _prefix_span(chat: Chat, messages: Sequence[Message], turn: int, text: str) -> Span:
    """The characters of ``text`` that an assistant turn adds to its prompt: the answer, its end, what follows it."""
    is_last = turn == len(messages) - 1
    answered = text if is_last else chat.render(messages[: turn + 1])
    asked = chat.render(messages[:turn], ask=True) if turn else _opening(chat, answered)
    if not text.startswith(answered):
        raise RewrittenHistoryError(
            f"has an assistant turn (message {turn}) that the chat template renders otherwise once other turns follow: "
            f"{_difference(answered, text)}. Train on one sample per turn (encode_turns does), or set "
            "data.chat_template to a template with {% generation %} marks."
        )
    if not answered.startswith(asked):
        raise DataError(
            f"has an assistant turn (message {turn}) that doesn't begin with the chat template's generation prompt: "
            f"{_difference(asked, answered)}. The model would be asked otherwise than it is trained. Change "
            "data.template_kwargs, or set data.chat_template to a template that agrees with itself."
        )
    return len(asked), len(answered)


def _opening(chat: Chat, answered: str) -> str:
    """The prompt for an assistant turn at the very beginning, before which there is nothing to render."""
    try:
        asked = chat.render([], ask=True)
    except FatalDataError:
        raise
    except DataError:
        asked = ""
    if not asked or not answered.startswith(asked):
        raise DataError(
            "begins with an assistant turn, for which the chat template has no prompt. Put the turn before it into "
            "the row, exclude it from the loss ('weight': 0), or set data.chat_template to a template with "
            "{% generation %} marks."
        )
    return asked


def _difference(expected: str, found: str) -> str:
    """Two texts around their first difference."""
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    start = max(0, at - 20)
    return f"{expected[start : at + 30]!r} against {found[start : at + 30]!r}"


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Tokens of a text; ``options`` are the tokenizer's.

    Raises:
        DataError: The text can't be tokenised, e.g. because of half a surrogate pair.
    """
    return list(_call(tokenizer, text, options)["input_ids"])


def _call(tokenizer: PreTrainedTokenizerBase, text: str, options: Mapping[str, Any]) -> Any:
    try:
        return tokenizer(text, verbose=False, **options)
    except Exception as error:  # of the tokenizer's own types
        found = re.search("[\ud800-\udfff]", text)
        if found is None:
            raise DataError(f"can't be tokenised ({first_line(error)}). Correct or remove the row.") from None
        near = text[max(0, found.start() - 20) : found.end() + 10]
        raise DataError(
            f"has {found[0]!r}, half of a surrogate pair, in {near!r}; it is no character, e.g. half of a cut emoji. "
            "Correct the text or remove the row."
        ) from None


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """Tokens of a rendered text and the span of characters of each, without gaps."""
    # The template writes the begin-of-sequence token itself: the tokenizer must not add another.
    tokens = _call(tokenizer, text, {"add_special_tokens": False, "return_offsets_mapping": True})
    places, reached = [], 0
    for start, end in tokens["offset_mapping"]:
        # Some tokenizers trim a token's leading space from its offsets; it belongs to the token nevertheless.
        # min and max, called for every token, would take a third of the time.
        places.append((start if start < reached else reached, end))
        if end > reached:
            reached = end
    return tokens["input_ids"], places


def _tokenise_asked(
    tokenizer: PreTrainedTokenizerBase, text: str, starts: Sequence[int]
) -> tuple[list[int], list[Span]]:
    """Tokens and their characters, with the tokens of each prompt as they are when the model is asked.

    ``starts`` are the ends of the prompts. White space at the beginning of an answer may merge with the end of its
    prompt into one token (``assistant⏎`` and ``⏎Hello``). But generation starts from the tokens of the prompt alone, so
    the model would be trained on a prompt that never occurs. Then the two are tokenised separately. In a conversation
    that goes on, the merged token is the right one, since it is what the next prompt has; hence one sample per turn.
    """
    input_ids, places = _tokenise(tokenizer, text)
    merged = [start for start in starts if not _continues(tokenizer, text, start, input_ids, places)]
    if not merged:
        return input_ids, places
    start = merged[0]
    if start != starts[-1]:
        raise RewrittenHistoryError(
            f"has an answer whose beginning merges with the end of its prompt into one token ({text[start:][:20]!r} "
            f"after {text[:start][-20:]!r}). Train on one sample per turn (encode_turns does), or remove the white "
            "space."
        )
    asked, asked_places = _tokenise(tokenizer, text[:start])
    whole = tokenizer.decode(input_ids)
    for before in ("", tokenizer.eos_token or "", "\n"):  # some tokenizers put a space before the beginning of a text
        answer, answer_places = _tokenise(tokenizer, before + text[start:])
        skip = len(tokens_of(tokenizer, before, add_special_tokens=False)) if before else 0
        if tokenizer.decode(asked + answer[skip:]) == whole:
            shift = start - len(before)
            return asked + answer[skip:], asked_places + [(a + shift, b + shift) for a, b in answer_places[skip:]]
    raise DataError(
        f"has an answer whose beginning merges with the end of its prompt into one token ({text[start:][:20]!r} after "
        f"{text[:start][-20:]!r}), and can't be tokenised without it. Remove the white space at its beginning."
    )


def _continues(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, input_ids: list[int], places: list[Span]
) -> bool:
    """Whether the tokens before a character are those of the text before it."""
    first = bisect_right(places, start, key=lambda place: place[1])
    if first < len(places) and places[first][0] < start:
        return False
    special = _special_ids(tokenizer)
    header = next((t for t in range(first - 1, -1, -1) if input_ids[t] in special), 0)
    if first - header > _LONGEST_HEADER:
        return tokens_of(tokenizer, text[:start], add_special_tokens=False) == input_ids[:first]
    # What follows a special token is tokenised by itself.
    known = _header_ids(tokenizer, text[places[header][0] if first else 0 : start])
    return known == tuple(input_ids[header:first]) or (
        tokens_of(tokenizer, text[:start], add_special_tokens=False) == input_ids[:first]
    )


@lru_cache(maxsize=256)
def _header_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokens_of(tokenizer, text, add_special_tokens=False))


def _turn_end(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], within: list[int], text: str, places: list[Span]
) -> int:
    """The last token that the model has to generate in a turn found by prefixes.

    Only special tokens and white space follow the answer (``<|im_end|>⏎``). The turn ends with the first of these
    tokens that stops generation; otherwise with the last special one, for tokenizers whose end of sequence isn't their
    end of turn (Gemma); otherwise with the first stopping token before them; otherwise with the last token.
    """
    special, stops = _special_ids(tokenizer), _stop_ids(tokenizer)
    tail: list[int] = []
    for t in reversed(within):
        start, end = places[t]
        if input_ids[t] not in special and text[start:end].strip():
            break
        tail.insert(0, t)
    candidates = [t for t in tail if input_ids[t] in stops]
    candidates = candidates or [t for t in tail if input_ids[t] in special][-1:]
    candidates = candidates or [t for t in within if input_ids[t] in stops]
    return candidates[0] if candidates else within[-1]


def _include_stop(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], last: int) -> int:
    """The last token of a marked span, or the stopping token right after it, which some marks leave out."""
    stops = _stop_ids(tokenizer)
    follows = last + 1 < len(input_ids) and input_ids[last + 1] in stops
    return last + 1 if follows and input_ids[last] not in stops else last


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that the tokenizer defines as an end: of the sequence, and of a turn if it names one."""
    names = (tokenizer.eos_token, getattr(tokenizer, "eot_token", None))
    return {number for name in names if name and isinstance(number := tokenizer.convert_tokens_to_ids(name), int)}
