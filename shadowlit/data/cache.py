"""Where tokenised data are kept, and under which key: whatever the tokens depend on."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

_CODE = ("blocks", "dataset", "document", "formats", "images", "preference", "sources", "template")
_PACKAGES = ("transformers", "tokenizers", "jinja2")


def default_folder() -> Path:
    """The folder ``shadowlit`` beside what ``datasets`` keeps: ``HF_DATASETS_CACHE``, or ``HF_HOME``'s."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser() / "shadowlit"


def cache_key(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    """A name for what ``settings`` and the tokenizer make, in hexadecimal.

    Our own code and the versions of what renders and tokenises are part of it, so that no change of theirs is
    answered with what was made before.

    Args:
        tokenizer: A fast one, with the chat template in it.
        settings: Whatever else the tokens depend on; anything that JSON can hold.
    """
    parts = {
        "settings": settings,
        "tokenizer": digest_tokenizer(tokenizer),
        "code": _digest_code(),
        "packages": {name: version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a fast tokenizer: its class, vocabulary, rules, special tokens and chat template."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # of the last call, which ours set anew
        core.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [type(tokenizer).__name__, core, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _digest_code() -> str:
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()
