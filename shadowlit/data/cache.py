"""The cache of tokenised data: its folder, and the key, which covers everything that the tokens depend on."""

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

_CODE = (
    "blocks", "contexts", "conversation", "coverage", "custom_formats", "dataset", "files", "formats", "images",
    "preference_formats", "prepare", "rendering", "sampler", "sources", "tables", "template", "tokenise", "tokens",
    "turns",
)  # fmt: skip
_PACKAGES = ("transformers", "tokenizers", "jinja2")


def default_folder() -> Path:
    """Return the folder ``shadowlit`` in the cache folder of ``datasets``: ``HF_DATASETS_CACHE``, or that of
    ``HF_HOME``.
    """
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser() / "shadowlit"


def cache_key(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    """Return a hexadecimal name for the tokens that the settings and the tokenizer produce.

    It covers our own code and the versions of the packages that render and tokenise, so that tokens of an earlier
    version are never read. ``settings`` are everything else that the tokens depend on, as JSON can represent it.
    """
    parts = {
        "settings": settings,
        "tokenizer": digest_tokenizer(tokenizer),
        "code": _digest_code(),
        "packages": {name: version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a fast tokenizer: its class, vocabulary, rules, special tokens and chat template."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # of the last call; ours set them again
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
