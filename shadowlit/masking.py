"""Secrets are masked in what is written: passwords, tokens and keys, by their names, and the logins in addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "**********"
"""What is written instead of a secret, as by the ``SecretStr`` of pydantic and jsonargparse."""

_NAME = re.compile(
    r"""(?:^|_)(?: password | passwd | passphrase | pwd | secrets? | credentials? | authorization
      | (?:api|access|secret|private|account|storage|signing|encryption|license|service)_?keys?(?:_id)?
      | (?:api|auth|authentication|access|bearer|refresh|session|security|secret|sas|deploy|upload|hf|hub|huggingface
          |github|gitlab|wandb|comet|neptune|mlflow|clearml)_?token
    )$ | ^token$""",
    re.VERBOSE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|-")
_HOST = r"[^\s/'\"]+@(?=[\w\[])"
_ADDRESS = re.compile(rf"(\w://(?![^\s/@]*:\*+@)(?:[^\s/'\"@:]*:)?){_HOST}")
_WITHOUT_SCHEME = re.compile(rf"(?:^|(?<=[\s'\"=(,/]))([\w.+%~-]+:)(?!\*+@){_HOST}")
_KEY = re.compile(r"(?<![\w.-])(?P<key>[\w.-]*\w)(?P<quote>['\"]?)(?P<sign>\s*[=:]\s*|\s+)")
_VALUE = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|(?:(?:Bearer|Basic|Token) )?[^\s,;&'\"{}\[\])]+")
_NOTHING = {"null", "none", "true", "false", "''", '""', MASK}


def is_secret(key: str) -> bool:
    """Whether the last part of a dotted key names a secret: ``api_key`` and ``password``, but not ``pad_token``."""
    return _NAME.search(_CAMEL.sub("_", key.rpartition(".")[2].lstrip("-")).lower()) is not None


def masked(value: Any, secret: bool = False) -> Any:
    """A copy of a configuration of plain values in which secrets are masked, and nothing else is changed.

    Args:
        value: Mappings and lists of any depth, and what is in them.
        secret: Whether the value belongs to a key that names a secret.
    """
    if isinstance(value, Mapping):
        return {key: masked(each, secret or is_secret(str(key))) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([masked(each, secret) for each in value])
    if secret and isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return MASK
    if not isinstance(value, str):
        return value
    # Prose may speak of "token: x"; an address has no spaces, and what begins with a bracket is a mapping as text.
    is_prose = value[:1] not in ("{", "[") and re.search(r"\s", value)
    return _ADDRESS.sub(rf"\1{MASK}@", value) if is_prose else mask_text(value)


def mask_text(text: str) -> str:
    """A message, a command line or an address in which secrets are masked."""
    for address in (_ADDRESS, _WITHOUT_SCHEME):
        text = address.sub(rf"\1{MASK}@", text)
    kept, end = [], 0
    for found in _KEY.finditer(text):
        key, sign = found["key"], found["sign"].strip()
        in_prose = found["quote"] == "" and sign != "=" and "." not in key and not key.startswith("--")
        if not is_secret(key) or not (sign or key.startswith("--")) or (in_prose and key.lower() == "token"):
            continue
        value = _VALUE.match(text, found.end())
        if value is not None and value.start() >= end and value[0].lower() not in _NOTHING:
            kept.append(f"{text[end : value.start()]}{MASK}")
            end = value.end()
    return "".join([*kept, text[end:]])


def masks_in(value: Any, key: str = "") -> list[str]:
    """The dotted keys of a configuration whose value is the mask of a secret, and not the secret itself."""
    if isinstance(value, Mapping):
        return [found for name, each in value.items() for found in masks_in(each, f"{key}.{name}" if key else name)]
    if isinstance(value, list | tuple):
        return [found for i, each in enumerate(value) for found in masks_in(each, f"{key}[{i}]")]
    value = value.get_secret_value() if hasattr(value, "get_secret_value") else value
    return [key] if isinstance(value, str) and (value == MASK or f"{MASK}@" in value) else []
