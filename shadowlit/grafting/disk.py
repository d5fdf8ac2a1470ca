"""The graft on disk: three checkpoints in, one out, a few rows in memory at a time.

For users who have tuned a Base elsewhere and only want the graft. No transformers import: start-up is part of the
speed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np

from shadowlit.checkpoint import numeric
from shadowlit.checkpoint.folder import Streamed
from shadowlit.checkpoint.headers import TensorInfo, dtype_code, some_of
from shadowlit.checkpoint.names import is_bias, is_norm, is_weight, layer_of, module_of, routers, tower_of
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.checkpoint.workers import Room, in_order
from shadowlit.errors import GraftError
from shadowlit.grafting.selection import Coverage, coverage, resolve
from shadowlit.grafting.update import Update, zero_update
from shadowlit.limits import bounded_matching

LEAST_SURVIVAL = 0.5
"""Fraction of an update below which rounding to the export's dtype is warned of."""


@dataclass(frozen=True)
class Scale:
    """The scale λ of a graft, and other scales for tensors that match a pattern."""

    default: float = 1.0
    by_pattern: tuple[tuple[str, float], ...] = ()  # regular expressions, searched in the names; the first match counts

    @classmethod
    def parse(cls, text: str) -> Scale:
        r"""Read ``0.5``, or ``1;layers\.(0|1)\.=0.5``: a number, and pattern=number pairs, separated by ``;``."""
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
        """The scale of tensor ``name``."""
        for pattern, value in self.by_pattern:
            with bounded_matching(f"scale has {pattern!r}"):
                if re.search(pattern, name):
                    return value
        return self.default


