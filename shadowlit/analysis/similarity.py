"""The similarity of checkpoints: the paper's σ and its relatives, and the angle between updates, in one pass."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.analysis.sums import Moments, Sums, mean_of_defined, stream_moments
from shadowlit.checkpoint.factored import open_stored_delta
from shadowlit.checkpoint.folder import DELTA_FILE
from shadowlit.checkpoint.headers import some_of, weights_in
from shadowlit.checkpoint.layout import in_layout_of, in_layout_of_module, single_experts
from shadowlit.checkpoint.names import (
    COMPONENTS,
    component_of,
    count_layers,
    expert_of,
    in_totals,
    kind_of,
    layer_of,
)
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.errors import PairError, ShadowlitError, counted
from shadowlit.pair.buffers import open_model
from shadowlit.pair.folders import model_folder
from shadowlit.pair.side import stated_sides
from shadowlit.pair.weights import require_one_architecture
from shadowlit.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

PAPER_RANGE = (0.003, 0.042)
"""σ of the pairs that Shadow-FT (arXiv 2505.12716) works with, by its authors."""
NEAR_ZERO = 0.1
"""Cosines of updates below this are called near zero: our bound. Unrelated updates of n elements have about n^-½; on
the embedded pair, grafts have worked from 0.05 on."""
MEASURES = {
    "weights": ("sigma", "cosine", "relative_norm"),
    "deltas": ("cosine", "sign_agreement", "norm_ratio"),
    "offsets": ("cosine", "sign_agreement", "norm_ratio"),
}
"""Measures of two models, of two updates, and of two offsets from one model; see ``Sums``."""
_MATERIAL = 0.2  # relative difference of the two σ from which on both are reported
_RANKS = ("effective_rank", "stable_rank")
_MAX_MODELS = 26


@dataclass(frozen=True)
class TensorSimilarity:
    """Two tensors of one name, the sums that their measures follow from, and the ranks of the offset b - a if wanted.

    Decoder layers are counted from 0; outside of them it is ``None``. ``component`` is one of
    :data:`shadowlit.checkpoint.names.COMPONENTS`; ``in_total`` is whether it counts in totals.
    """

    name: str
    layer: int | None
    kind: str
    sums: Sums
    component: str = "other"
    in_total: bool = True
    effective_rank: float | None = None
    stable_rank: float | None = None

    @property
    def expert(self) -> int | None:
        """The expert that it belongs to in a mixture, from 0; ``None`` for all other tensors."""
        return expert_of(self.name)


@dataclass(frozen=True)
class Group:
    """Some tensors of a comparison together, which have a kind, layer or expert in common."""

    key: Any
    tensors: tuple[TensorSimilarity, ...]

    def split(self, key: Callable[[TensorSimilarity], Any]) -> list[Group]:
        """Return the tensors in groups of equal ``key``, in order of appearance; those whose key is None
        are left out.
        """
        groups: dict[Any, list[TensorSimilarity]] = {}
        for tensor in self.tensors:
            if (value := key(tensor)) is not None:
                groups.setdefault(value, []).append(tensor)
        return [Group(value, tuple(found)) for value, found in groups.items()]

    @property
    def sums(self) -> Sums:
        """Over all elements of all tensors: its cosine is ``Σ⟨a, b⟩ / √(Σ‖a‖² Σ‖b‖²)``, not a mean of cosines."""
        return sum((tensor.sums for tensor in self.tensors), Sums())

    @property
    def sigma(self) -> float:
        """Plain mean of σ over the tensors, as in the paper; empty tensors don't count."""
        return mean_of_defined(tensor.sums.sigma for tensor in self.tensors)

    @property
    def effective_rank(self) -> float:
        """Plain mean over the matrices whose offset isn't zero; NaN if there are none."""
        return mean_of_defined(math.nan if t.effective_rank is None else t.effective_rank for t in self.tensors)

    def measure(self, name: str) -> float:
        """Return one of ``MEASURES``, or ``effective_rank``: over all elements, but σ and ranks as means over the
        tensors.
        """
        return getattr(self if name in ("sigma", "effective_rank") else self.sums, name)


