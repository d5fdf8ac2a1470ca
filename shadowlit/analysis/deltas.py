"""Updates compared: opened from any format that holds one, their sizes, angles and conflicts."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shadowlit.analysis.similarity import Report, Similarity, compare, similarity
from shadowlit.analysis.tables import Table
from shadowlit.checkpoint.folder import DELTA_FILE
from shadowlit.checkpoint.names import in_totals, is_bias, kind_of, layer_of
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, described
from shadowlit.delta.checkpoints import latest, open_stage, spread
from shadowlit.delta.delta import Delta
from shadowlit.errors import DataError, GraftError
from shadowlit.grafting.disk import linear_on_disk
from shadowlit.grafting.selection import resolve
from shadowlit.grafting.tuned import open_update
from shadowlit.pair import buffers
from shadowlit.pair.folders import model_folder
from shadowlit.plotting import HeatMap

# -- opening --------------------------------------------------------------------------------------------------


def open_model(source: str | Path, key: str = "source") -> TensorReader:
    """Return the weights of a model: a folder, or a hub id. Example: ``open_model(base)``."""
    return buffers.open_model(model_folder("the", str(source), key=key)).learned()


def open_delta(source: str | Path, base: str | Path | None = None, select: str | list[str] | None = None) -> Delta:
    """Open the update in any of several formats; nothing is read before its rows are requested.

    Args:
        source: Folder of a run or a checkpoint of it (the newest one, also of a running training), a folder of
            ``shadowlit delta make``, an adapter, or a tuned model.
        base: Folder or hub id of the model that an adapter or a tuned model was trained from.
        select: Tensors, as in ``graft.select``; None for those that the run grafts, and for all of any other update.

    Raises:
        DataError: It is none of these.
        GraftError: It doesn't fit the Base, or has no exact update.
    """
    folder = Path(source)
    is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if any((folder / name).is_file() for name in (DELTA_FILE, f"{DELTA_FILE}.index.json")):
        delta = Delta.open(folder)
    elif folder.suffix == ".ckpt" or (folder.is_dir() and not is_model):
        return open_stage(latest(folder), select=select)
    elif base is None:
        raise DataError(
            f"{source} is a model or an adapter, whose update needs the base that it was trained from. Give it."
        )
    else:
        reader = open_model(base, key="base")
        delta = Delta.from_update(open_update(reader, model_folder("tuned", str(source), key="source")))
    if select is None:
        return delta
    return delta.only(resolve(select, delta.shapes, linear_on_disk(described(delta.shapes)), "of the update"))


def open_deltas(sources: Mapping[str, str | Path], base: str | Path | None = None) -> dict[str, Delta]:
    """Open several updates by name; see :func:`open_delta`.

    Example: ``deltas = open_deltas({"lora": "runs/lora"})``.
    """
    return {name: open_delta(source, base) for name, source in sources.items()}


def reader_of(name: str, delta: Delta) -> TensorReader:
    """Present a delta, computed as it is read, as a checkpoint in float32; messages call it ``name``."""
    return ComputedReader(Path(name), described(dict(sorted(delta.shapes.items()))), delta.rows)


# -- sizes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorNorm:
    """The size of one tensor of an update: its squared Euclidean norm, and that of the weights, NaN if not given.

    ``in_total`` is whether it counts in the relative size of the whole; see
    :func:`shadowlit.checkpoint.names.in_totals`.
    """

    name: str
    layer: int | None
    kind: str
    num_elements: int
    square: float
    weight_square: float
    in_total: bool = True


def norms_of(deltas: Mapping[str, Delta], weights: TensorReader | None = None) -> dict[str, list[TensorNorm]]:
    """Return the size of every tensor of several updates, streamed. Example: ``norms_of(deltas, open_model(base))``.

    Args:
        deltas: Updates by name.
        weights: Weights that they are updates of, for relative norms. Where these lack a tensor or have another shape
            (a vocabulary of another size), the relative norm is NaN.
    """
    return {name: _norms(delta, weights) for name, delta in deltas.items()}


def _norms(delta: Delta, weights: TensorReader | None) -> list[TensorNorm]:
    squares: dict[str, float] = {}
    if weights is not None:
        names = [n for n, s in delta.shapes.items() if n in weights.tensors and weights.tensors[n].shape == s]
        rows = weights.rows
        whole = Delta({n: delta.shapes[n] for n in names}, lambda n, i, j: torch.from_numpy(rows(n, i, j)))
        squares = whole.squares()
    total = in_totals(delta.shapes)
    return [
        TensorNorm(
            name,
            layer_of(name),
            kind_of(name),
            math.prod(delta.shapes[name]),
            square,
            squares.get(name, math.nan),
            name in total,
        )
        for name, square in delta.squares().items()
    ]


def norm_maps(found: Mapping[str, Sequence[TensorNorm]]) -> list[HeatMap]:
    """Return a map for every update: ``‖Δ‖ / ‖W‖`` by layer and kind, over all elements of the weights in a cell; in
    percent.

    Without the weights the root mean square of the update, ``‖Δ‖ / √n``. Example: ``norm_maps(norms_of(deltas))``.
    """
    return [_norm_map(title, tensors) for title, tensors in found.items()]


def _norm_map(title: str, found: Sequence[TensorNorm]) -> HeatMap:
    relative = not all(math.isnan(one.weight_square) for one in found)
    sums: dict[tuple[str, int], list[float]] = {}
    for one in found:
        if one.layer is not None and not is_bias(one.name):
            cell = sums.setdefault((one.kind, one.layer), [0.0, 0.0])
            cell[0] += one.square
            cell[1] += one.weight_square if relative else one.num_elements
    scale = 100 if relative else 1
    cells = {at: scale * math.sqrt(up / down) if down else math.nan for at, (up, down) in sums.items()}
    label = "‖Δ‖ / ‖W‖ (%)" if relative else "root mean square of Δ"
    norm = math.sqrt(sum(one.square for one in found))
    return HeatMap(f"{title}: ‖Δ‖ = {norm:.3g}", cells, label)


def norm_table(found: Mapping[str, Sequence[TensorNorm]]) -> Table:
    """Return a row per update: size, relative size, kind of the largest share.

    Example: ``norm_table(norms_of(deltas))``. The relative size, ``‖Δ‖ / ‖W‖``, is over the matrices, if there are any;
    the rest is over all tensors.
    """
    rows = []
    for name, tensors in found.items():
        square = sum(one.square for one in tensors)
        counted = [one for one in tensors if one.in_total]
        weights = sum(one.weight_square for one in counted)
        by_kind: dict[str, float] = {}
        for one in tensors:
            by_kind[one.kind] = by_kind.get(one.kind, 0.0) + one.square
        kind = max(by_kind, key=by_kind.__getitem__)
        share = f"{kind} ({by_kind[kind] / square:.0%})" if square else None
        elements = sum(one.num_elements for one in tensors)
        relative = math.sqrt(sum(one.square for one in counted) / weights) if weights else math.nan
        rows.append((name, elements, math.sqrt(square), math.sqrt(square / max(1, elements)), relative, share))
    columns = ("update", "elements", "‖Δ‖", "root mean square", "‖Δ‖ / ‖W‖", "largest share of ‖Δ‖²")
    return Table(columns, rows)


# -- angles and conflicts -------------------------------------------------------------------------------------


def compare_models(base: str | Path, instruct: str | Path) -> Similarity:
    """Compute σ, cosine and relative norm of a pair. Example: ``compare_models(base, instruct).sigma``."""
    (found,) = similarity(base, instruct).similarities
    return replace(found, a="Base", b="Instruct")


def compare_deltas(deltas: Mapping[str, Delta], density: float = 1.0) -> list[Similarity]:
    """Compare every two of several updates: cosine, equal signs, ratio of norms, by tensor. Streamed in one pass.

    Example: ``compare_deltas(deltas)[0].total.sums.cosine``.

    Args:
        deltas: Two to 26 updates by name; a tensor that one lacks is zero there.
        density: Share of each tensor's elements, the largest, that are compared; the others count as zero, as TIES
            (arXiv 2306.01708) trims them. Below 1, one tensor of each is in memory.

    Raises:
        PairError: Fewer than two or more than 26, or they differ in shape.
        GraftError: The density is outside (0, 1].
    """
    kept = dict(deltas) if density == 1 else {name: trimmed(delta, density) for name, delta in deltas.items()}
    report: Report = compare([reader_of(name, delta) for name, delta in kept.items()], deltas=True)
    names = dict(zip(string.ascii_uppercase, deltas, strict=False))
    return [replace(found, a=names[found.a], b=names[found.b]) for found in report.similarities]


def trimmed(delta: Delta, density: float) -> Delta:
    """Return the update with only the largest elements of each tensor; see
    :func:`shadowlit.delta.transforms.magnitude`.
    """
    return delta.map([{"name": "magnitude", "density": density}])


@dataclass(frozen=True)
class Matrix:
    """A number for every two updates, ``values`` [k, k]; the diagonal is what an update has with itself.

    Attributes:
        centre: The value of unrelated updates, for a diverging map; None for a map from 0 to 1.
        inverted: High values are the bad ones.
    """

    names: tuple[str, ...]
    values: Tensor
    label: str
    centre: float | None = None
    inverted: bool = False


def matrix(similarities: Sequence[Similarity], measure: str = "cosine") -> Matrix:
    """Return a measure of every two updates, over all elements of their matrices.

    Example: ``matrix(compare_deltas(deltas), "sign_conflict")``.

    Args:
        similarities: Results of :func:`compare_deltas`.
        measure: ``cosine``; ``sign_agreement``; or ``sign_conflict``, the share of opposite signs among the elements
            that neither leaves at zero.
    """
    names = tuple(dict.fromkeys(name for found in similarities for name in (found.a, found.b)))
    conflict = measure == "sign_conflict"
    values = torch.full((len(names), len(names)), 0.0 if conflict else 1.0, dtype=torch.float64)
    for found in similarities:
        value = found.total.measure("sign_agreement" if conflict else measure)
        i, j = names.index(found.a), names.index(found.b)
        values[i, j] = values[j, i] = 1 - value if conflict else value
    labels = {"sign_conflict": "share of opposite signs", "sign_agreement": "share of equal signs"}
    return Matrix(names, values, labels.get(measure, measure), 0.0 if measure == "cosine" else 0.5, conflict)


def pair_table(similarities: Sequence[Similarity]) -> Table:
    """Return a row for every two: cosine, opposite signs, norms. Example: ``pair_table(compare_deltas(deltas))``."""
    rows = []
    for found in similarities:
        total = found.total.sums
        rows.append((found.title, total.cosine, 1 - total.sign_agreement, total.norm_ratio))
    return Table(("updates", "cosine", "opposite signs", "‖b‖ / ‖a‖"), rows)


def only(similarities: Sequence[Similarity], a: str, b: str) -> Similarity:
    """Return the comparison of two updates out of those of several.
    Example: ``only(compare_deltas(deltas), "lora", "full")``.

    Raises:
        DataError: There is none of the two.
    """
    found = [one for one in similarities if {one.a, one.b} == {a, b}]
    if not found:
        names = sorted({name for one in similarities for name in (one.a, one.b)})
        raise DataError(f"{a} and {b} were not compared; there are {', '.join(names)}. Give two of them.")
    return found[0]


def matrices(delta: Delta, layers: Sequence[int] | None = None) -> list[str]:
    """Return the names of the matrices of an update in these decoder layers, in the order of layers and names.

    By default, there are up to four layers, evenly spread with both ends: singular values of large matrices take
    seconds each.

    Raises:
        GraftError: The update has no matrix in them.
    """
    named = {name: layer_of(name) for name, shape in delta.shapes.items() if len(shape) == 2}
    there = sorted({layer for layer in named.values() if layer is not None})
    if layers is None:
        layers = [there[i] for i in spread(len(there), 4)]
    wanted = set(layers)
    found = sorted((layer, name) for name, layer in named.items() if layer is not None and layer in wanted)
    if not found:
        raise GraftError(f"the update has no matrix in the layers {sorted(wanted)}; it has some in {there}.")
    return [name for _, name in found]
