"""One checkpoint under the names and in the layout of another one of the same model.

Libraries, their versions and their wrappers disagree about names (``model.`` or ``model.language_model.``) and about
experts (a matrix for each, or all in one tensor). Rows of a tensor are contiguous in a file, so every layout is a list
of byte ranges of another: nothing is converted, and no torch is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from shadowlit.checkpoint import names
from shadowlit.checkpoint.headers import TensorInfo, some_of
from shadowlit.checkpoint.numeric import widen
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, described
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.errors import CheckpointError, GraftError


def canonical_keys(reader: TensorReader) -> dict[str, str]:
    """Return the names of a checkpoint by their canonical keys; raise a CheckpointError if two names have one key."""
    keys: dict[str, str] = {}
    for name in reader.tensors:
        other = keys.setdefault(names.canonical_key(name), name)
        if other != name:
            raise CheckpointError(
                f"{reader.folder} holds {other} and {name}, which are two names for one tensor. Expected each tensor "
                "once: the folder mixes two saves, or one of a wrapper; save the model again into an empty folder."
            )
    return keys


def require_plain(reader: TensorReader) -> None:
    """Raise a CheckpointError for adapters that were not merged, and for quantised weights."""
    adapters = [name for name in reader.tensors if names.is_unmerged_name(name)]
    if adapters:
        raise CheckpointError(
            f"{reader.folder} holds adapters next to its weights ({some_of(adapters)}); expected a plain model, or "
            "the adapter's own folder with adapter_config.json. Merge it (peft's merge_and_unload) and save that."
        )
    quantised = [name for name in reader.tensors if names.is_quantised_name(name)]
    if quantised:
        raise CheckpointError(
            f"{reader.folder} holds quantised weights ({some_of(quantised)}), to which no update can be added. Give "
            "the model in bfloat16 or float32, as it was before quantisation, or dequantise it first."
        )


class Range(NamedTuple):
    """A run of bytes of the tensor ``name``; ``start`` counts from the tensor's beginning."""

    name: str
    start: int
    num_bytes: int


class _Side:
    """A checkpoint by canonical keys."""

    def __init__(self, reader: TensorReader) -> None:
        require_plain(reader)
        self.reader, self.folder = reader, reader.folder
        self.keys = canonical_keys(reader)
        self.experts = self._count_experts()

    def info(self, key: str) -> TensorInfo:
        return self.reader.tensors[self.keys[key]]

    def whole(self, *keys: str) -> list[Range]:
        return [Range(self.keys[key], 0, self.info(key).num_bytes) for key in keys]

    def is_fused(self, experts: str) -> bool:
        return f"{experts}.{names.GATE_UP}" in self.keys

    def orientation(self, experts: str) -> Literal["rows", "columns"] | None:
        """Whether outputs are the rows of the fused matrices (Qwen) or their columns (gpt-oss, Llama 4)."""
        try:
            (n, a, b), (m, c, d) = (self.info(f"{experts}.{kind}").shape for kind in names.ROWS_OF_FUSED)
        except (KeyError, ValueError):
            return None
        if n == m and (c, 2 * d) == (b, a):
            return "rows"
        return "columns" if n == m and (2 * c, d) == (b, a) else None

    def _count_experts(self) -> dict[str, int]:
        """The number of experts of every layer that has some."""
        counts: dict[str, int] = {}
        found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for key in self.keys:
            if single := names.split_expert(key):
                experts, number, kind = single
                found[experts][kind].add(number)
            elif (fused := names.split_fused(key)) and len(self.info(key).shape) == 3:
                counts[fused[0]] = self.info(key).shape[0]
        for experts, kinds in found.items():
            counts[experts] = 1 + max(number for numbers in kinds.values() for number in numbers)
            for kind, numbers in kinds.items():
                # Only as many as are listed: the largest number comes from a file and may be anything.
                missing = [n for n in range(min(counts[experts], len(numbers) + 5)) if n not in numbers][:5]
                others = counts[experts] - len(numbers) - len(missing)
                if missing:
                    listed = some_of(missing) + (f" and {others} more" if others else "")
                    raise CheckpointError(
                        f"{self.folder} lacks {kind} of the experts {listed} of {experts}, which has experts 0 to "
                        f"{counts[experts] - 1}. Finish the download, or save the model again."
                    )
        return counts