@dataclass(frozen=True)
class Similarity:
    """Two checkpoints, two deltas, or two offsets from one checkpoint, tensor by tensor, sorted by name.

    Attributes:
        a: Name of the first: ``A``, or ``B - A`` for an offset.
        of: ``weights``, ``deltas`` or ``offsets``; decides which measures there are.
    """

    a: str
    b: str
    of: str
    tensors: tuple[TensorSimilarity, ...]

    @property
    def title(self) -> str:
        """The two names."""
        return f"{self.a}, {self.b}"

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures, the most informative first."""
        ranked = any(tensor.effective_rank is not None for tensor in self.tensors)
        return MEASURES[self.of] + (("effective_rank",) if ranked else ())

    @property
    def sigma(self) -> float:
        """The paper's model-level σ: the plain mean over the tensors inside the decoder layers.

        Embeddings, the final norm and the output head are left out; the layers' norms and biases count as much as its
        matrices. See :attr:`sigma_of_matrices`.
        """
        return mean_of_defined(tensor.sums.sigma for tensor in self.tensors if tensor.layer is not None)

    @property
    def sigma_of_matrices(self) -> float:
        """σ without the norms and biases: the plain mean over the matrices inside the decoder layers.

        In Gemma 3, six of a layer's thirteen tensors are norms.
        """
        return mean_of_defined(tensor.sums.sigma for tensor in self.total.tensors if tensor.layer is not None)

    @property
    def whole(self) -> Group:
        """All tensors."""
        return Group(None, self.tensors)

    @property
    def total(self) -> Group:
        """The tensors that totals are over, the matrices; see :func:`shadowlit.checkpoint.names.in_totals`."""
        return Group(None, tuple(tensor for tensor in self.tensors if tensor.in_total))

    def by_component(self) -> list[Group]:
        """Return a group for every component, in the order of :data:`shadowlit.checkpoint.names.COMPONENTS`."""
        return sorted(self.whole.split(lambda tensor: tensor.component), key=lambda group: COMPONENTS.index(group.key))

    def by_kind(self) -> list[Group]:
        """Return a group for every kind of tensor, in order of appearance."""
        return self.whole.split(lambda tensor: tensor.kind)

    def by_layer(self) -> list[Group]:
        """Return a group for every decoder layer, in their order, of the tensors that totals are over."""
        return sorted(self.total.split(lambda tensor: tensor.layer), key=attrgetter("key"))

    def by_expert(self) -> dict[int, list[Group]]:
        """For every decoder layer that is a mixture of experts a group for every expert, both in their order."""
        mixtures = ((layer.key, layer.split(lambda tensor: tensor.expert)) for layer in self.by_layer())
        return {layer: sorted(experts, key=attrgetter("key")) for layer, experts in mixtures if experts}

    @property
    def verdict(self) -> str:
        """The meaning for a graft, in a sentence or two."""
        return self._of_weights() if self.of == "weights" else self._of_updates()

    def _of_weights(self) -> str:
        low, high = PAPER_RANGE
        told, matrices = f"σ is {self.sigma:.4f}", self.sigma_of_matrices
        if abs(matrices - self.sigma) > _MATERIAL * self.sigma:
            told += f" ({matrices:.4f} over the matrices alone, without norms and biases)"
        if math.isnan(self.sigma):
            return "No tensor lies inside a decoder layer, so that the paper's σ isn't defined here."
        if self.sigma == 0:
            return "The two are equal in every decoder layer: a graft is the same as direct tuning."
        if self.sigma <= high:
            within = "within" if self.sigma >= low else "below"
            return (
                f"{told}, {within} the range of the paper's pairs ({low}–{high}): close enough for a "
                "graft. It does not predict how good."
            )
        return (
            f"{told}, above the range of the paper's pairs ({low}–{high}): the graft may work, but "
            "nothing known says so; watch graft/gain."
        )

    def _of_updates(self) -> str:
        cosine = self.total.sums.cosine
        told = f"cos({self.a}, {self.b}) is {cosine:.3f}"
        if math.isnan(cosine):
            return f"One of {self.a} and {self.b} is zero, so that there is no angle between them."
        if self.of == "offsets" and abs(cosine) < NEAR_ZERO:
            return f"{told}, near zero: the one neither repeats nor undoes what the other changes."
        if self.of == "offsets":
            return f"{told}: the one in part {'repeats' if cosine > 0 else 'undoes'} what the other changes."
        if cosine >= NEAR_ZERO:
            return f"{told}: the two updates agree in part, which speaks for a graft. It does not predict how good."
        if cosine > -NEAR_ZERO:
            return f"{told}, near zero (below {NEAR_ZERO}): the graft is a gamble; watch graft/gain."
        return f"{told}: the two updates oppose each other, which speaks against a graft."


@dataclass(frozen=True)
class Report:
    """Several checkpoints, compared.

    Attributes:
        models: Folders or hub ids that were compared, by letter; A is the first.
        similarities: Similarities of A with each of the others and of the others' offsets from A; of deltas, of every
            two.
        left_out: Tensors that were not compared, by letter: those that are not in all models, and buffers of integers
            or truth values. Of deltas none is: a tensor that one lacks is an update of zero.
    """

    models: Mapping[str, str]
    similarities: tuple[Similarity, ...]
    left_out: Mapping[str, tuple[str, ...]]

    def to_json(self) -> str:
        """Return all numbers as JSON; ``null`` for what isn't defined, the cosine with a tensor of zeros
        for example.
        """
        report = {
            "models": dict(self.models),
            "left_out": self.left_out,
            "similarities": [_as_dict(similarity) for similarity in self.similarities],
        }
        return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return a line per tensor and pair; empty where something isn't defined. Models go by their letters."""
        text = io.StringIO()
        numbers = list(dict.fromkeys(name for names in MEASURES.values() for name in names))
        columns = ["a", "b", "of", "name", "layer", "kind", "component", "expert", "num_elements", *numbers, *_RANKS]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for similarity in self.similarities:
            pair = {"a": similarity.a, "b": similarity.b, "of": similarity.of}
            writer.writerows(pair | _of_tensor(tensor, similarity.of) for tensor in similarity.tensors)
        return text.getvalue()