def linear_on_disk(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Names of the linear layers' weights and biases, from a checkpoint's headers alone.

    Those are the matrices inside numbered layers, and their biases; embeddings and the output head are outside.
    Experts' matrices count, fused or single; their routers don't, as in the paper's code. The projector between towers,
    whose few layers have names instead of numbers, counts too. Equal to
    :func:`shadowlit.grafting.parameters.linear_names` for Llama, Qwen, Mistral, Gemma, Qwen-MoE and Mixtral.
    """
    gates = routers(tensors)
    weights = {
        name
        for name, info in tensors.items()
        if (layer_of(name) is not None or (tower_of(name) == "projector" and is_weight(name)))
        and len(info.shape) >= 2
        and not is_norm(name)
        and name not in gates
    }
    modules = set(map(module_of, weights))
    return frozenset(weights | {name for name in tensors if is_bias(name) and module_of(name) in modules})


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
        self._update, self.instruct, self._scale, self.dtype = update, instruct, scale, dtype
        selected = resolve(select, instruct.tensors, linear_on_disk(instruct.tensors), "of the Instruct")
        self.selected = selected & frozenset(update.shapes)
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
        for pattern, _ in scale.by_pattern:
            with bounded_matching(f"scale has {pattern!r}"):
                matches = any(re.search(pattern, name) for name in self.selected)
            if not matches:
                raise GraftError(
                    f"the scale's pattern {pattern!r} matches none of the {len(self.selected)} grafted tensors."
                )
        sizes = {name: info.num_elements for name, info in instruct.tensors.items()}
        # From the headers: what is left out may have changed or not.
        self.planned = coverage(self.selected, frozenset(update.shapes) & frozenset(sizes), sizes)
        self.num_bytes = sum(info.converted(dtype).num_bytes for info in instruct.tensors.values())
        self._squares = [0.0, 0.0]  # of the scaled update, and of what rounding takes from it

    @cached_property
    def coverage(self) -> Coverage:
        """What the graft covers; of what it leaves out only the tensors that changed, for which they are read."""
        return replace(self.planned, left_out=tuple(filter(self._update.changes, self.planned.left_out)))

    @property
    def survival(self) -> float:
        """The fraction of the update that survived rounding in the tensors streamed so far.

        ``1 - ‖lost‖ / ‖scale * update‖`` with ``lost = round(grafted) - grafted``: 1 if all of it did, NaN if the
        update is zero.
        """
        return 1 - (self._squares[1] / self._squares[0]) ** 0.5 if self._squares[0] else math.nan

    def tensors(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[str, Streamed]]:
        """Yield every tensor of the Instruct, grafted where selected, in parts that are computed ahead.

        A part is valid until the next one is taken; ``advance`` is called with the bytes of each.

        Raises:
            GraftError: At the end, if the scaled update is zero and that isn't allowed.
        """
        infos = self.instruct.tensors.values()
        windows = [(info, *window) for info in infos for window in row_windows(info)]
        # Over all tensors: where one ends, the next has begun.
        parts = in_order(
            lambda window, room: self._part(*window, room), windows,
            max((info.converted(self.dtype).row_bytes * (stop - start) for info, start, stop in windows), default=0),
            num_bytes=sum(info.num_bytes * (3 if info.name in self.selected else 1) for info in infos),
        )  # fmt: skip
        with closing(parts):  # a signal that arrives while it is collected instead would be lost
            for name, info in self.instruct.tensors.items():
                own = islice(parts, sum(1 for _ in row_windows(info)))
                yield name, Streamed(info.converted(self.dtype).code, info.shape, self._counted(own, advance))
        if not (self._squares[0] or self._allow_zero):
            raise zero_update(str(self.coverage))

    def _counted(
        self, parts: Iterable[tuple[tuple[int, float, float], Room]], advance: Callable[[int], None]
    ) -> Iterator[numeric.Raw]:
        for (num_bytes, update_square, lost_square), room in parts:
            self._squares[0] += update_square
            self._squares[1] += lost_square
            advance(num_bytes)
            yield room[:num_bytes]

    def _bfloat16_part(
        self, raw: Room, info: TensorInfo, target: str, start: int, stop: int, room: Room
    ) -> tuple[int, float, float] | None:
        """A grafted part, if all of it is bfloat16 and in pairs, and all values are finite."""
        if raw.size % 4 or {info.code, target} != {"BF16"}:
            return None
        if (stored := self._update.bfloat16_rows(info.name, start, stop)) is None:
            return None
        _, *squares = numeric.graft_bfloat16(*stored, raw, self._scale.of(info.name), room[: raw.size])
        return (raw.size, squares[0], squares[1]) if all(map(math.isfinite, squares)) else None

    def _part(self, info: TensorInfo, start: int, stop: int, room: Room) -> tuple[int, float, float]:
        """Rows of the result, written into ``room``: their bytes, and the two squared norms of ``graft_part``."""
        name, target = info.name, info.converted(self.dtype).code
        if name not in self.selected and target == info.code:
            raw = room[: (stop - start) * info.row_bytes]
            self.instruct.read_into(raw.data, name, start * info.row_bytes)
            numeric.require_finite(name, raw, target)
            return raw.size, 0.0, 0.0
        raw, squares = self.instruct.raw_rows(name, start, stop), [0.0, 0.0]
        if name in self.selected:
            if (part := self._bfloat16_part(raw, info, target, start, stop, room)) is not None:
                return part
            update = np.asarray(self._update.rows(name, start, stop)).reshape(-1)
            scale = self._scale.of(name)
            stored, *squares = numeric.graft_part(raw, info.code, update, scale, target)
            if not all(map(math.isfinite, squares)):
                exact = numeric.widen(raw, info.code) + scale * update
                if bad := int(np.count_nonzero(~np.isfinite(exact))):
                    raise numeric.not_finite(name, bad, exact.size)
                numeric.require_finite(name, stored, target)
        else:
            stored = numeric.narrow(numeric.widen(raw, info.code), target)
            numeric.require_finite(name, stored, target)
        room[: stored.nbytes] = stored.reshape(-1).view(np.uint8)
        return stored.nbytes, squares[0], squares[1]
