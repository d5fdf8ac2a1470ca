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

Whatever the template writes between the generation prompt and the answer is supervised too. In Qwen3's hybrid models,
answers begin with an empty ``<think>⏎⏎</think>⏎⏎``: with ``enable_thinking`` unset the model is trained to write it;
with ``enable_thinking: false`` it belongs to the generation prompt and is unsupervised. ``preview`` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.formats import Message, unsupervised
from shadowlit.data.images import ImageProcessing, ImageSource, Span, images_in
from shadowlit.errors import DataError, counted

LossOn = Literal["assistant", "last", "all"]
"""The turns that are supervised: all of the assistant's, its last one, or the whole conversation."""

_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})


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


class RewrittenHistoryError(DataError):
    """A template renders a turn differently once other turns follow it."""


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
            generated (Qwen3 strips their reasoning); :func:`encode_turns` handles this.
        DataError: The tokenizer has no template or isn't fast, or the template refuses the conversation; images can't
            be read, have no place in the text, or are given to a pair of text models; a turn that isn't the
            assistant's has another weight than ``loss_on`` gives it.
    """
    template = _template(tokenizer)
    messages, images = _with_images(messages, processing)
    rest, by_turn = _weights(messages, loss_on)
    marked = _MARKS.search(template) is not None
    if marked:
        text, spans = _marked(tokenizer, template, messages, template_kwargs)
        spans, factors = _spans_of(spans, rest, by_turn)
    else:
        text = _render(tokenizer, messages, False, template_kwargs)
        apart = {i: weight for i, weight in by_turn.items() if weight != rest}
        spans = [_prefix_span(tokenizer, messages, i, text, template_kwargs) for i in apart]
        factors = list(apart.values())
    shown: list[Span] = []
    if processing is not None:
        text, spans, shown = processing.expand(text, spans, images)
    input_ids, places = _tokenise(tokenizer, text)
    weights = [0.0, *[rest] * (len(input_ids) - 1)]
    for span, factor in zip(spans, factors, strict=True):
        within = [t for t, (start, end) in enumerate(places) if end > span[0] and start < span[1]]
        if not within:
            continue
        if marked:
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
    except RewrittenHistoryError:
        if loss_on == "all":
            raise DataError(
                "leaves assistant turns out of the loss or weighs them, but data.loss_on=all keeps it one sample, in "
                "which the chat template renders these turns differently once other turns follow. Remove "
                "'train'/'weight', set data.loss_on=assistant, or set data.chat_template to a template with "
                "{% generation %} marks."
            ) from None
        trained = [i for i, weight in _weights(messages, loss_on)[1].items() if weight]
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
    ids = list(tokenizer(text, verbose=False)["input_ids"])
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
    _template(tokenizer)
    return _render(tokenizer, _prompt_of(messages), True, template_kwargs)


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
    _template(tokenizer)
    prompt, images = _with_images(_prompt_of(messages), processing)
    text = _render(tokenizer, prompt, True, template_kwargs)
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
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in messages
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
        _parse(template)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={path} can't be read: {error}. Give the path of a jinja file.") from None
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"data.chat_template={path} is no jinja template: {error.message} in line {error.lineno}. Correct it."
        ) from None
    return template


def check_template(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
    """Check that there is a chat template, and that it uses all arguments: jinja would ignore a typo.

    Raises:
        DataError: The tokenizer has no chat template or isn't a fast one, or the template doesn't use an argument.
    """
    template = _template(tokenizer)
    known = jinja2.meta.find_undeclared_variables(_parse(template)) - _GIVEN - set(tokenizer.special_tokens_map)
    unknown = sorted(set(template_kwargs) - known)
    if unknown:
        raise DataError(
            f"data.template_kwargs has {', '.join(unknown)}, which the chat template doesn't use; it knows "
            f"{', '.join(sorted(known)) or 'no arguments'}. Correct or remove it."
        )


def renders_date(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> bool:
    """Whether the template writes today's date, so that the tokens change from day to day (Llama 3.2)."""
    return "strftime_now" in _template(tokenizer) and "date_string" not in template_kwargs