def similarity(*models: str | Path, effective_rank: bool = False, progress: bool = False) -> Report:
    """Compare models of one architecture, or updates; only a few rows of each tensor are in memory at a time.

    Args:
        models: Two to 26 folders or hub ids, the Base first; or folders of stored deltas.
        effective_rank: Also compute how many directions the offset from the first model uses in each matrix (Roy and
            Vetterli 2007). Takes minutes to hours, and the memory of the largest matrix in float32.
        progress: Show a progress bar on a terminal.

    Returns:
        Of models, the similarity of the first with each of the others and of the others' offsets from it; of deltas,
        that of every two.

    Raises:
        ShadowlitError: Models and deltas are mixed, or effective ranks of deltas are asked for.
        PairError: As :func:`compare`.
        CheckpointError: A checkpoint is missing or broken, or a tensor holds NaN or infinities.

    Example::

        report = shadowlit.similarity("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B")
        print(report.similarities[0].sigma, report.similarities[0].verdict)
    """
    sources = [str(model) for model in models]
    bar = progress_bar if progress else lambda *_: nullcontext(lambda _: None)
    with ExitStack() as stack:
        opened = [open_reader(model_folder("the", model, key=f"models[{i}]")) for i, model in enumerate(sources)]
        readers: Sequence[TensorReader] = [stack.enter_context(reader) for reader, _ in opened]
        kinds = {is_delta for _, is_delta in opened}
        if len(kinds) > 1:
            told = ", ".join(model for model, (_, is_delta) in zip(sources, opened, strict=True) if is_delta)
            raise ShadowlitError(f"{told}: deltas among models. Give only models, or only deltas.")
        deltas = kinds == {True}
        if not deltas:
            _require_one_architecture(readers)
        if deltas and effective_rank:
            raise ShadowlitError(
                "effective_rank is computed for the offset between models; for deltas there is "
                "'shadowlit delta show DELTA --effective_rank'."
            )
        readers = in_one_layout(readers)
        names = shared_names(readers, deltas=deltas)
        total = sum(min(r.tensors[n].num_elements for r in readers if n in r.tensors) for n in names)
        with bar("comparing", total) as advance:
            report = compare(readers, deltas=deltas, advance=advance)
        if effective_rank:
            total = sum(t.sums.num_elements for s in report.similarities if s.of == "weights" for t in s.tensors)
            with bar("effective rank", total) as advance:
                report = with_ranks(report, readers, advance)
    return replace(report, models=dict(zip(report.models, sources, strict=True)))


def open_reader(folder: Path) -> tuple[TensorReader, bool]:
    """Return a reader of the model, without buffers, or the delta in a folder, and whether it is a delta.

    Raises:
        CheckpointError: There is neither, or its files are broken.
    """
    is_delta = any((folder / name).is_file() for name in (DELTA_FILE, f"{DELTA_FILE}.index.json"))
    return (open_stored_delta(folder) if is_delta else open_model(folder).learned()), is_delta


