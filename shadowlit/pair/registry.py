"""The registry of known pairs: which Base belongs to which Instruct, and what to expect when grafting between them.

The pairs are listed in ``pairs.yaml`` next to this module. Imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from shadowlit.errors import PairError

if TYPE_CHECKING:
    from shadowlit.pair.pair import ModelPair

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_COMMIT = r"[0-9a-f]{40}"
_NO_TEXT = r"(?!)"


@dataclass(frozen=True)
class KnownPair:
    """A pair whose two models are published on the Hugging Face hub.

    Attributes:
        name: Short name in lower case, e.g. ``qwen3-4b-2507``.
        family: Release that it belongs to, e.g. ``qwen3``.
        base: Hub id of the Base.
        instruct: Hub id of the Instruct.
        base_revision: Commit of the Base, or None if unknown.
        instruct_revision: Commit of the Instruct, or None if unknown.
        template_owner: Model whose chat template is used for both: ``instruct`` or ``base``.
        base_template: Whether the Base comes with a chat template too, or None if unknown.
        licence: The hub's name for the licence, or None if unknown.
        gated: Whether the hub requires an agreement first, or None if unknown.
        sigma: Published σ of the pair, the mean over the tensors inside the layers (arXiv 2505.12716), 0 to 1; None
            if it is unpublished.
        peculiarities: Properties that matter for a graft: a keyword each, and its meaning.
        official: The two ids in the official list of Shadow-FT, where one of them is wrong.
        note: Anything else to know about this pair.
    """

    name: str
    family: str
    base: str
    instruct: str
    base_revision: str | None = None
    instruct_revision: str | None = None
    template_owner: str = "instruct"
    base_template: bool | None = None
    licence: str | None = None
    gated: bool | None = None
    sigma: float | None = None
    peculiarities: Mapping[str, str] = field(default_factory=dict)
    official: tuple[str, str] | None = None
    note: str | None = None

    def pair(self, trust_remote_code: bool = False) -> ModelPair:
        """Return the two models at their known commits; nothing is read or downloaded.

        Args:
            trust_remote_code: Run Python code that comes with the models.
        """
        from shadowlit.pair.pair import ModelPair  # not needed to list the pairs, and imports slowly

        return ModelPair(self.base, self.instruct, self.base_revision, self.instruct_revision, trust_remote_code)


_KEYS = frozenset(key.name for key in fields(KnownPair))


@cache
def load_registry() -> Mapping[str, KnownPair]:
    """Return all known pairs by name, in the order of ``pairs.yaml``.

    Raises:
        PairError: An entry is malformed; see :func:`parse_registry`.
    """
    return parse_registry(files("shadowlit.pair").joinpath("pairs.yaml").read_text(encoding="utf-8"))


def parse_registry(text: str) -> Mapping[str, KnownPair]:
    """Read a registry.

    Args:
        text: YAML with ``peculiarities``, a mapping from keywords to sentences, and ``families``, a list. A family has
            ``pairs``, the list of its entries, and the values that these have in common; its peculiarities are added to
            those of each entry.

    Raises:
        PairError: The text is not of this form, or an entry has an unknown key, a malformed value or the name of
            another entry; the message names the entry.
    """
    try:
        document = yaml.safe_load(text)
        meanings, families = document["peculiarities"], document["families"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise PairError(
            f"The registry is not YAML with 'peculiarities' and 'families' ({error!r}). Repair it, or install again."
        ) from error
    registry: dict[str, KnownPair] = {}
    for family in families:
        common = {key: value for key, value in family.items() if key != "pairs"}
        for entry in family["pairs"]:
            words = [*common.get("peculiarities", []), *entry.get("peculiarities", [])]
            pair = _parse_entry({**common, **entry, "peculiarities": words}, meanings)
            if pair.name in registry:
                raise _wrong(pair.name, "there are two entries of this name", "one")
            registry[pair.name] = pair
    return MappingProxyType(registry)


def find_pair(name: str) -> KnownPair:
    """Return the known pair of this name.

    Raises:
        PairError: There is none; the message suggests similar names.
    """
    registry = load_registry()
    if name not in registry:
        near = difflib.get_close_matches(name.lower(), registry, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise PairError(
            f"There is no known pair '{name}' among {len(registry)}.{hint} "
            "'shadowlit pairs' lists them; two folders or hub ids, Base and Instruct, work as well."
        )
    return registry[name]


# For each key: a pattern for texts, other values that are valid, and what to expect.
_VALUES: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "name": (r"[a-z0-9]+([.-][a-z0-9]+)*", (), "lower-case letters, digits, dots and hyphens"),
    "family": (r".*", (), "a name"),
    "base": (_HUB_ID, (), "a hub id such as 'org/name'"),
    "instruct": (_HUB_ID, (), "a hub id such as 'org/name'"),
    "base_revision": (_COMMIT, (None,), "a commit of 40 hexadecimal digits, or null"),
    "instruct_revision": (_COMMIT, (None,), "a commit of 40 hexadecimal digits, or null"),
    "template_owner": (r"base|instruct", (), "'base' or 'instruct'"),
    "base_template": (_NO_TEXT, (True, False, None), "true, false or null"),
    "gated": (_NO_TEXT, (True, False, None), "true, false or null"),
    "licence": (r".*", (None,), "a text or null"),
    "note": (r".*", (None,), "a text or null"),
}


def _parse_entry(entry: dict[str, Any], meanings: Mapping[str, str]) -> KnownPair:
    """One entry, including the values of its family."""
    name = entry.get("name") or entry.get("base")
    unknown = sorted(entry.keys() - _KEYS)
    if unknown:
        near = difflib.get_close_matches(unknown[0], _KEYS, n=1)
        raise _wrong(name, f"unknown key {unknown[0]!r}", f"{near[0]!r}" if near else f"one of {sorted(_KEYS)}")
    for key, (pattern, others, expected) in _VALUES.items():
        value = entry.get(key, getattr(KnownPair, key, None))  # the defaults are attributes of the class
        if not (isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL)) and value not in others:
            raise _wrong(name, f"{key} is {value!r}", expected)
    sigma = entry.get("sigma")
    if sigma is not None and not (isinstance(sigma, float) and 0 < sigma < 1):
        raise _wrong(name, f"sigma is {sigma!r}", "a number between 0 and 1, or null")
    if entry["base"] == entry["instruct"]:
        raise _wrong(name, f"base and instruct are both {entry['base']!r}", "two models")
    words = entry["peculiarities"]
    strange = [word for word in words if word not in meanings]
    if strange:
        raise _wrong(name, f"peculiarity {strange[0]!r} is not explained", f"one of {sorted(meanings)}")
    values = {"peculiarities": MappingProxyType({word: meanings[word] for word in words})}
    return KnownPair(**entry | values | {"official": _official(entry)})


def _official(entry: dict[str, Any]) -> tuple[str, str] | None:
    """The ids in the official list, where they differ."""
    name, official = entry["name"], entry.get("official")
    if official is None:
        return None
    if not isinstance(official, dict) or official.keys() != {"base", "instruct"}:
        raise _wrong(name, f"official is {official!r}", "base and instruct, as the official list has them")
    ids = official["base"], official["instruct"]
    if ids == (entry["base"], entry["instruct"]):
        raise _wrong(name, "official names the same two models", "the key only where the official list is wrong")
    return ids


def _wrong(name: str | None, found: str, expected: str) -> PairError:
    return PairError(f"Entry '{name}' of the registry of pairs: {found}. Expected: {expected}. Correct pairs.yaml.")