def _parse(template: str) -> jinja2.nodes.Template:
    # Only the extension of transformers knows the marks; parsing doesn't need them.
    return jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", template))


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that ``apply_chat_template`` would choose."""
    name = tokenizer.name_or_path or "the Instruct"
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {name} has no chat template. Use the Instruct's folder with its chat_template.jinja, "
            "or set data.chat_template to the path of a jinja file."
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer of {name} is not a fast one, and can't tell which characters a token covers. "
            "Convert it to a tokenizer.json."
        )
    return tokenizer.get_chat_template()


def _plain(messages: Sequence[Message]) -> list[Message]:
    """Messages as a template expects them: with the place of each image, but not the image."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    for message in plain:
        if not isinstance(message["content"], str):
            message["content"] = [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]
    return plain


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ask: bool, template_kwargs: Mapping[str, Any]
) -> str:
    """The conversation as text, with the generation prompt if ``ask``."""
    try:
        text = tokenizer.apply_chat_template(
            _plain(messages), tokenize=False, add_generation_prompt=ask, **template_kwargs
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise _refusal(error, messages) from None
    assert isinstance(text, str)
    return text


def _marked(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], template_kwargs: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """The conversation as text, and the characters between the template's marks.

    ``return_assistant_tokens_mask`` would look up the token of a span's first character and leave out the whole span
    where there is none, e.g. for a space that the tokenizer's offsets trim (transformers#34172).
    """
    try:
        rendered: Any = render_jinja_template(  # annotated as a text upstream
            conversations=[_plain(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **{**tokenizer.special_tokens_map, **template_kwargs},
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise _refusal(error, messages) from None
    texts, spans = rendered
    return texts[0], spans[0]


def _refusal(error: Exception, messages: Sequence[Message]) -> DataError:
    roles = ", ".join(message["role"] for message in messages) or "no turn at all"
    return DataError(
        f"is refused by the chat template: '{error}' (its turns: {roles}). Change the conversation, e.g. move a "
        "system text into the first user turn, or set data.chat_template to a template that takes it."
    )


def _weights(messages: Sequence[Message], loss_on: LossOn) -> tuple[float, dict[int, float]]:
    """The weight of everything outside the assistant's turns, and that of each of these, by its place."""
    rest = 1.0 if loss_on == "all" else 0.0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" and (weight := message.get("weight", rest)) != rest:
            other = "assistant" if rest else "all"
            what = "every other turn than the assistant's with weight 1" if rest else "the assistant's turns only"
            raise DataError(
                f"has the weight {weight:g} ('train' or 'weight') on a turn of the role {message['role']} (message "
                f"{i}), but data.loss_on={loss_on} trains {what}. Remove it, or set data.loss_on={other}."
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


def _prefix_span(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    turn: int,
    text: str,
    template_kwargs: Mapping[str, Any],
) -> Span:
    """The characters of ``text`` that an assistant turn adds to its prompt: the answer, its end, what follows it."""
    asked = _render(tokenizer, messages[:turn], True, template_kwargs)
    is_last = turn == len(messages) - 1
    answered = text if is_last else _render(tokenizer, messages[: turn + 1], False, template_kwargs)
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


def _difference(expected: str, found: str) -> str:
    """Two texts around their first difference."""
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    start = max(0, at - 20)
    return f"{expected[start : at + 30]!r} against {found[start : at + 30]!r}"


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """Tokens of a rendered text and the span of characters of each, without gaps."""
    # The template writes the begin-of-sequence token itself: the tokenizer must not add another.
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places, reached = [], 0
    for start, end in tokens["offset_mapping"]:
        # Some tokenizers trim a token's leading space from its offsets; it belongs to the token nevertheless.
        # min and max, called for every token, would take a third of the time.
        places.append((start if start < reached else reached, end))
        if end > reached:
            reached = end
    return tokens["input_ids"], places


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
