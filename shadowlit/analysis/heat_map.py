"""Heat maps of layer by kind of tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from shadowlit.analysis.similarity import Similarity
from shadowlit.checkpoint.names import is_bias
from shadowlit.errors import ShadowlitError
from shadowlit.plotting import DIVERGING, DOUBLE, SEQUENTIAL, SINGLE, panels, styled

_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "gate_proj", "up_proj", "down_proj")

Cells = Mapping[tuple[str, int], float]
_LABELS = {
    "sigma": "σ",
    "cosine": "cosine",
    "relative_norm": "relative norm",
    "sign_agreement": "share of equal signs",
    "norm_ratio": "ratio of norms",
}


@dataclass(frozen=True)
class HeatMap:
    """What one panel shows: a value by kind of tensor and decoder layer, NaN for none.

    ``centre`` is the value in the middle of a diverging map; None for a map that begins at zero.
    """

    title: str
    cells: Cells
    label: str
    centre: float | None = None


def of_similarity(similarity: Similarity, measure: str | None = None) -> HeatMap:
    """Return a comparison by layer and kind: by one of its measures, or by its first, σ of models, the cosine of all
    others.

    A cell is the value of all weights of that kind in that layer: the mean σ, or any other measure over all elements.
    Biases aren't shown. Example: ``of_similarity(compare_models(base, instruct))``.
    """
    measure = measure or similarity.measures[0]
    # Several tensors of one kind in one layer, as experts are, count together.
    groups = similarity.whole.split(lambda t: None if t.layer is None or is_bias(t.name) else (t.kind, t.layer))
    cells = {group.key: group.measure(measure) for group in groups}
    if measure == "sigma":
        title = f"σ({similarity.title}): their mean is {similarity.sigma:.4f}"
    else:
        short = "cos" if measure == "cosine" else _LABELS[measure]
        title = f"{short}({similarity.title}): {similarity.total.measure(measure):.3f} over the matrices"
    centre = {"cosine": 0.0, "sign_agreement": 0.5}.get(measure) if similarity.of != "weights" else None
    return HeatMap(title, cells, _LABELS[measure], centre)


def in_order(kinds: Iterable[str]) -> list[str]:
    """Return the kinds of tensors in the order in which a layer uses them, unknown ones behind by name."""
    return sorted(set(kinds), key=lambda kind: (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind))


@styled
def draw_heat_maps(maps: Sequence[HeatMap]) -> Figure:
    """Draw maps below each other, many narrow ones in two columns; layers to the right, cells without a value grey.

    Maps of one label have one scale: from zero, or symmetric about their centre.
    Example: ``draw_heat_maps(norm_maps(norms_of(deltas)))``.

    Raises:
        ShadowlitError: No tensor lies in a decoder layer.
    """
    kinds = in_order({kind for one in maps for kind, _ in one.cells})
    layers = sorted({layer for one in maps for _, layer in one.cells})
    if not layers:
        raise ShadowlitError("no tensor lies in a decoder layer, so that there is nothing to draw. Leave heat_map out.")
    width = min(DOUBLE, max(SINGLE, 1.8 + 0.17 * len(layers)))
    columns = 2 if len(maps) > 2 and width == SINGLE else 1
    figure, axes = panels(len(maps), columns, width * columns, 0.75 + 0.15 * len(kinds))
    step = -(-len(layers) // 20)
    for number, (axis, one) in enumerate(zip(axes, maps, strict=True)):
        low, high = limits((v for other in maps if other.label == one.label for v in other.cells.values()), one.centre)
        image = axis.imshow(
            [[one.cells.get((kind, layer), math.nan) for layer in layers] for kind in kinds],
            cmap=SEQUENTIAL if one.centre is None else DIVERGING,
            aspect="auto",
            vmin=low,
            vmax=high,
        )
        axis.set_facecolor("lightgrey")
        axis.set_yticks(range(len(kinds)), kinds if number % columns == 0 else [""] * len(kinds))
        axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axis.tick_params(length=0)
        axis.set_title(one.title)
        if number + columns >= len(maps):
            axis.set_xlabel("decoder layer")
        figure.colorbar(image, ax=axis, label=one.label)
    return figure


def limits(values: Iterable[float], centre: float | None) -> tuple[float, float]:
    """Return the ends of the colours: from zero, or symmetric about a centre."""
    reach = max((abs(value - (centre or 0.0)) for value in values if not math.isnan(value)), default=0.0) or 1.0
    return (0.0, reach) if centre is None else (centre - reach, centre + reach)
