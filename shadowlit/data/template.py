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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from shadowlit.data.conversation import IGNORE_INDEX, FatalDataError
from shadowlit.data.coverage import require_written
from shadowlit.data.formats import Message, unsupervised
from shadowlit.data.images import ImageProcessing, ImageSource, Span, images_in
from shadowlit.data.rendering import Chat, RewrittenHistoryError
from shadowlit.data.tokens import include_stop, tokenise_asked, tokenise_rendered, tokens_of, turn_end
from shadowlit.errors import DataError, counted

LossOn = Literal["assistant", "last", "all"]
"""The turns that are supervised: all of the assistant's, its last one, or the whole conversation."""


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
    input_ids, places = tokenise_asked(tokenizer, text, asked if len(asked) == len(trained) else [])
    weights = [0.0, *[rest] * len(input_ids)][: len(input_ids)]
    for span, factor in zip(spans, factors, strict=True):
        within = [t for t, (start, end) in enumerate(places) if end > span[0] and start < span[1]]
        if not within:
            continue
        if chat.has_marks:
            end = include_stop(tokenizer, input_ids, within[-1])
        else:
            end = turn_end(tokenizer, input_ids, within, text, places)
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
    """Return the text of a prompt: the conversation without its final answer, and the generation prompt.

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
    """Return the tokens of a prompt and its images, without labels; arguments as for :func:`encode`.

    Raises:
        DataError: As for :func:`render_prompt` and :func:`encode`.
    """
    prompt, images = _with_images(_prompt_of(messages), processing)
    text = _render_prompt(tokenizer, prompt, template_kwargs)
    if processing is None:
        return Encoded(tokenise_rendered(tokenizer, text)[0], [])
    text, _, shown = processing.expand(text, [], images)
    input_ids, places = tokenise_rendered(tokenizer, text)
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
            f"has {counted(len(stray), 'image token')} in its text (the first is token {stray[0]}) without an image. "
            "Remove them from the text, or give the image."
        )
    return len(found), found[-1] + 1 if found else 0


def _overlaps(place: Span, spans: Sequence[Span]) -> bool:
    return any(place[1] > start and place[0] < end for start, end in spans)


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
