"""From rendered text to tokens and the characters that each covers, and where an assistant's turn ends among them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowlit.data.images import Span
from shadowlit.data.rendering import RewrittenHistoryError
from shadowlit.errors import DataError, first_line

_LONGEST_HEADER = 16  # tokens of an assistant's header that are remembered


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Return the tokens of a text; ``options`` are the tokenizer's.

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
            f"has {found[0]!r}, half of a surrogate pair, in {near!r}; it may be half of an emoji. "
            "Correct the text or remove the row."
        ) from None


def tokenise_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """Return the tokens of a rendered text and the span of characters of each, without gaps."""
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


def tokenise_asked(
    tokenizer: PreTrainedTokenizerBase, text: str, starts: Sequence[int]
) -> tuple[list[int], list[Span]]:
    """Return the tokens and their characters, with the tokens of each prompt as they are when the model is asked.

    ``starts`` are the ends of the prompts. White space at the beginning of an answer may merge with the end of its
    prompt into one token (``assistant⏎`` and ``⏎Hello``). But generation starts from the tokens of the prompt alone, so
    the model would be trained on a prompt that never occurs. Then the two are tokenised separately. In a conversation
    that continues, the merged token is the right one, since it is what the next prompt has; hence one sample per turn.
    """
    input_ids, places = tokenise_rendered(tokenizer, text)
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
    asked, asked_places = tokenise_rendered(tokenizer, text[:start])
    whole = tokenizer.decode(input_ids)
    for before in ("", tokenizer.eos_token or "", "\n"):  # some tokenizers put a space before the beginning of a text
        answer, answer_places = tokenise_rendered(tokenizer, before + text[start:])
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


def turn_end(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], within: list[int], text: str, places: list[Span]
) -> int:
    """Return the last token that the model has to generate in a turn found by prefixes.

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


def include_stop(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], last: int) -> int:
    """Return the last token of a marked span, or the stopping token right after it, which some marks leave out."""
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
