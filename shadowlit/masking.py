"""Secrets are masked in what is written: passwords, tokens and keys, by their names, and the logins in addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "**********"
"""What is written instead of a secret, as by the ``SecretStr`` of pydantic and jsonargparse."""

_NAME = re.compile(
    r"""(?:^|_)(?: (?:password|passwd|passphrase|pwd|secret|credential|cookie)s? | authorization | auth | jwt
      | (?:db|database|user|admin|root|smtp|proxy|login|http)_?pass
      | (?:api|access|secret|private|account|storage|signing|encryption|license|service|ssh|deploy|master|shared
          )_?keys?(?:_id)?
      | (?:api|auth|authentication|access|bearer|refresh|session|security|secret|sas|deploy|upload|hf|hub|github|gitlab
          )token
    )$""",
    re.VERBOSE,
)
_TOKEN = re.compile(r"(?:^|_)tokens?$")
# Of tokenizers, templates and metrics: words of keys whose tokens are not secrets.
_OF_TEXT = {
    "alora", "base", "control", "filler", "grafted", "instruct", "invocation", "trainable", "tuned",
    "added", "all", "answer", "assistant", "audio", "average", "begin", "boa", "boi", "bos", "boundary", "cls",
    "count", "decoded", "end", "eoa", "eoi", "eom", "eos", "eot", "every", "extra", "fim", "first", "forced",
    "generated", "image", "input", "label", "language", "last", "line", "loss", "mask", "masked", "max", "mean",
    "message", "middle", "min", "ms", "n", "nats", "new", "newline", "next", "num", "number", "output", "pad",
    "padding", "patch", "per", "placeholder", "position", "predicted", "prefix", "previous", "prompt", "real",
    "response", "row", "s", "seconds", "seen", "sep", "skip", "special", "start", "stop", "string", "suffix",
    "supervised", "system", "target", "text", "think", "thinking", "tool", "total", "train", "trained", "turn",
    "unk", "unknown", "unsupervised", "used", "val", "video", "vision", "vocab", "word",
}  # fmt: skip
_IN_QUERY = re.compile(r"(?:^|[_.])(?:sig|signature|key|code|pass)$")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|-")
_HOST = r"[^\s/'\"]+@(?=[\w\[])"
_ADDRESSES = (
    re.compile(rf"(\w://(?![^\s/@]*:\*+@)(?:[^\s/'\"@:]*:)?){_HOST}"),
    re.compile(r"(\w://[^\s/'\"@:]*:)(?!\*+@|\d+/)[^\s'\"@,]+@(?=[\w\[])"),  # with a slash in the password
)
_WITHOUT_SCHEME = re.compile(rf"(?:^|(?<=[\s'\"=(,/]))([\w.+%~-]+:)(?!\*+@){_HOST}")
_QUERY = re.compile(r"(?<=[?&;])([\w.-]+)=([^\s&;'\"]+)")
_HEADER = re.compile(
    r"((?i:authorization|x-api-key)['\"]?\s*[:=]\s*['\"]?(?:(?:Bearer|Basic|Token|Digest) )?|\bBearer (?=\S*\d))"
    r"(?!\*|(?:Bearer|Basic|Token|Digest) )[^\s'\",;]+"
)
_KEY = re.compile(r"(?<![\w.-])(?P<key>[\w.-]*\w)(?P<quote>['\"]?)(?P<sign>\s*[=:]\s*|\s+is\s+(?=[\['\"{(\d])|\s+)")
_VALUE = re.compile(
    r"""b?"(?:[^"\\]|\\.)*" | b?'(?:[^'\\]|\\.)*'
      | [\[{(](?:[^][(){}]|[\[{(][^][(){}]*[\]})])*[\]})] | [\[{(].*?[\]})]  # lists and mappings, nested once
      | (?:(?:Bearer|Basic|Token)[ ])?[^\s,;&'"{}\[\])]+""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"[\[(]?[\d.,\s+-]+[\])]?")
_NOTHING = {"null", "none", "true", "false", "''", '""', "[]", "{}", "()", MASK}


def is_secret(key: str) -> bool:
    """Return whether the last part of a dotted key names a secret: ``api_key`` and ``slack_token``, but not
    ``pad_token``.
    """
    name = _words(key)
    return bool(_NAME.search(name)) or (bool(_TOKEN.search(name)) and _OF_TEXT.isdisjoint(name.split("_")))


def masked(value: Any, secret: bool = False) -> Any:
    """Return a copy of a configuration of plain values in which secrets are masked, and nothing else is changed.

    Args:
        value: Mappings and lists of any depth, and what is in them.
        secret: Whether the value belongs to a key that names a secret.
    """
    if isinstance(value, Mapping):
        # {name: api_key, value: x}
        named = any(is_secret(str(value.get(key, ""))) for key in ("name", "key", "header"))
        return {
            key: masked(each, secret or _hides(key, each) or (named and key == "value")) for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        options = ["", *(each if isinstance(each, str) and each[:2] == "--" else "" for each in value)]
        return type(value)([masked(each, secret or is_secret(at)) for at, each in zip(options, value, strict=False)])
    if secret and not isinstance(value, bool) and value not in (None, ""):
        return MASK
    if not isinstance(value, str):
        return value
    # Prose may speak of "token: x"; an address has no spaces, and what begins with a bracket is a mapping as text.
    is_prose = value[:1] not in ("{", "[") and re.search(r"\s", value)
    return _mask_forms(value) if is_prose else mask_text(value)


def mask_text(text: str) -> str:
    """Return a message, a command line or an address in which secrets are masked."""
    text = _WITHOUT_SCHEME.sub(rf"\1{MASK}@", _mask_forms(text))
    kept, end = [], 0
    for found in _KEY.finditer(text):
        key, sign = found["key"], found["sign"].strip()
        in_prose = found["quote"] == "" and sign != "=" and "." not in key and not key.startswith("--")
        if (
            not is_secret(key)
            or not (sign or key.startswith("--"))
            or (in_prose and key.lower() in ("token", "tokens"))
        ):
            continue
        value = _VALUE.match(text, found.end())
        if value is None or value.start() < end or value[0].lower() in _NOTHING or not _hides(key, value[0]):
            continue
        kept.append(f"{text[end : value.start()]}{MASK}")
        end = value.end()
    return "".join([*kept, text[end:]])


def _mask_forms(text: str) -> str:
    """Mask what is a secret by its form: logins and query parameters in addresses, headers of requests."""
    for address in _ADDRESSES:
        text = address.sub(rf"\1{MASK}@", text)
    text = _HEADER.sub(rf"\1{MASK}", text)
    return _QUERY.sub(
        lambda part: f"{part[1]}={MASK}" if is_secret(part[1]) or _IN_QUERY.search(_words(part[1])) else part[0], text
    )


def _hides(key: Any, value: Any) -> bool:
    """Whether a key's value is a secret; ``tokens`` may be a number of them, or their ids."""
    counts = str(key).lower().endswith("tokens") and _NUMBER.fullmatch(str(value))
    return is_secret(str(key)) and not counts


def _words(key: str) -> str:
    return _CAMEL.sub("_", key.rpartition(".")[2].lstrip("-")).lower()


def masks_in(value: Any, key: str = "") -> list[str]:
    """Return the dotted keys of a configuration whose value is the mask of a secret, and not the secret itself."""
    if isinstance(value, Mapping):
        return [found for name, each in value.items() for found in masks_in(each, f"{key}.{name}" if key else name)]
    if isinstance(value, list | tuple):
        return [found for i, each in enumerate(value) for found in masks_in(each, f"{key}[{i}]")]
    value = value.get_secret_value() if hasattr(value, "get_secret_value") else value
    return [key] if isinstance(value, str) and (value == MASK or f"{MASK}@" in value) else []
