"""Plain text to train on, without a chat template: continued pre-training."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.template import Encoded


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
