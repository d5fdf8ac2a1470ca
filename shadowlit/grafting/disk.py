"""The graft on disk: three checkpoints in, one out, a few rows in memory at a time.

For users who have tuned a Base elsewhere and only want the graft. No transformers import: start-up is part of the
speed.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from shadowlit.checkpoint.folder import CheckpointReader, Streamed
from shadowlit.checkpoint.headers import TensorInfo, some_of
from shadowlit.checkpoint.layout import ExpertRows, LayoutReader, canonical_keys, fused_experts
from shadowlit.checkpoint.names import canonical_key, is_computed, layer_of, routers, tower_of
from shadowlit.checkpoint.numeric import (
    Raw,
    finite_squares,
    graft_bfloat16,
    graft_part,
    narrow,
    not_finite,
    require_finite,
    widen,
)
from shadowlit.checkpoint.pickled import open_checkpoint
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.checkpoint.workers import Room, in_order
from shadowlit.errors import GraftError, first_line
from shadowlit.grafting.selection import Coverage, coverage, resolve

if TYPE_CHECKING:
    from peft import LoraConfig

_MAX_SCALING = 1e6  # of an adapter; LoRA's usual ones lie between 0.1 and 10

Rows = npt.NDArray[np.floating]


class Update(Protocol):
    """What a tuned checkpoint has learned: by the names of the Base's tensors, in their shapes."""

    shapes: Mapping[str, tuple[int, ...]]

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of the update ``tuned - base`` of ``name``, [stop - start, ...] in float32:
        an array, or a tensor on the CPU that numpy can view."""


class FullUpdate:
    """The difference of two checkpoints of one architecture.

    Names and layout may differ in whatever :class:`shadowlit.checkpoint.layout.LayoutReader` understands.

    Args:
        base: reader of the Base's checkpoint.
        tuned: reader of the tuned one's.

    Raises:
        GraftError: the checkpoints don't hold the same tensors in the same shapes.
        CheckpointError: a checkpoint that holds more than plain weights, or tensors twice.
    """

    def __init__(self, base: TensorReader, tuned: TensorReader) -> None:
        self._base, self._tuned = base, LayoutReader(tuned, base)
        left, right = base.tensors, self._tuned.tensors
        missing = [name for name in left if name not in right and not is_computed(name)]
        added = [name for name in right if name not in left]
        shapes = [
            f"{name} {left[name].shape} and {right[name].shape}"
            for name in sorted(left.keys() & right.keys())
            if left[name].shape != right[name].shape
        ]
        problems = [
            f"{title}: {some_of(names)}"
            for title, names in (("only in the Base", missing), ("only in the tuned one", added), ("shapes", shapes))
            if names
        ]
        if problems:
            raise GraftError(
                f"{tuned.folder} was not tuned from {base.folder}: {'; '.join(problems)}. Give the Base that the "
                "training started from."
            )
        self.shapes: Mapping[str, tuple[int, ...]] = {name: left[name].shape for name in left if name in right}

    def require_weights(self, names: Iterable[str]) -> None:
        """Raise unless these tensors are floating-point weights on both sides.

        Raises:
            GraftError: naming the others.
        """
        names = list(names)
        self._base.require_weights(names)
        self._tuned.require_weights(names)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """See :class:`Update`."""
        tuned, base = self._tuned.rows(name, start, stop), self._base.rows(name, start, stop)
        return np.subtract(tuned, base, out=tuned) if tuned.dtype == base.dtype else tuned - base

    def codes(self, name: str) -> set[str]:
        """The format's codes of the dtypes in which the two checkpoints store ``name``."""
        return {self._base.info(name).code, self._tuned.info(name).code}

    def raw_rows(self, name: str, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Rows of ``name`` in the Base and in the tuned one, as they are stored: flat bytes."""
        return self._base.raw_rows(name, start, stop), self._tuned.raw_rows(name, start, stop)


@dataclass(frozen=True)
class _Factors:
    """Names of a module and of its two factors, as peft's file has them."""

    module: str
    down: str
    up: str
    of_embedding: bool = False
    experts: int = 1  # which these are the factors of, all in one
    part: ExpertRows | None = None  # of the experts' matrices that it is about


class AdapterUpdate:
    """The update of a LoRA or rsLoRA adapter in peft's form: ``scaling * B @ A``, and modules it stores whole.

    LoRA: arXiv 2106.09685. rsLoRA: arXiv 2312.03732. Of experts peft holds one pair of factors for a layer and kind,
    A [experts * rank, inputs] by experts and B [outputs, rank * experts] by ranks; the files' experts may be fused or
    single.

    Args:
        base: reader of the Base's checkpoint.
        folder: the adapter's folder.
        config: its settings, where no ``adapter_config.json`` lies in the folder.
        reader: of its factors, by the names that peft's file has, where they lie in another file.

    Raises:
        GraftError: an adapter whose update can't be had from its files exactly, or that doesn't fit the Base.
    """

    def __init__(
        self, base: TensorReader, folder: Path, config: LoraConfig | None = None, reader: TensorReader | None = None
    ) -> None:
        # Imported late: peft takes seconds, and whole checkpoints don't need it.
        from peft import PeftConfig

        from shadowlit.grafting.adapter import require_graftable, starts_from_weights

        self._base = base
        try:
            config = config or PeftConfig.from_pretrained(str(folder))
        except Exception as error:  # of json, of peft's many configs: many types, one remedy
            raise GraftError(
                f"{folder / 'adapter_config.json'} is not an adapter's config that peft reads ({first_line(error)}). "
                "Save or download the adapter again."
            ) from error
        if config.peft_type != "LORA":
            raise GraftError(f"{folder} holds a {config.peft_type} adapter; expected LoRA or rsLoRA. Merge it first.")
        require_graftable(config)
        if starts_from_weights(config):
            raise GraftError(
                f"{folder} holds an adapter with init_lora_weights={config.init_lora_weights!r}, whose file lacks the "
                "residual that it left in the weights. Convert it to LoRA when saving (peft's "
                "path_initial_model_for_weight_conversion), or save the merged model."
            )
        if config.fan_in_fan_out:
            raise GraftError(f"{folder} adapts transposed layers (fan_in_fan_out=true). Merge it first.")
        self._config: Any = config
        self._folder = folder
        self._reader = reader or CheckpointReader(folder, single_file="adapter_model.safetensors")
        # A part needs some rows of one factor and all of the other, as do all other parts of the same tensor.
        self._whole_factor = lru_cache(maxsize=4)(
            lambda stored: self._reader.rows(stored, 0, self._reader.info(stored).shape[0])
        )
        self._factors: dict[str, _Factors] = {}
        self._whole: dict[str, str] = {}
        names, fused = canonical_keys(base), fused_experts(base)
        for stored in self._reader.tensors:
            name = stored.removeprefix("base_model.model.").replace(".base_layer.", ".")
            for down, up in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
                if re.search(rf"\.{down}(\.weight)?$", name):
                    module = name.split(f".{down}")[0]
                    host = f"{module}.weight"
                    factors = _Factors(module, stored, stored.replace(down, up), "embedding" in down)
                    if module.endswith(".experts"):
                        self._factors |= self._of_experts(factors, fused)
                    else:
                        self._factors[names.get(canonical_key(host), host)] = factors
            if ".lora_" not in name:
                self._whole[names.get(canonical_key(name), name)] = stored
        adapted = {*self._factors, *self._whole}
        unknown = sorted(name for name in adapted if name not in base.tensors)
        if unknown:
            raise GraftError(
                f"{folder} adapts {some_of(unknown)}, which {base.folder} doesn't have. Give the Base that the "
                "adapter was trained on, or merge the adapter into it (merge_and_unload) and give that."
            )
        self.shapes: Mapping[str, tuple[int, ...]] = {name: base.tensors[name].shape for name in adapted}
        self._require_fitting()
        self._scalings = {name: self._scaling(factors) for name, factors in self._factors.items()}

    def require_weights(self, names: Iterable[str]) -> None:
        """Raise unless these tensors of the Base, and what adapts them, are floating-point weights.

        Raises:
            GraftError: naming the others.
        """
        names = list(names)
        self._base.require_weights(names)
        self._reader.require_weights(part for name in names for part in self._parts_of(name))

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """See :class:`Update`."""
        # peft may store a host's tensor beside the factors on it: the embedding that it adapts, say.
        total: Rows = np.zeros((), np.float32)
        if name in self._whole:
            total = self._reader.rows(self._whole[name], start, stop) - self._base.rows(name, start, stop)
        if name not in self._factors:
            return total
        factors = self._factors[name]
        down = self._whole_factor(factors.down)
        if factors.part is not None:
            product = _product_of_experts(down, self._whole_factor(factors.up), factors, start, stop)
        elif factors.of_embedding:
            product = (self._whole_factor(factors.up) @ down[:, start:stop]).T
        else:
            product = self._reader.rows(factors.up, start, stop) @ down
        return total + np.float32(self._scalings[name]) * product

    def _of_experts(
        self, factors: _Factors, fused: Mapping[str, tuple[tuple[int, ...], list[ExpertRows]]]
    ) -> dict[str, _Factors]:
        """The factors of a layer's experts, by the Base's names of what they change: told from their shapes."""
        if factors.up not in self._reader.tensors:
            return {f"{factors.module}.weight": factors}  # told as half a pair
        down, up = (self._reader.info(name).shape for name in (factors.down, factors.up))
        for kind in ("gate_up_proj", "down_proj"):
            shape, parts = fused.get(canonical_key(f"{factors.module}.{kind}"), ((), []))
            if len(shape) == 3 and shape[1:] == (up[0], down[-1]) and down[0] == up[-1] and down[0] % shape[0] == 0:
                of = replace(factors, module=f"{factors.module}.{kind}", experts=shape[0])
                return {part.name: replace(of, part=part) for part in parts}
        raise GraftError(
            f"{self._folder} adapts {factors.module} by factors of the shapes {down} and {up}, to which the experts of "
            f"{self._base.folder} don't fit. Give the Base that the adapter was trained on, or merge the adapter into "
            "it (merge_and_unload) and give that."
        )

    def _parts_of(self, name: str) -> list[str]:
        """The adapter's names of all that changes ``name``."""
        factors = [self._factors[name].down, self._factors[name].up] if name in self._factors else []
        return [*factors, *([self._whole[name]] if name in self._whole else [])]

    def _require_fitting(self) -> None:
        """Every stored tensor has one part in the update, and what is added has the Base's shape."""
        changes = {tuple(self._parts_of(name)) for name in self.shapes}  # one pair of factors is all experts'
        used = Counter(stored for parts in changes for stored in parts)
        odd = sorted(name for name in {*self._reader.tensors, *used} if used[name] != 1)
        if odd:
            raise GraftError(
                f"{self._folder} should hold each factor of LoRA and each whole tensor once; it is not so for "
                f"{some_of(odd)}. Save the adapter again, or merge it first."
            )
        for name, shape in self.shapes.items():
            stored = [self._reader.info(part).shape for part in self._parts_of(name)]
            added = stored[-1:] if name in self._whole else []
            if name in self._factors and self._factors[name].part is None:
                down, up = (s if len(s) == 2 else (0, 0) for s in stored[:2])
                product = (down[1], up[0]) if self._factors[name].of_embedding else (up[0], down[1])
                added.append(product if down[0] == up[1] > 0 else ())
            if any(one != shape for one in added):
                raise GraftError(
                    f"{self._folder} changes {name} {shape} by tensors of the shapes {some_of(stored)}, which don't "
                    "fit. Give the Base that the adapter was trained on."
                )

    def _scaling(self, factors: _Factors) -> float:
        from peft.utils.other import get_pattern_key

        config, rank = self._config, self._reader.info(factors.down).shape[0] // factors.experts
        try:
            # peft names a bare parameter by its whole path, a module without its weight.
            keys = (get_pattern_key(config.alpha_pattern.keys(), f"{factors.module}{end}") for end in ("", ".weight"))
            alpha = next((config.alpha_pattern[key] for key in keys if key in config.alpha_pattern), config.lora_alpha)
            plain = not config.alpha_pattern and not config.rank_pattern
            if plain and factors.module.endswith(".gate_up_proj") and rank == 2 * config.r:
                alpha *= 2  # what peft makes of all-linear, or of gate_proj and up_proj, in a mixture that it wraps
            scaling = alpha / (rank**0.5 if config.use_rslora else rank)
            if abs(scaling) < _MAX_SCALING:
                return scaling
            problem = f"a strength of {scaling}"
        except (AttributeError, TypeError, OverflowError, re.error) as error:
            problem = first_line(error)
        raise GraftError(
            f"{self._folder / 'adapter_config.json'} has lora_alpha={reprlib.repr(config.lora_alpha)} and "
            f"alpha_pattern={reprlib.repr(config.alpha_pattern)}, by which {factors.module} gets {problem}. Save the "
            "adapter again."
        )


def _product_of_experts(down: Rows, up: Rows, factors: _Factors, start: int, stop: int) -> Rows:
    """Rows ``start`` to ``stop`` of a stored tensor of experts: of one expert's matrix, or whole experts."""
    assert factors.part is not None
    downs = down.reshape(factors.experts, -1, down.shape[1])  # [experts, rank, inputs]
    ups = up.reshape(len(up), -1, factors.experts)  # [outputs, rank, experts]
    if factors.part.expert is None:
        return np.stack([ups[:, :, e] @ downs[e] for e in range(start, stop)]) if stop > start else downs[:0, :0]
    first = factors.part.first_row
    return ups[first + start : first + stop, :, factors.part.expert] @ downs[factors.part.expert]


def open_update(base: TensorReader, tuned: Path, allow_pickle: bool = False) -> Update:
    """The update in the folder ``tuned``, by the Base's names: a whole checkpoint, or an adapter in peft's form."""
    if (tuned / "adapter_config.json").is_file():
        return AdapterUpdate(base, tuned)
    return FullUpdate(base, open_checkpoint(tuned, allow_pickle))


@dataclass(frozen=True)
class Strength:
    """The scale of a graft, and other scales for tensors that match a pattern.

    Attributes:
        default: the scale λ.
        by_pattern: regular expressions, searched in the names, and their scales; the first match counts.
    """

    default: float = 1.0
    by_pattern: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Strength:
        r"""Read ``0.5``, or ``1;layers\.(0|1)\.=0.5``: a number, and pattern=number pairs, separated by ``;``.

        Raises:
            GraftError: anything else.
        """
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
        return next((value for pattern, value in self.by_pattern if re.search(pattern, name)), self.default)

    def require_matches(self, names: frozenset[str]) -> None:
        """Raise for a pattern that matches none of ``names``.

        Raises:
            GraftError: naming the pattern.
        """
        for pattern, _ in self.by_pattern:
            if not any(re.search(pattern, name) for name in names):
                raise GraftError(f"the scale's pattern {pattern!r} matches none of the {len(names)} grafted tensors.")


def linear_on_disk(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Names of the linear layers' weights and biases, told from a checkpoint's headers alone.

    Those are the matrices inside numbered layers, and the biases beside them; embeddings and the output head lie
    outside. Experts' matrices count, fused or single; the routers that choose among them don't, as in the paper's
    code. Equal to :func:`shadowlit.grafting.parameters.linear_names` for Llama, Qwen, Mistral, Gemma, Qwen-MoE and
    Mixtral.
    The projector between towers, whose few layers have names instead of numbers, counts too.
    """
    gates = routers(tensors)
    weights = {
        name
        for name, info in tensors.items()
        if (layer_of(name) is not None or (tower_of(name) == "projector" and name.endswith(".weight")))
        and len(info.shape) >= 2
        and "norm" not in name
        and name not in gates
    }
    modules = {name.removesuffix(".weight") for name in weights}
    biases = {name for name in tensors if name.endswith(".bias") and name.removesuffix(".bias") in modules}
    return frozenset(weights | biases)


class DiskGraft:
    """A graft of checkpoints, checked from their headers and ready to be streamed.

    Args:
        update: what was learned.
        instruct: reader of the Instruct's checkpoint.
        strength: the scale.
        select: which tensors; see :func:`shadowlit.grafting.selection.resolve`.
        dtype: of all floating-point tensors of the result, e.g. ``bfloat16``; ``None`` for the Instruct's own.

    Raises:
        GraftError: nothing is selected, or a selected tensor has another shape in the Instruct, or isn't a
            floating-point weight of 16 bits or more; or ``dtype`` is given and one of the Instruct has 8.
    """

    def __init__(
        self,
        update: Update,
        instruct: TensorReader,
        strength: Strength,
        select: str | list[str] = "linear",
        dtype: str | None = None,
    ) -> None:
        self._update, self._instruct, self._strength, self._dtype = update, instruct, strength, dtype
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
        if isinstance(update, FullUpdate | AdapterUpdate):  # a stored delta is one of weights already
            update.require_weights(sorted(self.selected))
        strength.require_matches(self.selected)
        self.stored: Mapping[str, TensorInfo] = instruct.tensors
        sizes = {name: info.num_elements for name, info in instruct.tensors.items()}
        self.coverage: Coverage = coverage(self.selected, frozenset(update.shapes) & frozenset(sizes), sizes)
        self.num_bytes = sum(info.converted(dtype).num_bytes for info in instruct.tensors.values())
        self._squares = [0.0, 0.0]  # of the scaled update, and of what rounding takes from it

    @property
    def survival(self) -> float:
        """What arrived of the update in the tensors streamed so far: 1 for all of it; see ``lost_in_rounding``."""
        return 1 - (self._squares[1] / self._squares[0]) ** 0.5 if self._squares[0] else 1.0

    def tensors(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[str, Streamed]]:
        """Yield every tensor of the Instruct, grafted where selected, in parts that are computed ahead.

        A part is valid until the next one is taken. See :func:`shadowlit.checkpoint.workers.in_order` for who computes.

        Args:
            advance: called with the bytes of every part that was taken.
        """
        infos = self._instruct.tensors.values()
        windows = [(info, *window) for info in infos for window in row_windows(info)]
        # Over all tensors: where one ends, the next has begun.
        parts = in_order(
            lambda window, room: self._part(*window, room), windows, self._room_bytes(windows),
            num_bytes=sum(info.num_bytes * (3 if info.name in self.selected else 1) for info in infos),
        )  # fmt: skip
        for name, info in self._instruct.tensors.items():
            own = islice(parts, sum(1 for _ in row_windows(info)))
            yield name, Streamed(info.converted(self._dtype).code, info.shape, self._counted(own, advance))

    def _room_bytes(self, windows: Iterable[tuple[TensorInfo, int, int]]) -> int:
        """The bytes of the largest part of the result."""
        return max(
            (_row_bytes(info.converted(self._dtype)) * (stop - start) for info, start, stop in windows), default=0
        )

    def _counted(
        self, parts: Iterable[tuple[tuple[int, float, float], Room]], advance: Callable[[int], None]
    ) -> Iterator[Raw]:
        for (num_bytes, update_square, lost_square), room in parts:
            self._squares[0] += update_square
            self._squares[1] += lost_square
            advance(num_bytes)
            yield room[:num_bytes]

    def _bfloat16_part(
        self, raw: Room, info: TensorInfo, target: str, start: int, stop: int, room: Room
    ) -> tuple[int, float, float] | None:
        """A grafted part, if all of it is bfloat16 and in pairs, and all values are finite."""
        if not isinstance(self._update, FullUpdate) or raw.size % 4:
            return None
        if {info.code, target, *self._update.codes(info.name)} != {"BF16"}:
            return None
        base, tuned = self._update.raw_rows(info.name, start, stop)
        _, *squares = graft_bfloat16(base, tuned, raw, self._strength.of(info.name), room[: raw.size])
        return (raw.size, squares[0], squares[1]) if finite_squares(*squares) else None

    def _part(self, info: TensorInfo, start: int, stop: int, room: Room) -> tuple[int, float, float]:
        """Rows of the result, written into ``room``: their bytes, and the two squared norms of ``graft_part``."""
        name, target = info.name, info.converted(self._dtype).code
        if name not in self.selected and target == info.code:
            row = _row_bytes(info)
            raw = room[: (stop - start) * row]
            self._instruct.read_into(raw.data, name, start * row)
            require_finite(name, raw, target)
            return raw.size, 0.0, 0.0
        raw, squares = self._instruct.raw_rows(name, start, stop), [0.0, 0.0]
        if name in self.selected:
            if (part := self._bfloat16_part(raw, info, target, start, stop, room)) is not None:
                return part
            update = np.asarray(self._update.rows(name, start, stop)).reshape(-1)
            scale = self._strength.of(name)
            stored, *squares = graft_part(raw, info.code, update, scale, target)
            if not finite_squares(*squares):
                exact = widen(raw, info.code) + scale * update
                if bad := int(np.count_nonzero(~np.isfinite(exact))):
                    raise not_finite(name, bad, exact.size)
                require_finite(name, stored, target)
        else:
            stored = narrow(widen(raw, info.code), target)
            require_finite(name, stored, target)
        room[: stored.nbytes] = stored.reshape(-1).view(np.uint8)
        return stored.nbytes, squares[0], squares[1]


def _row_bytes(info: TensorInfo) -> int:
    """The bytes of one row; a scalar has one."""
    return info.num_bytes // max(1, info.shape[0] if info.shape else 1)
