"""The graft on disk: three checkpoints in, one out, a few rows in memory at a time.

For users who have tuned a Base elsewhere and only want the graft. No transformers import: start-up is part of the
speed.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowlit.checkpoint import numeric
from shadowlit.checkpoint.folder import Streamed
from shadowlit.checkpoint.headers import TensorInfo, dtype_code, some_of, weights_in
from shadowlit.checkpoint.layout import head_and_embedding
from shadowlit.checkpoint.names import (
    component_of,
    in_totals,
    is_bias,
    is_norm,
    is_weight,
    kind_of,
    layer_of,
    module_of,
    routers,
    tower_of,
)
from shadowlit.checkpoint.reader import TensorReader, described
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.checkpoint.workers import Room, in_order
from shadowlit.errors import GraftError, first_line
from shadowlit.grafting.selection import Coverage, coverage, resolve
from shadowlit.grafting.update import Update, zero_update
from shadowlit.limits import bounded_matching
from shadowlit.pair.side import stated_sides
from shadowlit.pair.weights import selects

if TYPE_CHECKING:
    from shadowlit.grafting.factors import Factors

log = logging.getLogger(__name__)

LEAST_SURVIVAL = 0.5
"""Fraction of an update below which rounding to the export's dtype is warned of."""


@dataclass(frozen=True)
class FittedTo:
    """The update that the scales of a file were fitted to.

    Attributes:
        file: The file.
        fingerprint: Fingerprint of what was learned of the file's tensors, :meth:`Update.fingerprint`.
        transforms: Names and parameters of the transforms that the update had.
        instruct: Fingerprint of the Instruct that they were fitted on, if the file has it.
    """

    file: Path
    fingerprint: str
    transforms: Sequence[Mapping[str, Any]]
    instruct: str | None = None

    def require(self, update: Update, names: Iterable[str], instruct: TensorReader) -> None:
        """Raise a GraftError if an update is another one; warn if the Instruct is, such as its next version."""
        if list(self.transforms) != list(update.transforms):
            fitted, here = (json.dumps(list(one)) for one in (self.transforms, update.transforms))
            raise GraftError(
                f"scale is {self.file}, whose scales were fitted to an update with the transforms {fitted}, but this "
                f"one has {here}. Give the same transforms, or other scales."
            )
        if (found := update.fingerprint(names)) != self.fingerprint:
            raise GraftError(
                f"scale is {self.file}, whose scales were fitted to another update: its fingerprint is "
                f"{self.fingerprint[:12]}…, and that of the one given here is {found[:12]}…. Give the Base and the "
                "tuned model that they were fitted with: of a run the checkpoint of the exported step, and neither "
                "its exported adapter nor its delta, which have the scales already. To use them for this update all "
                "the same, remove 'update' from the file."
            )
        if self.instruct not in (None, instruct.fingerprint()):
            log.warning(
                "scale: the scales of %s were fitted on another Instruct than %s; on this one they may not be the best",
                self.file, instruct.folder,
            )  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The scale λ of a graft, other scales for tensors that match a pattern, or one for each grafted tensor by name."""

    default: float = 1.0
    by_pattern: tuple[tuple[str, float], ...] = ()  # regular expressions, searched in the names; the first match counts
    by_name: Mapping[str, float] = field(default_factory=dict)  # of all tensors with an update, or of none
    fitted_to: FittedTo | None = None  # update that those by name were fitted to, if it is known

    @classmethod
    def parse(cls, text: str) -> Scale:
        r"""Read ``0.5``, or ``1;layers\.(0|1)\.=0.5``: a number, and pattern=number pairs, separated by ``;``.

        Or the path of a ``.json`` file whose ``tensors`` are scales by name, as ``graft.fit_scales`` writes it; its
        ``update`` says to which one they were fitted.
        """
        if text.strip().endswith(".json"):
            return _read_scales(Path(text.strip()))
        default, pairs = 1.0, []
        for item in filter(None, (part.strip() for part in text.split(";"))):
            pattern, _, number = item.rpartition("=")
            try:
                re.compile(pattern)
                value = float(number)
            except (re.error, ValueError) as error:
                raise GraftError(
                    rf"scale has {item!r} ({error}); expected a number, or pattern=number, e.g. '1;layers\.0\.=0.5'."
                ) from None
            if pattern:
                pairs.append((pattern, value))
            else:
                default = value
        return cls(default, tuple(pairs))

    def of(self, name: str) -> float:
        """Return the scale of tensor ``name``."""
        if self.by_name:
            return self.by_name.get(name, self.default)
        for pattern, value in self.by_pattern:
            with bounded_matching(f"scale has {pattern!r}"):
                if re.search(pattern, name):
                    return value
        return self.default


def _read_scales(file: Path) -> Scale:
    """The scales of tensors in a JSON file, and the update that they were fitted to."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found, update = content["tensors"], content.get("update")
        if not (found and all(map(_is_finite_number, found.values()))):
            raise ValueError("'tensors' has no scale, or one that is not a finite number")
        fitted_to = None if update is None else _read_fitted_to(file, update)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise GraftError(
            f"scale is {file}, which can't be read ({first_line(error)}); expected a JSON file whose 'tensors' are "
            "finite numbers by the names of tensors, and whose 'update', if it has one, has a 'fingerprint' and "
            "'transforms', such as the scales.json of an export with graft.fit_scales. Give that file."
        ) from None
    if fitted_to is None:
        log.warning("scale: %s doesn't say to which update its scales were fitted; this is not checked", file)
    return Scale(by_name={name: float(scale) for name, scale in found.items()}, fitted_to=fitted_to)


