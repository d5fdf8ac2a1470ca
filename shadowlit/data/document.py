"""Plain text to train on, without a chat template: continued pre-training."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.template import Encoded


def encode_document(
    tokenizer: PreTrainedTokenizerBase, text: str, end_token_id: int | None, max_length: int
) -> list[Encoded]:
    """Tokenise a document; every token but the first carries loss, the end of the text too.

    Args:
        tokenizer: Adds its own beginning of a sequence, where it has one.
        text: The document.
        end_token_id: Ends a document in the Base's pre-training; None for no end.
        max_length: A longer document is cut into pieces of so many tokens, none of which is lost.

    Returns:
        The pieces, in order. A last one of a single token would have nothing to learn, and is left out.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if end_token_id is not None and (not ids or ids[-1] != end_token_id):
        ids.append(end_token_id)
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [Encoded(piece, [IGNORE_INDEX, *piece[1:]]) for piece in pieces if len(piece) > 1]