def head_and_embedding(tensors: Iterable[str]) -> tuple[str | None, str | None]:
    """Return the names of the output head and of the embedding among those of a model's tensors."""
    keys = {names.canonical_key(name): name for name in tensors}
    head, embedding = names.head_in(keys), names.embedding_in(keys)
    return (keys[head] if head else None), (keys[embedding] if embedding else None)


def with_head(reader: TensorReader, name: str) -> TensorReader:
    """Present the embedding of a tied model as the output head ``name`` too; unchanged if it holds no embedding."""
    presented = LayoutReader(reader, reader, ties=False)
    _, embedding = head_and_embedding(reader.tensors)
    if embedding is not None:
        presented.alias(name, embedding)
    return presented


def repeats_embedding(reader: TensorReader) -> bool | None:
    """Return whether a checkpoint's output head repeats its embedding; ``None`` unless it holds both.

    Values are compared, whatever their dtypes, as transformers does before it ties the two.
    """
    both = [name for name in head_and_embedding(reader.tensors) if name is not None]
    if len(both) < 2:
        return None
    head, body = map(reader.info, both)
    if head.shape != body.shape:
        return False
    for window in row_windows(head):
        one, other = (reader.raw_rows(name, *window) for name in both)
        if head.code == body.code and np.array_equal(one, other):
            continue
        # Slower, but knows that 0 equals -0.
        weights = head.is_weight and body.is_weight
        if not weights or not np.array_equal(widen(one, head.code), widen(other, body.code)):
            return False
    return True


