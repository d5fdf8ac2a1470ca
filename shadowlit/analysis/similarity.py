"""How alike two checkpoints are: the paper's σ and its relatives, read from the files a few rows at a time."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from shadowlit.errors import PairError
from shadowlit.graft.checkpoint import CheckpointReader
from shadowlit.graft.headers import some_of
from shadowlit.graft.selection import kind_of
from shadowlit.graft.streaming import row_windows

PAPER_RANGE = (0.003, 0.042)
"""σ of the pairs that Shadow-FT (arXiv 2505.12716) works with, by its authors."""
_LAYER = re.compile(r"\.(\d+)\.")
_THREADS = 2


@dataclass(frozen=True)
class TensorSimilarity:
    """Two tensors of one name, ``a`` and ``b``.

    Attributes:
        name: the tensor's name.
        layer: its decoder layer, from 0; ``None`` outside of them.
        kind: what it is, e.g. ``q_proj``.
        num_elements: its size.
        sigma: ``Σ|a − b| / (Σ|a| + Σ|b|)``: 0 for equal tensors, about 0.7 for unrelated ones of equal size, 1 at most.
        cosine: ``⟨a, b⟩ / (‖a‖ ‖b‖)``.
        relative_norm: ``‖b − a‖ / ‖a‖``.
    """

    name: str
    layer: int | None
    kind: str
    num_elements: int
    sigma: float
    cosine: float
    relative_norm: float


@dataclass(frozen=True)
class Similarity:
    """Two checkpoints, tensor by tensor.

    Attributes:
        tensors: every tensor that both have, in the order of their names.
    """

    tensors: tuple[TensorSimilarity, ...]

    @property
    def sigma(self) -> float:
        """The paper's model-level σ: the plain mean over the tensors inside the decoder layers.

        Embeddings, the final norm and the output head are left out.
        """
        inside = [t.sigma for t in self.tensors if t.layer is not None]
        return sum(inside) / len(inside) if inside else math.nan

    def mean_by(self, key: Callable[[TensorSimilarity], object]) -> dict[object, float]:
        """Plain mean of σ over the tensors of each value of ``key``, in order of appearance."""
        groups: dict[object, list[float]] = {}
        for tensor in self.tensors:
            groups.setdefault(key(tensor), []).append(tensor.sigma)
        return {value: sum(found) / len(found) for value, found in groups.items()}

    @property
    def verdict(self) -> str:
        """What σ means for a graft, in a sentence."""
        low, high = PAPER_RANGE
        if self.sigma == 0:
            return "The two are equal in every decoder layer: a graft is the same as direct tuning."
        if self.sigma <= high:
            within = "within" if self.sigma >= low else "below"
            return (
                f"σ is {self.sigma:.4f}, {within} the range of the paper's pairs ({low}–{high}): close enough for a "
                "graft. It does not predict how good."
            )
        return (
            f"σ is {self.sigma:.4f}, above the range of the paper's pairs ({low}–{high}): the graft may work, but "
            "nothing known says so; watch graft/gain."
        )

    def to_json(self) -> str:
        """All numbers as JSON."""
        return json.dumps(
            {"sigma": self.sigma, "verdict": self.verdict, "tensors": [asdict(t) for t in self.tensors]}, indent=2
        )

    def to_csv(self) -> str:
        """A line per tensor."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(asdict(self.tensors[0])))
        writer.writeheader()
        writer.writerows(asdict(t) for t in self.tensors)
        return text.getvalue()


def compare(a: CheckpointReader, b: CheckpointReader, advance: Callable[[int], None] = lambda _: None) -> Similarity:
    """Compare two checkpoints that hold the same tensors; constant memory.

    Sums are taken in float32 over a part of a tensor and added up in float64.

    Args:
        a: the first checkpoint, the Base, say.
        b: the second, its Instruct.
        advance: called with the number of elements of every tensor that is done.

    Raises:
        PairError: the two share no tensor, or one of them differs in shape (embedding and head may differ in rows;
            then the shared rows are compared).
    """
    names = [name for name in a.tensors if name in b.tensors]
    unequal = [n for n in names if a.tensors[n].shape[1:] != b.tensors[n].shape[1:]]
    if not names or unequal:
        what = f"differ in the shapes of {some_of(unequal)}" if unequal else "share no tensor's name"
        raise PairError(f"{a.folder} and {b.folder} {what}. Give two models of one architecture and size.")

    def one(name: str) -> TensorSimilarity:
        found = _compare_tensor(a, b, name)
        advance(found.num_elements)
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        return Similarity(tuple(pool.map(one, names)))


def _compare_tensor(a: CheckpointReader, b: CheckpointReader, name: str) -> TensorSimilarity:
    info = min((a.tensors[name], b.tensors[name]), key=lambda i: i.num_elements)
    sums = torch.zeros(6, dtype=torch.float64)
    for window in row_windows(info):
        rows = (slice(*window),) if info.shape else ()
        sums += _sums(a.read_slice(name, rows), b.read_slice(name, rows))
    distance, size_a, size_b, dot, square_a, square_b = sums.tolist()
    layer = _LAYER.search(name)
    return TensorSimilarity(
        name=name,
        layer=int(layer[1]) if layer else None,
        kind=kind_of(name),
        num_elements=info.num_elements,
        sigma=distance / (size_a + size_b) if size_a + size_b else 0.0,
        cosine=dot / math.sqrt(square_a * square_b) if square_a and square_b else math.nan,
        relative_norm=math.sqrt(max(0.0, square_a + square_b - 2 * dot) / square_a) if square_a else math.nan,
    )


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """``Σ|a − b|, Σ|a|, Σ|b|, ⟨a, b⟩, ‖a‖², ‖b‖²`` of two equally shaped tensors, in float64."""
    a, b = a.float().flatten(), b.float().flatten()
    terms: Iterable[Tensor] = ((a - b).abs(), a.abs(), b.abs(), a * b, a * a, b * b)
    return torch.stack([term.sum(dtype=torch.float64) for term in terms])


def plot_heat_map(similarity: Similarity, target: Path) -> Path:
    """Draw σ by layer and kind of tensor.

    Args:
        similarity: of two checkpoints.
        target: the picture's path; its ending gives the format.

    Returns:
        ``target``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inside = [t for t in similarity.tensors if t.layer is not None and t.name.endswith("weight")]
    kinds = list(dict.fromkeys(t.kind for t in inside))
    layers = sorted({t.layer for t in inside if t.layer is not None})
    cells = {(t.kind, t.layer): t.sigma for t in inside}
    table = [[cells.get((kind, layer), math.nan) for layer in layers] for kind in kinds]
    figure, axis = plt.subplots(figsize=(2.5 + 0.28 * len(layers), 1.4 + 0.3 * len(kinds)), layout="constrained")
    image = axis.imshow(table, cmap="viridis", aspect="auto", vmin=0)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_xlabel("decoder layer")
    axis.set_title(f"σ by tensor; their mean is {similarity.sigma:.4f}")
    figure.colorbar(image, ax=axis, label="σ")
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target
