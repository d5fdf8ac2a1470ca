"""The style of every plot: colours, sizes, the two files that a figure is saved to; and heat maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shadowlit.errors import ShadowlitError
from shadowlit.files import written_beside

_PRINT_DPI, _SCREEN_DPI = 300, 120
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "gate_proj", "up_proj", "down_proj")

Cells = Mapping[tuple[str, int], float]

OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}
"""Okabe and Ito's palette, whose colours can be distinguished with any kind of colour vision."""
SERIES = tuple(OKABE_ITO[name] for name in ("blue", "vermillion", "green", "purple", "orange", "sky", "black"))
"""Colours of lines that have no meaning of their own, in order; yellow is too pale for lines on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Markers in the order of :data:`SERIES`, so that lines can be distinguished in grey too."""
SUBJECTS: dict[str, dict[str, Any]] = {
    "grafted": {"color": OKABE_ITO["vermillion"], "linestyle": "-", "marker": "o", "label": "grafted Instruct"},
    "tuned": {"color": OKABE_ITO["blue"], "linestyle": "-", "marker": "s", "label": "tuned Base"},
    "instruct": {"color": OKABE_ITO["vermillion"], "linestyle": "--", "label": "Instruct, untouched"},
    "base": {"color": OKABE_ITO["blue"], "linestyle": ":", "label": "Base, untouched"},
}
"""The four models: blue for the Base and vermillion for the Instruct, broken lines for the untouched ones."""
SEQUENTIAL, DIVERGING = "viridis", "RdBu"
"""Colour maps: perceptually uniform, from zero; and diverging, to be centred on zero."""
SINGLE, DOUBLE = 3.4, 7.0
"""Width of one and of two columns of a paper, in inches."""

PAPER: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "image.interpolation": "nearest",
}
"""Matplotlib's settings for text that is readable at column width."""
# Type 42 embeds TrueType outlines as they are: text stays text, and journals that refuse Type 3 accept it.
_EMBEDDED: dict[Any, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}


styled = matplotlib.rc_context(PAPER)
"""Decorator of functions that draw with :data:`PAPER`; it leaves matplotlib's settings as they were."""


def panels(
    count: int, columns: int, width: float, height: float, extra: float = 0.0, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure outside of pyplot, which would keep it, and the axes of its ``count`` panels, row by row.

    It is ``width`` inches wide and ``height`` inches high for each row, and ``extra`` for all. ``options`` are further
    arguments of ``Figure.subplots``.
    """
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows + extra), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    hide(axes[count:])
    return figure, axes[:count]


def series_style(number: int, black: bool = True) -> dict[str, Any]:
    """Colour and marker of the line with this number, from 0; grey takes the place of black if ``black`` is false.

    When the colours repeat, they are combined with other markers.
    """
    colours = SERIES if black else (*SERIES[:-1], "#999999")
    turn = number // len(colours)
    return {"color": colours[number % len(colours)], "marker": MARKERS[(number + turn) % len(MARKERS)]}


@styled
def message(text: str) -> Figure:
    """Return a figure that says why there is nothing to draw, so that other plots can still be drawn."""
    figure, (axis,) = panels(1, 1, DOUBLE, 0.5)
    hide([axis])
    axis.text(0, 0.5, "\n".join(textwrap.wrap(text, 120)), va="center", color="0.35")
    return figure


def steps_axis(axis: Axes, label: str = "optimizer step") -> None:
    """Draw the optimizer steps of a run on the x axis, from 0, and a grid."""
    axis.set_xlabel(label)
    axis.set_xlim(left=0)
    axis.grid()


def hide(axes: Sequence[Axes]) -> None:
    """Leave these axes blank."""
    for axis in axes:
        axis.set_axis_off()


@dataclass(frozen=True)
class SavedFigure:
    """A saved figure, which a notebook shows at its print size; ``stem`` is the path of its files without ending."""

    figure: Figure
    stem: Path

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
        png = self.stem.with_name(f"{self.stem.name}.png").read_bytes()
        return {"image/png": png}, {"image/png": {"width": round(_SCREEN_DPI * self.figure.get_figwidth())}}


def save_image(figure: Figure, target: Path, dpi: int) -> Path:
    """Save a figure atomically in the format of the target's ending; return ``target``.

    Raises:
        OSError: The file can't be written.
    """
    with written_beside(target) as partial:
        figure.savefig(partial, dpi=dpi, format=target.suffix[1:])
    return target


def save_figure(figure: Figure, stem: str | Path) -> SavedFigure:
    """Save ``<stem>.pdf``, vectors with embedded TrueType fonts, and ``<stem>.png`` with 300 dots per inch.

    Both files are written atomically. The PDF holds no date, so that equal figures are equal files.
    Example: ``save_figure(draw_spectra(spectra_of(deltas)), "figures/spectra")``.

    Raises:
        OSError: The files can't be written.
    """
    stem = Path(stem)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for both files alike
    with matplotlib.rc_context(_EMBEDDED):
        for ending, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
            with written_beside(stem.with_name(f"{stem.name}.{ending}")) as partial:
                figure.savefig(partial, format=ending, dpi=_PRINT_DPI, metadata=metadata)
    return SavedFigure(figure, stem)


@dataclass(frozen=True)
class HeatMap:
    """What one panel shows: a value by kind of tensor and decoder layer, NaN for none.

    ``centre`` is the value in the middle of a diverging map; None for a map that begins at zero.
    """

    title: str
    cells: Cells
    label: str
    centre: float | None = None


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