def _is_finite_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number, and no text or truth value, that a float can hold."""
    with suppress(OverflowError):  # of an integer
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return False


def _read_fitted_to(file: Path, update: Any) -> FittedTo:
    """The update that a file names; a ValueError if it is not one."""
    fingerprint, transforms, instruct = update["fingerprint"], update["transforms"], update.get("instruct")
    if not (isinstance(fingerprint, str) and isinstance(transforms, list) and isinstance(instruct, str | None)):
        raise ValueError("'update' has a fingerprint that is no text, or transforms that are no list")
    return FittedTo(file, fingerprint, transforms, instruct)


def linear_on_disk(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Return the names of the linear layers' weights and biases, from a checkpoint's headers alone.

    Those are the matrices inside numbered layers, and their biases; embeddings and the output head are outside.
    Experts' matrices count, fused or single; their routers don't, as in the paper's code. The projector between towers,
    whose few layers have names instead of numbers, counts too. Equal to
    :func:`shadowlit.grafting.parameters.linear_names` for Llama, Qwen, Mistral, Gemma, Qwen-MoE and Mixtral.
    """
    gates = routers(tensors)
    weights = {
        name
        for name, info in weights_in(tensors).items()
        if (layer_of(name) is not None or (tower_of(name) == "projector" and is_weight(name)))
        and len(info.shape) >= 2
        and not (is_norm(name) or is_bias(name))
        and name not in gates
    }
    modules = set(map(module_of, weights))
    return frozenset(weights | {name for name in tensors if is_bias(name) and module_of(name) in modules})


def shares_of(squares: Mapping[str, float], rest: float) -> dict[str, float]:
    """Return the shares of an update's norm by tensor, without those of zero, from squared norms, and that of what
    isn't named.

    A tensor with values that are not finite has a share of NaN, and counts for nothing in those of others.
    """
    total = rest + sum(filter(math.isfinite, squares.values()))
    return {
        name: math.sqrt(square / total) if math.isfinite(square) else math.nan
        for name, square in squares.items()
        if square
    }


def describe_shares(shares: Mapping[str, float]) -> str:
    """Return the shares of a norm by kind of tensor, the largest first: ``embed_tokens 41.2%, norm (9) 1.3%``."""
    kinds: dict[str, list[float]] = {}
    for name, share in shares.items():
        kinds.setdefault(kind_of(name), []).append(share)
    norms = [(math.hypot(*found), kind, len(found)) for kind, found in kinds.items()]
    norms.sort(key=lambda norm: (math.isnan(norm[0]), norm), reverse=True)  # what has no norm first
    return ", ".join(
        f"{kind}{f' ({n})' if n > 1 else ''} {'holds NaN or infinities' if math.isnan(share) else f'{share:.1%}'}"
        for share, kind, n in norms
    )


