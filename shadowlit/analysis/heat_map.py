"""A picture of a comparison: layer by kind of tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from shadowlit.analysis.similarity import Group, Similarity
from shadowlit.errors import ShadowlitError

FORMATS = (".png", ".pdf", ".svg")


def plot_heat_map(similarities: Sequence[Similarity], target: Path) -> Path:
    """Draw the comparisons below each other: σ of models, the cosine of updates and offsets, by layer and kind.

    A cell is the value of all weights of that kind in that layer: the mean σ, or the cosine over all elements. Biases
    aren't drawn, cells without a value are grey. All σ have one scale, from zero; all cosines have one that is
    symmetric about zero.

    Args:
        similarities: at least one.
        target: the picture's path; its ending gives the format.

    Returns:
        ``target``.

    Raises:
        ShadowlitError: no tensor lies in a decoder layer.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [_cells(similarity) for similarity in similarities]
    kinds = list(dict.fromkeys(kind for table in tables for kind, _ in table))
    layers = sorted({layer for table in tables for _, layer in table})
    if not layers:
        raise ShadowlitError("no tensor lies in a decoder layer, so that there is nothing to draw. Leave heat_map out.")
    height = 1.2 + 0.3 * len(kinds)
    figure, axes = plt.subplots(
        len(tables),
        figsize=(max(6.0, 3.2 + 0.28 * len(layers)), 0.2 + height * len(tables)),
        layout="constrained",
        squeeze=False,
    )
    for axis, similarity, table in zip(axes[:, 0], similarities, tables, strict=True):
        weights = similarity.of == "weights"
        alike = [t for s, t in zip(similarities, tables, strict=True) if (s.of == "weights") == weights]
        top = max((abs(v) for t in alike for v in t.values() if not math.isnan(v)), default=0.0) or 1.0
        rows = [[table.get((kind, layer), math.nan) for layer in layers] for kind in kinds]
        image = axis.imshow(
            rows, cmap="viridis" if weights else "RdBu", aspect="auto", vmin=0 if weights else -top, vmax=top
        )
        axis.set_facecolor("lightgrey")  # of cells without a value
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize="small")
        axis.set_xlabel("decoder layer")
        axis.set_title(
            f"σ({similarity.title}): their mean is {similarity.sigma:.4f}"
            if weights
            else f"cos({similarity.title}): {similarity.whole.sums.cosine:.3f} over all tensors"
        )
        figure.colorbar(image, ax=axis, label="σ" if weights else "cosine")
    figure.savefig(target, dpi=150, format=target.suffix[1:])
    plt.close(figure)
    return target


def _cells(similarity: Similarity) -> dict[tuple[str, int], float]:
    """The value by kind and layer; several tensors of one kind in one layer, as experts are, count together."""
    found: dict[tuple[str, int], list[int]] = {}
    for i, tensor in enumerate(similarity.tensors):
        if tensor.layer is not None and not tensor.name.endswith(".bias"):
            found.setdefault((tensor.kind, tensor.layer), []).append(i)
    measure = similarity.measures[0]
    return {
        cell: Group(None, tuple(similarity.tensors[i] for i in members)).measure(measure)
        for cell, members in found.items()
    }
