"""From messages to tokens with a mask: always the Instruct's own chat template, loss on assistant turns only.

Which characters of the rendered conversation the assistant says is asked of the template itself. Where it has
``{% generation %}`` marks, they tell. Where it has none, prefixes are rendered: assistant turn i is what
``messages[:i + 1]`` adds to ``messages[:i]`` with the generation prompt, so exactly what the model has to produce
when it is asked. No header is ever searched for. For ChatML and two turns of one question each::

    <|im_start|>user⏎ 1+1? <|im_end|>⏎ <|im_start|>assistant⏎ 2 <|im_end|> ⏎ <|im_start|>user⏎ …
    ·················································· loss:  2 <|im_end|> ························

The end of the turn carries loss, so that the model learns to stop; what the template writes after it doesn't, since
nobody generates it.

Whatever the template itself puts between generation prompt and answer carries loss too. Qwen3's hybrid models are
the case to know: with ``enable_thinking`` unset their answers begin with an empty ``<think>⏎⏎</think>⏎⏎`` that the
model is trained to write; with ``enable_thinking: false`` the block belongs to the generation prompt and carries
none. ``preview`` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.formats import Message
from shadowlit.data.images import ImageProcessing, Picture, pictures_in
from shadowlit.errors import DataError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation; unpacks as its tokens and labels.

    Attributes:
        input_ids: ``[T]`` tokens.
        labels: ``[T]``, the token itself where it carries loss and -100 elsewhere; aligned with ``input_ids``, the
            shift by one happens in the loss.
        pictures: The images, in order, whose tokens are among them.
        images_end: Where the last token of an image ends, 0 without images.
        num_image_tokens: Tokens of images.
    """

    input_ids: list[int]
    labels: list[int]
    pictures: Sequence[Picture] = ()
    images_end: int = 0
    num_image_tokens: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        return iter((self.input_ids, self.labels))


