"""What the plots of all studies have in common: how arms look, and legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from shadowlit.plotting import OKABE_ITO

COLOURS = {
    "Base": OKABE_ITO["sky"],
    "Instruct": OKABE_ITO["black"],
    "B2B": OKABE_ITO["blue"],
    "B2I": OKABE_ITO["vermillion"],
    "I2B": OKABE_ITO["purple"],
    "I2I": OKABE_ITO["green"],
}
MARKERS = {"Base": "P", "Instruct": "X", "B2B": "s", "B2I": "o", "I2B": "^", "I2I": "D"}


def arm_style(arm: str) -> dict[str, Any]:
    """Colour and marker of an arm, the same in every plot."""
    return {"color": COLOURS[arm], "marker": MARKERS[arm]}


def legend_of(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels of what several axes show, each label once."""
    pairs = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(pairs.values()), list(pairs)