class DiskGraft:
    """A graft of checkpoints, checked from their headers and ready to be streamed.

    Arguments are as those of :func:`shadowlit.delta.folders.graft`.

    Raises:
        GraftError: ``dtype`` is unknown, nothing is selected, or a selected tensor has another shape in the Instruct,
            or is not a floating-point weight of 16 bits or more; or ``dtype`` is given and a tensor of the Instruct
            has 8.
    """

    def __init__(
        self,
        update: Update,
        instruct: TensorReader,
        scale: Scale,
        select: str | list[str] = "linear",
        dtype: str | None = None,
        allow_zero: bool = False,
    ) -> None:
        if dtype is not None and dtype_code(dtype) not in numeric.FLOATS:
            raise GraftError(
                f"dtype is {dtype!r}; expected float32, bfloat16 or float16, or None for the Instruct's own dtype."
            )
        self._allow_zero = allow_zero
        self.update, self.instruct, self.dtype = update, instruct, dtype
        own = instruct.learned().tensors
        weights = weights_in(own)
        selected = resolve(select, weights, linear_on_disk(weights), "of the Instruct")
        update.require_weights(sorted(selected & update.without.keys()))
        self.update = update = _with_its_head(update, own)
        self.selected = selected & update.weights
        if not self.selected:
            raise GraftError(
                f"none of the {len(selected)} selected tensors has an update; there are updates of "
                f"{some_of(sorted(update.shapes))}. Change the selection, or check the models."
            )
        unequal = [
            f"{name} {update.shapes[name]} and {instruct.tensors[name].shape}"
            for name in sorted(self.selected)
            if update.shapes[name] != instruct.tensors[name].shape
        ]
        if unequal:
            raise GraftError(
                f"the update and the Instruct differ in the shapes of {some_of(unequal)}. Leave them out of the "
                "selection ('linear' leaves out embeddings and head), or graft onto an Instruct of this Base."
            )
        converted = () if dtype is None else (n for n, info in instruct.tensors.items() if info.is_floating_point)
        instruct.require_weights(sorted({*self.selected, *converted}))
        update.require_weights(sorted(self.selected))
        self._require_one_update_of_tied(select)
        self.rescale(scale)
        sizes = {name: info.num_elements for name, info in own.items()}
        # From the headers: what is left out may have changed or not.
        self.planned = replace(
            coverage(self.selected, frozenset(update.shapes), sizes),
            without=tuple(f"{name} ({why})" for name, why in sorted(update.without.items())),
        )
        self._of_instruct = f"Instruct {instruct.folder}"
        self.num_bytes = sum(info.converted(dtype).num_bytes for info in instruct.tensors.values())
        # By tensor: of the scaled update, of what rounding takes from it, and of the update itself.
        self._squares = {name: [0.0, 0.0, 0.0] for name in self.selected}
        self._left_out: dict[str, float] = {}  # squared norms of the updates that are left out

    def rescale(self, scale: Scale) -> None:
        """Give the graft another scale, before it is streamed.

        Raises:
            GraftError: A pattern matches no grafted tensor, or scales by name are not those of the grafted tensors;
                they may lack those whose update is zero; or they were fitted to another update.
        """
        for pattern, _ in scale.by_pattern:
            with bounded_matching(f"scale has {pattern!r}"):
                matches = any(re.search(pattern, name) for name in self.selected)
            if not matches:
                raise GraftError(
                    f"the scale's pattern {pattern!r} matches none of the {len(self.selected)} grafted tensors."
                )
        if scale.by_name:
            lacking = filter(self.update.changes, sorted(self.selected - scale.by_name.keys()))
            if unequal := [*sorted(scale.by_name.keys() - self.selected), *lacking]:
                raise GraftError(
                    f"the scales by name and the {len(self.selected)} grafted tensors differ in {some_of(unequal)}. "
                    "Give a scale for every tensor with an update and for no other: those of the same models and "
                    "selection."
                )
        if scale.fitted_to is not None:
            scale.fitted_to.require(self.update, scale.by_name, self.instruct)
        self._scale = scale

    @cached_property
    def coverage(self) -> Coverage:
        """What the graft covers. Of the tensors that it leaves out only those that changed count, so they are read."""
        return replace(self.planned, left_out=tuple(filter(self.update.changes, self.planned.left_out)))

    def _has_norm(self, name: str) -> bool:
        """Whether an update is one of floating-point weights."""
        with suppress(GraftError):
            self.update.require_weights([name])
            return True
        return False

    def _measured(self, info: TensorInfo, start: int, stop: int) -> tuple[int, float, float, float]:
        """The squared norm of some rows of the update as it was learned, as the last of what ``_part`` returns."""
        update = np.asarray(self.update.learned_rows(info.name, start, stop))
        return 0, 0.0, 0.0, float(np.square(update, dtype=np.float64).sum())

    @property
    def shares(self) -> dict[str, float]:
        """Of every tensor that is left out its share of the update's norm, ``‖part‖ / ‖update‖``, once all is streamed.

        The update counts as it was learned, before it is transformed and scaled.
        """
        return shares_of(self._left_out, sum(squares[2] for squares in self._squares.values()))

    @property
    def survival(self) -> float:
        """The fraction of the update that survived rounding in the tensors streamed so far.

        ``1 - ‖lost‖ / ‖scale * update‖`` with ``lost = round(grafted) - grafted``: 1 if all of it did, NaN if the
        update is zero. Over :func:`shadowlit.checkpoint.names.in_totals`: norms and biases count in
        :attr:`survival_by_component` alone.
        """
        return self._survival(in_totals(self._shapes))

    @property
    def survival_by_component(self) -> dict[str, float]:
        """:attr:`survival` of each of :data:`shadowlit.checkpoint.names.COMPONENTS` whose update isn't zero."""
        parts: dict[str, set[str]] = {}
        for name, shape in self._shapes.items():
            parts.setdefault(component_of(name, shape), set()).add(name)
        found = {part: self._survival(names) for part, names in sorted(parts.items())}
        return {part: value for part, value in found.items() if not math.isnan(value)}

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.instruct.tensors[name].shape for name in self.selected}

    def _survival(self, names: Iterable[str]) -> float:
        scaled, lost, _ = (sum(sums) for sums in zip(*(self._squares[name] for name in names), strict=True))
        return 1 - (lost / scaled) ** 0.5 if scaled else math.nan

    def tensors(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[str, Streamed]]:
        """Yield every tensor of the Instruct, grafted where selected, in parts that are computed ahead.

        A part is valid until the next one is taken; ``advance`` is called with the bytes of each.

        Raises:
            GraftError: At the end, if the scaled update is zero and that isn't allowed.
        """
        infos = self.instruct.tensors.values()
        windows: list[tuple[TensorInfo, int, int]] = [(info, *window) for info in infos for window in row_windows(info)]
        # Appended with the rows that are only measured.
        left_out = described({n: self.update.shapes[n] for n in filter(self._has_norm, self.coverage.left_out)})
        measured = [(info, *window) for info in left_out.values() for window in row_windows(info)]
        count = len(windows)
        items = [*enumerate(windows), *enumerate(measured, count)]
        # Over all tensors: where one ends, the next has begun.
        parts = in_order(
            lambda item, room: self._part(*item[1], room) if item[0] < count else self._measured(*item[1]), items,
            max((info.converted(self.dtype).row_bytes * (stop - start) for info, start, stop in windows), default=0),
            num_bytes=sum(info.num_bytes * (3 if info.name in self.selected else 1) for info in infos),
        )  # fmt: skip
        with closing(parts):  # a signal that arrives while it is collected instead would be lost
            for name, info in self.instruct.tensors.items():
                own = islice(parts, sum(1 for _ in row_windows(info)))
                yield name, Streamed(info.converted(self.dtype).code, info.shape, self._counted(name, own, advance))
            for (info, *_), ((*_, square), _) in zip(measured, parts, strict=True):
                self._left_out[info.name] = self._left_out.get(info.name, 0.0) + square
        if not (self._allow_zero or any(squares[0] for squares in self._squares.values())):
            raise zero_update(str(self.coverage))

    def _counted(
        self, name: str, parts: Iterable[tuple[tuple[int, float, float, float], Room]], advance: Callable[[int], None]
    ) -> Iterator[numeric.Raw]:
        for (num_bytes, *squares), room in parts:
            if name in self._squares:
                self._squares[name] = [sum(pair) for pair in zip(self._squares[name], squares, strict=True)]
            advance(num_bytes)
            yield room[:num_bytes]

    def _bfloat16_part(
        self, raw: Room, info: TensorInfo, target: str, start: int, stop: int, room: Room
    ) -> tuple[int, float, float, float] | None:
        """A grafted part, if all of it is bfloat16 and in pairs, and all values are finite."""
        scale = self._scale.of(info.name)
        if raw.size % 4 or {info.code, target} != {"BF16"} or not scale * scale:  # also of 1e-200
            return None
        if (stored := self.update.bfloat16_rows(info.name, start, stop)) is None:
            return None
        _, *squares = numeric.graft_bfloat16(*stored, raw, scale, room[: raw.size])
        if not all(map(math.isfinite, squares)):
            return None
        return raw.size, squares[0], squares[1], squares[0] / scale**2

    def _part(self, info: TensorInfo, start: int, stop: int, room: Room) -> tuple[int, float, float, float]:
        """Rows of the result, written into ``room``: their bytes, and the squared norms that ``_squares`` adds up."""
        name, target = info.name, info.converted(self.dtype).code
        if name not in self.selected and target == info.code:
            raw = room[: (stop - start) * info.row_bytes]
            self.instruct.read_into(raw.data, name, start * info.row_bytes)
            if name not in self.instruct.computed:
                numeric.require_finite(name, raw, target, self._of_instruct)
            return raw.size, 0.0, 0.0, 0.0
        raw, squares, whole = self.instruct.raw_rows(name, start, stop), [0.0, 0.0], 0.0
        if name in self.selected:
            if (part := self._bfloat16_part(raw, info, target, start, stop, room)) is not None:
                return part
            update = np.asarray(self.update.rows(name, start, stop)).reshape(-1)
            scale = self._scale.of(name)
            stored, *squares = numeric.graft_part(raw, info.code, update, scale, target)
            if not all(map(math.isfinite, squares)):
                numeric.require_finite(name, raw, info.code, self._of_instruct)
                self.update.require_finite_base(name, start, stop)
                exact = numeric.widen(raw, info.code) + scale * update
                if bad := int(np.count_nonzero(~np.isfinite(exact))):
                    raise numeric.not_finite(name, bad, exact.size)
                numeric.require_finite(name, stored, target)
            unscaled = scale * scale and not self.update.transformed
            whole = squares[0] / (scale * scale) if unscaled else self._measured(info, start, stop)[-1]
        else:
            stored = numeric.narrow(numeric.widen(raw, info.code), target)
            if name not in self.instruct.computed:
                numeric.require_finite(name, raw, info.code, self._of_instruct)
                numeric.require_finite(name, stored, target)
        room[: stored.nbytes] = stored.reshape(-1).view(np.uint8)
        return stored.nbytes, squares[0], squares[1], whole

    def _require_one_update_of_tied(self, select: str | list[str]) -> None:
        """Raise if a tied Instruct would get two updates in one tensor, or one side's update on both sides."""
        own_head, embedding = head_and_embedding(self.instruct.tensors)
        head, _ = head_and_embedding(self.update.shapes)
        chosen = embedding in self.selected or (head is not None and selects(select, [head]))
        if own_head or embedding is None or not chosen:
            return
        # A model that states that it is not tied has a head under an unknown name.
        says_untied = stated_sides(("instruct", self.instruct.folder))[0].get("tie_word_embeddings") is False
        if not says_untied and not self._moves_alike(embedding, head):
            raise GraftError(
                f"the Instruct {self.instruct.folder} is tied: its embedding {embedding} is also its output head. "
                "The update changes embedding and head differently, so one tensor can't hold both. Leave them out of "
                "the selection ('linear' does), or give an Instruct with a head of its own."
            )

    def _moves_alike(self, embedding: str, head: str | None) -> bool:
        """Whether the update of the embedding is that of the output head too."""
        update = self.update
        if update.tied:
            return True
        if head is None:
            return embedding not in update.shapes or not update.changes(embedding)
        if embedding not in update.shapes:
            return not update.changes(head)
        return update.shapes[embedding] == update.shapes[head] and all(
            np.array_equal(np.asarray(update.rows(embedding, *window)), np.asarray(update.rows(head, *window)))
            for window in row_windows(described(update.shapes)[embedding])
        )