class RewrittenHistoryError(DataError):
    """A template that renders a turn otherwise once other turns follow it."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    images: ImageProcessing | None = None,
    /,
    **template_kwargs: Any,
) -> Encoded:
    """Tokenise a conversation; every assistant turn carries loss, but for those with ``"train": False``.

    Args:
        tokenizer: The Instruct's, a fast one; its chat template is used.
        messages: ``{"role", "content", …}`` in order.
        images: The Instruct's processor, for a pair of vision-language models. Tokens of images never carry loss.
        template_kwargs: Passed to the template, e.g. ``enable_thinking=False``.

    Returns:
        Tokens and labels. The first token never carries loss: nothing predicts it.

    Raises:
        RewrittenHistoryError: The template has no marks and renders earlier turns otherwise than they were generated
            (Qwen3 strips their reasoning); :func:`encode_turns` copes with it.
        DataError: No template, a template that refuses the conversation, or no fast tokenizer; images that can't be
            read, that have no place in the text, or that the pair can't see.
    """
    template = _template(tokenizer)
    messages, pictures = _with_pictures(messages, images)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [i for i in turns if _is_trained(messages[i])]
    marked = _MARK.search(template) is not None
    if marked:
        text, spans = _marked(tokenizer, template, messages, template_kwargs)
        spans = _spans_of(spans, turns, trained)
    else:
        text = _render(tokenizer, messages, False, template_kwargs)
        spans = [_prefix_span(tokenizer, messages, i, text, template_kwargs) for i in trained]
    shown: list[Span] = []
    if images is not None:
        text, spans, shown = images.expand(text, spans, pictures)
    input_ids, places = _tokenise(tokenizer, text)
    labels = [IGNORE_INDEX] * len(input_ids)
    for span in spans:
        within = [t for t, (start, end) in enumerate(places) if end > span[0] and start < span[1]]
        if not within:
            continue
        first, last = max(within[0], 1), within[-1]
        end = (
            _include_stop(tokenizer, input_ids, last)
            if marked
            else _turn_end(tokenizer, input_ids, within, text, places)
        )
        labels[first : end + 1] = input_ids[first : end + 1]
    if images is None:
        return Encoded(input_ids, labels)
    num_image_tokens, images_end = _check_image_tokens(images, input_ids, places, shown)
    for start, end in shown:  # an assistant may show an image, but nobody generates one
        for t, place in enumerate(places):
            if place[1] > start and place[0] < end:
                labels[t] = IGNORE_INDEX
    return Encoded(input_ids, labels, pictures, images_end, num_image_tokens)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    images: ImageProcessing | None = None,
    /,
    **template_kwargs: Any,
) -> list[Encoded]:
    """As :func:`encode`; where the template rewrites the history, one sample per assistant turn.

    Each of these samples ends with its turn, the only one with loss, and is rendered as the model sees it when it has
    to give that answer. So nothing is trained on a context that never occurs.

    Raises:
        DataError: As :func:`encode`.
    """
    try:
        return [encode(tokenizer, messages, images, **template_kwargs)]
    except RewrittenHistoryError:
        trained = [i for i, message in enumerate(messages) if message["role"] == "assistant" and _is_trained(message)]
        return [encode(tokenizer, _only_last(messages[: i + 1]), images, **template_kwargs) for i in trained]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], /, **template_kwargs: Any) -> str:
    """What an answer is asked by, as text: the conversation without its final answer, and the generation prompt.

    Args:
        tokenizer: As for :func:`encode`.
        messages: With or without the answer: an assistant turn at the very end is left out. Earlier ones, and all
            turns of a conversation that ends with another role, belong to the prompt.
        template_kwargs: As for :func:`encode`.

    Raises:
        DataError: Nothing stands before the answer, or as :func:`encode`.
    """
    _template(tokenizer)
    return _render(tokenizer, prompt_of(messages), True, template_kwargs)


def prompt_of(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation without its final answer.

    Raises:
        DataError: Nothing stands before the answer.
    """
    prompt = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not prompt:
        raise DataError("has no turn before the answer, so no prompt. Add the question.")
    return prompt


def encode_question(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    images: ImageProcessing | None,
    /,
    **template_kwargs: Any,
) -> Encoded:
    """The tokens of a prompt and its images, without labels; arguments as of :func:`encode`.

    Raises:
        DataError: As :func:`render_prompt` and :func:`encode`.
    """
    _template(tokenizer)
    prompt, pictures = _with_pictures(prompt_of(messages), images)
    text = _render(tokenizer, prompt, True, template_kwargs)
    if images is None:
        return Encoded(_tokenise(tokenizer, text)[0], [])
    text, _, shown = images.expand(text, [], pictures)
    input_ids, places = _tokenise(tokenizer, text)
    count, end = _check_image_tokens(images, input_ids, places, shown)
    return Encoded(input_ids, [], pictures, end, count)


def _with_pictures(
    messages: Sequence[Message], images: ImageProcessing | None
) -> tuple[Sequence[Message], list[Picture]]:
    """The messages as the template of the pair takes them, and their images, measured."""
    pictures = pictures_in(messages)
    if images is None:
        if pictures:
            raise DataError(
                f"has {len(pictures)} image{'' if len(pictures) == 1 else 's'}, but the models of the pair read text "
                "only. Give a vision-language pair (Qwen-VL, Gemma 3, LLaVA), or remove the images."
            )
        return messages, []
    # Several templates of such models know contents in parts only.
    parted = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in messages
    ]
    return parted, [picture.measured() for picture in pictures]


