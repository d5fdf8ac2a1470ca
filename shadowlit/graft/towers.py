"""The towers of a vision-language model: whose language model, vision tower or projector a tensor is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

TOWERS = ("language", "vision", "projector")

# By the names that transformers' models have for them, in modules and in files alike. The projector of Qwen-VL is a
# part of its vision tower's module, so it is looked for first.
_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|image_newline|merger|deepstack_merger_list|connector|aligner"
    r"|embed_vision)(\.|$)"
)
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|vision_backbone)(\.|$)")
_SOUND = re.compile(r"(^|\.)(audio_tower|audio_model|embed_audio|audio)(\.|$)")


def tower_of(name: str) -> str:
    """The tower that a tensor or module of this name belongs to: one of :data:`TOWERS`, or ``audio``.

    Everything that is nothing else is of the language model, so all of a text model is.
    """
    if _SOUND.search(name):
        return "audio"
    if _PROJECTOR.search(name):
        return "projector"
    return "vision" if _VISION.search(name) else "language"


def split_selection(select: str | Iterable[str]) -> tuple[list[str], list[str]]:
    """The towers that a selection names, and the rest of it: ``linear``, ``all``, patterns."""
    parts = [select] if isinstance(select, str) else list(select)
    return [part for part in parts if part in TOWERS], [part for part in parts if part not in TOWERS]


def count_towers(names: Iterable[str]) -> dict[str, int]:
    """How many of ``names`` belong to each tower, towers without any left out."""
    counts = Counter(tower_of(name) for name in names)
    return {tower: counts[tower] for tower in (*TOWERS, "audio") if counts[tower]}