class _WithHead(Update):
    """An update of a tied model for a model with an output head of its own, which gets the embedding's."""

    def __init__(self, update: Update, head: str, embedding: str) -> None:
        self._update, self._of = update, {head: embedding}
        self.shapes = {**update.shapes, head: update.shapes[embedding]}
        self.without, self.transformed, self.transforms = update.without, update.transformed, update.transforms

    @property
    def factored(self) -> Mapping[str, Callable[[], Factors]]:
        """See :class:`Update`."""
        own = self._update.factored
        return {**own, **{head: own[embedding] for head, embedding in self._of.items() if embedding in own}}

    @property
    def weights(self) -> frozenset[str]:
        """See :class:`Update`."""
        return self._update.weights | self._of.keys()

    def rows(self, name: str, start: int, stop: int) -> Any:
        """See :class:`Update`."""
        return self._update.rows(self._of.get(name, name), start, stop)

    def learned_rows(self, name: str, start: int, stop: int) -> Any:
        """See :class:`Update`."""
        return self._update.learned_rows(self._of.get(name, name), start, stop)

    def changes(self, name: str) -> bool:
        """See :class:`Update`."""
        return self._update.changes(self._of.get(name, name))

    def require_finite_base(self, name: str, start: int, stop: int) -> None:
        """See :class:`Update`."""
        self._update.require_finite_base(self._of.get(name, name), start, stop)

    def require_weights(self, names: Iterable[str]) -> None:
        """See :class:`Update`."""
        self._update.require_weights(self._of.get(name, name) for name in names)


def _with_its_head(update: Update, instruct: Mapping[str, TensorInfo]) -> Update:
    """The update with one of the Instruct's output head, where it comes from a tied model and has one of neither."""
    head, embedding = head_and_embedding(instruct)
    there = update.tied and embedding in update.shapes and head not in {*update.shapes, *update.without}
    return _WithHead(update, head, embedding) if head and embedding and there else update