def _require_one_architecture(readers: Sequence[TensorReader]) -> None:
    """Raise a PairError unless models have one type and number of layers, as far as their folders tell."""
    first, *others = readers
    for other in others:
        require_one_architecture(*stated_sides(*((f"model {r.folder}", r.folder) for r in (first, other))))
        counts, theirs = count_layers(first.tensors), count_layers(other.tensors)
        if unequal := [f"{kind}: {n} and {theirs[kind]}" for kind, n in counts.items() if theirs.get(kind, n) != n]:
            raise PairError(
                f"{first.folder} and {other.folder} have different numbers of layers ({some_of(unequal)}). Give models "
                "of one size and family."
            )


def in_one_layout(readers: Sequence[TensorReader]) -> list[TensorReader]:
    """Present models under the names of the first of them, with one matrix for each expert of a mixture.

    Raises:
        CheckpointError, GraftError: As :class:`shadowlit.checkpoint.layout.LayoutReader`.
    """
    first, *rest = (in_layout_of_module(reader, single_experts(reader)) for reader in readers)
    return [first, *(in_layout_of(reader, first) for reader in rest)]


def compare(
    readers: Sequence[TensorReader],
    *,
    deltas: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Report:
    """Compare checkpoints that hold the same tensors; constant memory, every file is read once.

    Of models, each is compared with the first, and then the offsets of every two others from the first with each
    other: for Base, tuned Base and Instruct this is the angle between the update and the offset. Of deltas, every two
    are compared. Experts of mixtures are compared one by one, however the files hold them, if the readers come from
    :func:`in_one_layout`. Computed in float32, added up in float64. ``advance`` is called with the number of elements
    of every part that is done.

    Raises:
        PairError: Fewer than two or more than 26 are given, they share no tensor, or one differs in shape (outside of
            the decoder layers, as in embedding and head, the numbers of rows may differ; then the shared rows are
            compared).
        CheckpointError: A tensor holds NaN or infinities.
    """
    if not 2 <= len(readers) <= _MAX_MODELS:
        raise PairError(f"found {counted(len(readers), 'model')}; expected 2 to {_MAX_MODELS}. Give the Base first.")
    letters = [chr(ord("A") + i) for i in range(len(readers))]
    names = shared_names(readers, deltas=deltas)
    pairs = list(_pairs(letters, deltas))
    found: list[list[TensorSimilarity]] = [[] for _ in pairs]
    shapes = {name: next(r.tensors[name].shape for r in readers if name in r.tensors) for name in names}
    total = in_totals(shapes)
    for name, moments in stream_moments(readers, names, deltas=deltas, advance=advance):
        component, counts = component_of(name, shapes[name]), name in total
        for tensors, (_, sums_of) in zip(found, pairs, strict=True):
            sums = sums_of(moments)
            tensors.append(TensorSimilarity(name, layer_of(name), kind_of(name), sums, component, counts))
    compared = frozenset(names)
    left_out = {x: tuple(n for n in r.tensors if n not in compared) for x, r in zip(letters, readers, strict=True)}
    return Report(
        models={letter: str(reader.folder) for letter, reader in zip(letters, readers, strict=True)},
        similarities=tuple(
            replace(similarity, tensors=tuple(tensors)) for (similarity, _), tensors in zip(pairs, found, strict=True)
        ),
        left_out={letter: left for letter, left in left_out.items() if left},
    )


def shared_names(readers: Sequence[TensorReader], *, deltas: bool) -> list[str]:
    """Return the names of the tensors to compare: weights that all models have, or any of several deltas has; their
    shapes fit.

    Raises:
        PairError: There are none, or shapes differ.
    """
    weights = [weights_in(reader.tensors) for reader in readers]
    present = {name: [found[name] for found in weights if name in found] for found in weights for name in found}
    names = sorted(name for name, found in present.items() if deltas or len(found) == len(readers))
    unequal = [
        f"{name} {' and '.join(str(shape) for shape in shapes)}"
        for name in names
        if not _fit(name, shapes := list(dict.fromkeys(info.shape for info in present[name])))
    ]
    if not names or unequal:
        what = f"differ in the shapes of {some_of(unequal)}" if unequal else "share no weight's name"
        folders = " and ".join(str(reader.folder) for reader in readers)
        raise PairError(f"{folders} {what}. Give models of one architecture and size.")
    return names


def with_ranks(
    report: Report, readers: Sequence[TensorReader], advance: Callable[[int], None] = lambda _: None
) -> Report:
    """Add effective and stable rank of the offsets to a report on these models, matrix by matrix.

    Takes far longer than reading; holds one offset in float32, and the Gram matrix of its smaller side in float64.
    """
    from shadowlit.delta.spectrum import effective_rank, singular_values, stable_rank

    letters = list(report.models)

    def ranked(b: TensorReader, tensor: TensorSimilarity) -> TensorSimilarity:
        shape = readers[0].tensors[tensor.name].shape
        if len(shape) != 2:
            return tensor
        values = singular_values(_offset(readers[0], b, tensor.name))
        advance(tensor.sums.num_elements)
        return replace(tensor, effective_rank=effective_rank(values), stable_rank=stable_rank(values))

    similarities = tuple(
        replace(s, tensors=tuple(ranked(readers[letters.index(s.b)], t) for t in s.tensors)) if s.of == "weights" else s
        for s in report.similarities
    )
    return replace(report, similarities=similarities)


def _offset(a: TensorReader, b: TensorReader, name: str) -> Tensor:
    """b - a of a matrix, in float32; of the shared rows."""
    import torch

    info = min((a.tensors[name], b.tensors[name]), key=lambda i: i.shape[0])
    offset = torch.empty(info.shape)
    for window in row_windows(info):
        rows = slice(*window)
        torch.sub(b.read_slice(name, (rows,)).float(), a.read_slice(name, (rows,)).float(), out=offset[rows])
    return offset


def _pairs(letters: Sequence[str], deltas: bool) -> Iterator[tuple[Similarity, Callable[[Moments], Sums]]]:
    """Yield what is compared, still without tensors, and the function that returns its sums."""
    names = letters if deltas else [f"{letter} - {letters[0]}" for letter in letters[1:]]
    if not deltas:
        for i, letter in enumerate(letters[1:], start=1):
            yield Similarity(letters[0], letter, "weights", ()), partial(Moments.weights, b=i)
    for i, j in combinations(range(len(names)), 2):
        yield (
            Similarity(names[i], names[j], "deltas" if deltas else "offsets", ()),
            partial(Moments.differences, a=i, b=j),
        )


def _fit(name: str, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes may be compared; vocabularies lie outside of the layers, and may differ."""
    return len(shapes) == 1 or (layer_of(name) is None and all(shapes) and len({shape[1:] for shape in shapes}) == 1)


def _as_dict(similarity: Similarity) -> dict[str, Any]:
    def measured(group: Group) -> dict[str, Any]:
        return {name: _or_none(group.measure(name)) for name in similarity.measures}

    return {
        "a": similarity.a,
        "b": similarity.b,
        "of": similarity.of,
        **measured(similarity.total),
        **(
            {"sigma": _or_none(similarity.sigma), "sigma_of_matrices": _or_none(similarity.sigma_of_matrices)}
            if similarity.of == "weights"
            else {}
        ),
        "over": f"{len(similarity.total.tensors)} of {len(similarity.tensors)} tensors",
        "verdict": similarity.verdict,
        "by_component": {group.key: measured(group) for group in similarity.by_component()},
        "by_kind": {str(group.key): measured(group) for group in similarity.by_kind()},
        "by_layer": {str(group.key): measured(group) for group in similarity.by_layer()},
        "by_expert": {
            str(layer): {str(group.key): measured(group) for group in groups}
            for layer, groups in similarity.by_expert().items()
        },
        "tensors": [_of_tensor(tensor, similarity.of) for tensor in similarity.tensors],
    }


def _of_tensor(tensor: TensorSimilarity, of: str) -> dict[str, Any]:
    ranks = {name: getattr(tensor, name) for name in _RANKS}
    return {
        "name": tensor.name,
        "layer": tensor.layer,
        "kind": tensor.kind,
        "component": tensor.component,
        "expert": tensor.expert,
        "num_elements": tensor.sums.num_elements,
        **{name: _or_none(getattr(tensor.sums, name)) for name in MEASURES[of]},
        **{name: _or_none(value) for name, value in ranks.items() if value is not None},
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