def _check_image_tokens(
    images: ImageProcessing, input_ids: list[int], places: list[Span], shown: list[Span]
) -> tuple[int, int]:
    """How many tokens are of images, and where the last of them ends.

    Raises:
        DataError: A token of an image stands where no image is.
    """
    found = images.find_tokens(input_ids)
    stray = [t for t in found if not any(places[t][1] > start and places[t][0] < end for start, end in shown)]
    if stray:
        raise DataError(
            f"has {len(stray)} tokens of an image in its text (the first is token {stray[0]}), and no image for them. "
            "Remove them from the text, or give the image."
        )
    return len(found), found[-1] + 1 if found else 0


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
    """Raise for a missing chat template, and for arguments that it doesn't look at: jinja would ignore a typo.

    Raises:
        DataError: The tokenizer has no chat template, isn't a fast one, or an argument is unknown to the template.
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
    # transformers' own extension knows the marks; to parse, they can go.
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


def _is_trained(message: Message) -> bool:
    return message.get("train", True)


def _only_last(messages: Sequence[Message]) -> list[Message]:
    """The same messages with loss on the last one only."""
    earlier = [{**m, "train": False} if m["role"] == "assistant" else m for m in messages[:-1]]
    return [*earlier, messages[-1]]


def _plain(messages: Sequence[Message]) -> list[Message]:
    """Messages as a template knows them, which says where an image is, and not which one."""
    plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    for message in plain:
        if not isinstance(message["content"], str):
            message["content"] = [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]
    return plain


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ask: bool, template_kwargs: Mapping[str, Any]
) -> str:
    """The conversation as text, with the generation prompt where ``ask``."""
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

    Not by ``return_assistant_tokens_mask``, which looks up the token of a span's first character and leaves the whole
    span out where there is none, e.g. for a space that the tokenizer's offsets trim (transformers#34172).
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


def _spans_of(spans: list[Span], turns: list[int], trained: list[int]) -> list[Span]:
    """The marked spans that belong to turns with loss."""
    if not spans and trained:
        raise DataError(
            "has no assistant turn within the chat template's {% generation %} marks. Correct the marks, or set "
            "data.chat_template to a template without them."
        )
    if trained == turns:
        return spans
    if len(spans) != len(turns):
        raise DataError(
            f"leaves turns out of the loss, but its {len(turns)} assistant turns are {len(spans)} marked spans in the "
            "chat template. Remove 'train'/'weight', or set data.chat_template to a template with one span per turn."
        )
    return [span for span, turn in zip(spans, turns, strict=True) if turn in trained]


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
    """Where two texts part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    start = max(0, at - 20)
    return f"{expected[start : at + 30]!r} against {found[start : at + 30]!r}"


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """Tokens of a rendered text and the characters of each, without gaps."""
    # The template writes the begin-of-sequence token itself: the tokenizer must not add another.
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places, reached = [], 0
    for start, end in tokens["offset_mapping"]:
        # Some tokenizers trim a token's leading space from its offsets; it belongs to the token all the same.
        # Compared here, not by min and max: a call for each token is a third of the time.
        places.append((start if start < reached else reached, end))
        if end > reached:
            reached = end
    return tokens["input_ids"], places


def _turn_end(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], within: list[int], text: str, places: list[Span]
) -> int:
    """The last token that the model has to produce in a turn found by prefixes.

    Behind the answer stand special tokens and white space only (``<|im_end|>⏎``). The turn ends with the first of
    these tokens that stops a generation; else, for tokenizers whose end of sequence isn't their end of turn (Gemma),
    with the last special one; else with the first stopping token further ahead; else nowhere: all of it counts.
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
    """The last token of a marked span, or the stopping token right behind it, which some marks leave out."""
    stops = _stop_ids(tokenizer)
    follows = last + 1 < len(input_ids) and input_ids[last + 1] in stops
    return last + 1 if follows and input_ids[last] not in stops else last


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that the tokenizer itself calls an end: of the sequence, and of a turn where it names one."""
    names = (tokenizer.eos_token, getattr(tokenizer, "eot_token", None))
    return {number for name in names if name and isinstance(number := tokenizer.convert_tokens_to_ids(name), int)}