class LayoutReader(TensorReader):
    """Presents a checkpoint under the names and in the layout of another one of the same model.

    Names may differ in the prefixes of wrappers and library versions
    (:func:`shadowlit.checkpoint.names.canonical_key`), and experts may be one matrix each or fused:
    ``experts.gate_up_proj`` [experts, 2 * inner, hidden] and ``experts.down_proj`` [experts, hidden, inner]. Tensors
    without a counterpart keep their names. With ``ties``, a tied model has an output head, which is its embedding, if
    ``like`` has one, and none otherwise, whether it is stored or not.

    Raises:
        CheckpointError: One tensor has two names, experts are missing, or either holds adapters or quantised weights.
        GraftError: The experts have layouts that can't be converted into one another.
    """

    def __init__(self, reader: TensorReader, like: TensorReader, ties: bool = True) -> None:
        own, other = _Side(reader), _Side(like)
        _require_like_experts(own, other)
        self.folder, self.tied = reader.folder, reader.tied
        self._reader = reader
        self.ranges: dict[str, list[Range]] = {}  # by name, the parts of `reader` that each tensor consists of
        self.tensors: dict[str, TensorInfo] = {}
        for key, name in other.keys.items():
            if key in own.keys:
                self._present(name, own.info(key).shape, own.whole(key))
            elif fused := names.split_fused(key):
                self._present_fused(name, own, *fused)
            elif single := names.split_expert(key):
                self._present_expert(name, own, *single)
        skipped = self._match_ties(own, other) if ties else set()
        skipped |= {part.name for ranges in self.ranges.values() for part in ranges}
        for key, name in own.keys.items():
            if name not in skipped:
                self._present(name, own.info(key).shape, own.whole(key))

    def read_into(self, buffer: memoryview, name: str, offset: int = 0) -> None:
        """See :meth:`shadowlit.checkpoint.reader.TensorReader.read_into`."""
        assert offset + len(buffer) <= self.info(name).num_bytes
        for part in self.ranges[name]:
            count = max(0, min(len(buffer), part.num_bytes - offset))
            if count:
                self._reader.read_into(buffer[:count], part.name, part.start + offset)
            buffer, offset = buffer[count:], max(0, offset - part.num_bytes)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._reader.close()

    def _match_ties(self, own: _Side, other: _Side) -> set[str]:
        """Present a tied output head where only the other checkpoint has one; return it where only this one does."""
        (head, embedding), (wanted, _) = head_and_embedding(own.keys), head_and_embedding(other.keys)
        if wanted and not head and embedding:
            self._present(other.keys[wanted], own.info(embedding).shape, own.whole(embedding))
        elif head and not wanted and (self.tied or repeats_embedding(own.reader)):
            return {own.keys[head]}
        return set()

    def alias(self, name: str, of: str) -> None:
        """Present the tensor ``of`` under another name too."""
        self.ranges[name] = self.ranges[of]
        self.tensors[name] = replace(self.tensors[of], name=name)

    def _present(self, name: str, shape: tuple[int, ...], ranges: list[Range]) -> None:
        self.ranges[name] = ranges
        self.tensors[name] = replace(self._reader.tensors[ranges[0].name], name=name, shape=shape)

    def _present_fused(self, name: str, own: _Side, experts: str, fused: str) -> None:
        """Present the matrices that ``fused`` is made of, expert by expert, as one tensor."""
        if experts not in own.experts:
            return
        kinds = names.ROWS_OF_FUSED[fused]
        keys = [names.expert_key(experts, number, kind) for number in range(own.experts[experts]) for kind in kinds]
        if not all(key in own.keys for key in keys):
            return
        forms = {(info.code, info.shape) for info in map(own.info, keys)}
        if len(forms) > 1 or len(own.info(keys[0]).shape) != 2:
            raise CheckpointError(
                f"{own.folder} has experts of {experts} in several dtypes or shapes ({some_of(sorted(forms))}); "
                f"expected matrices of one dtype and shape, as {name} needs. Save the model in one dtype."
            )
        rows, columns = own.info(keys[0]).shape
        self._present(name, (own.experts[experts], len(kinds) * rows, columns), own.whole(*keys))

    def _present_expert(self, name: str, own: _Side, experts: str, number: int, kind: str) -> None:
        """Present rows of the fused tensor as one expert's matrix."""
        fused, kinds = next((fused, kinds) for fused, kinds in names.ROWS_OF_FUSED.items() if kind in kinds)
        if f"{experts}.{fused}" not in own.keys:
            return
        info = own.info(f"{experts}.{fused}")
        _, rows, columns = info.shape
        num_bytes = info.num_bytes // info.shape[0] // len(kinds)
        start = (number * len(kinds) + kinds.index(kind)) * num_bytes
        self._present(name, (rows // len(kinds), columns), [Range(info.name, start, num_bytes)])


def in_layout_of(reader: TensorReader, like: TensorReader) -> TensorReader:
    """Return a :class:`LayoutReader` with ``ties=False``, or ``reader`` itself if names and layout are the same."""
    keys = {names.canonical_key(name) for name in like.tensors}
    other = [name for name in reader.tensors if name not in like.tensors]
    odd = any(names.canonical_key(name) in keys or names.is_of_experts(name) for name in other)
    return LayoutReader(reader, like, ties=False) if odd else reader


def in_layout_of_module(reader: TensorReader, shapes: Mapping[str, tuple[int, ...]]) -> TensorReader:
    """Return a checkpoint by the names of a module's parameters: transformers 5 holds experts fused, most files don't.

    ``reader`` itself if it has all of the names in ``shapes``, else a :class:`LayoutReader`. Where the module has an
    output head of its own, a reader that is known to be tied presents its embedding as such.
    """
    if all(name in reader.tensors for name in shapes):
        return reader
    module = ComputedReader(reader.folder, described(shapes))
    return LayoutReader(reader, module, ties=reader.tied)


class ExpertRows(NamedTuple):
    """The part of a layer's fused tensor that the stored tensor ``name`` holds."""

    name: str
    expert: int | None  # whose matrix it holds; None if it is the fused tensor itself
    first_row: int  # of that expert's matrix


def fused_experts(reader: TensorReader) -> dict[str, tuple[tuple[int, ...], list[ExpertRows]]]:
    """Return the fused tensors of a checkpoint's experts, whether or not they are stored fused.

    Returns:
        The shape, [experts, outputs, inputs], and all that is stored of each, by canonical keys such as
        ``layers.0.mlp.experts.down_proj``. Experts in other layouts are left out.
    """
    side, found = _Side(reader), {}
    for experts, count in side.experts.items():
        for fused, kinds in names.ROWS_OF_FUSED.items():
            key = f"{experts}.{fused}"
            if side.is_fused(experts):
                if side.orientation(experts) == "rows":
                    found[key] = side.info(key).shape, [ExpertRows(side.keys[key], None, 0)]
                continue
            stored = [(n, i, names.expert_key(experts, n, kind)) for n in range(count) for i, kind in enumerate(kinds)]
            shapes = {side.info(own).shape if own in side.keys else () for _, _, own in stored}
            if len(shapes) == 1 and len(shape := shapes.pop()) == 2:
                rows, columns = shape
                parts = [ExpertRows(side.keys[own], n, i * rows) for n, i, own in stored]
                found[key] = (count, len(kinds) * rows, columns), parts
    return found


def single_experts(reader: TensorReader) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that a checkpoint's tensors have with one matrix for each expert.

    Experts whose outputs are the columns of their matrices (gpt-oss, Llama 4) stay fused.
    """
    if not any(names.split_fused(names.canonical_key(name)) for name in reader.tensors):
        return {name: info.shape for name, info in reader.tensors.items()}
    side, single = _Side(reader), {}
    for key, name in side.keys.items():
        shape, fused = side.info(key).shape, names.split_fused(key)
        if fused is None or side.orientation(fused[0]) != "rows":
            single[name] = shape
            continue
        kinds, (count, rows, columns) = names.ROWS_OF_FUSED[fused[1]], shape
        experts = name.removesuffix(f".{fused[1]}")
        for number in range(count):
            for kind in kinds:
                single[names.expert_key(experts, number, kind)] = (rows // len(kinds), columns)
    return single


def _require_like_experts(own: _Side, other: _Side) -> None:
    """Raise unless the experts of two checkpoints are the same matrices, up to a cut along their rows."""
    for experts in own.experts.keys() & other.experts.keys():
        counts = own.experts[experts], other.experts[experts]
        if counts[0] != counts[1]:
            raise GraftError(
                f"{own.folder} has {counts[0]} experts in {experts}, {other.folder} has {counts[1]}; expected equal "
                "numbers. Give models of one architecture."
            )
        fused = [side for side in (own, other) if side.is_fused(experts)]
        found = [side.orientation(experts) for side in fused]
        if (len(fused) == 2 and found[0] != found[1]) or (len(fused) == 1 and found != ["rows"]):
            shapes = [_shapes_of(side, experts) for side in (own, other)]
            raise GraftError(
                f"the experts of {experts} lie in {shapes[0]} in {own.folder}, and in {shapes[1]} in {other.folder}: "
                "transposed, or in an unknown order. Load the one with the transformers version that saved the other, "
                "and save it again."
            )


def _shapes_of(side: _Side, experts: str) -> str:
    if side.is_fused(experts):
        kinds = [kind for kind in names.ROWS_OF_FUSED if f"{experts}.{kind}" in side.keys]
        return " and ".join(f"{kind} {list(side.info(f'{experts}.{kind}').shape)}" for kind in kinds)
    return f"{side.experts[experts]} single matrices"
