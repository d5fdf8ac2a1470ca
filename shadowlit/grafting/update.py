"""The update ``tuned - base`` of a tuned checkpoint, read a few rows at a time.

No transformers import: start-up is part of the speed.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shadowlit.checkpoint.headers import TensorInfo, some_of, weights_in
from shadowlit.checkpoint.layout import (
    ExpertRows,
    LayoutReader,
    canonical_keys,
    fused_experts,
    head_and_embedding,
    repeats_embedding,
    with_head,
)
from shadowlit.checkpoint.names import (
    GATE_UP,
    ROWS_OF_FUSED,
    canonical_key,
    factor_pair,
    host_key,
    is_adapter_name,
    is_experts,
    layer_of,
    leaf_of,
    peft_key,
    repeated_keys,
    weight_of,
)
from shadowlit.checkpoint.numeric import require_finite
from shadowlit.checkpoint.pickled import open_checkpoint
from shadowlit.checkpoint.reader import TensorReader, described, keeping
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.errors import GraftError, first_line
from shadowlit.pair.buffers import open_model

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

_UNGATHERED = (0,)  # shape in which DeepSpeed ZeRO-3 leaves a parameter of which a process holds no shard
_MAX_SCALING = 1e6  # of an adapter; LoRA's usual ones are between 0.1 and 10

Rows = npt.NDArray[np.floating]
Bytes = npt.NDArray[np.uint8]


class Update:
    """The update of a tuned model, by the names of the Base's tensors and in their shapes."""

    shapes: Mapping[str, tuple[int, ...]]
    without: Mapping[str, str] = MappingProxyType({})  # tensors of which no update can be taken, and why
    tied = False  # whether the update of the embedding is that of the output head too, if there is none of a head

    transformed = False  # whether `rows` may differ from `learned_rows`

    @property
    def weights(self) -> frozenset[str]:
        """Names of the updates that are numbers to add: all but those of integers and truth values."""
        return frozenset(self.shapes)

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of ``tuned - base``, [stop - start, ...]: an array, or a tensor on the CPU."""
        raise NotImplementedError

    def learned_rows(self, name: str, start: int, stop: int) -> Any:
        """The same rows before any transform."""
        return self.rows(name, start, stop)

    def changes(self, name: str) -> bool:
        """Whether a value of the tensor ``name`` is not zero; reads no further than to the first one."""
        windows = row_windows(TensorInfo(name, "F32", self.shapes[name], ""))
        return any(np.any(np.asarray(self.rows(name, *window))) for window in windows)

    def require_weights(self, names: Iterable[str]) -> None:
        """Raise a GraftError unless these are updates of floating-point weights; those of a stored delta always are."""

    def require_finite_base(self, name: str, start: int, stop: int) -> None:
        """Raise a CheckpointError if the Base holds NaN or infinities in these rows, as far as it is known."""

    def bfloat16_rows(self, name: str, start: int, stop: int) -> tuple[Bytes, Bytes] | None:
        """Rows of the Base and of the tuned model as flat bytes, where both are stored in bfloat16."""
        return None


class _FromBase(Update):
    """An update that is computed with the Base's checkpoint, and that some tensors may lack."""

    _base: TensorReader

    def _set_without(self, without: Mapping[str, str], strict: bool) -> None:
        """Keep what has no update, and why; raise if any has none, or unless ``strict`` if its layer is unknown."""
        self.without = without
        unknown = [name for name in without if self._is_unknown(name)]
        if unknown or (strict and without):
            raise self._problem(sorted(without if strict else unknown))

    def _is_unknown(self, name: str) -> bool:
        """Whether the tuned model has a tensor in its layers that the Base lacks."""
        return name not in self._base.tensors and layer_of(name) is not None

    def _problem(self, names: list[str]) -> GraftError:
        """The error for tensors without an update, by its cause."""
        raise NotImplementedError

    def require_weights(self, names: Iterable[str]) -> None:
        """See :class:`Update`; that there are updates is checked, and the Base's tensors are."""
        names = list(names)
        if lacking := sorted(self.without.keys() & set(names)):
            raise self._problem(lacking)
        self._base.require_weights(names)

    def require_finite_base(self, name: str, start: int, stop: int) -> None:
        """See :class:`Update`."""
        stored, code = self._base.raw_rows(name, start, stop), self._base.info(name).code
        require_finite(name, stored, code, f"Base {self._base.folder}")


class FullUpdate(_FromBase):
    """The difference of two checkpoints, whose names and layout may differ as :class:`LayoutReader` allows.

    Where one of the two is tied and the other is not, the head of the tied one is its embedding.

    Args:
        base: Checkpoint that the tuning started from.
        tuned: The tuned checkpoint.
        strict: Raise for every tensor that is not in both in one shape. Otherwise these are in ``without``, and an
            error only where :meth:`require_weights` asks for them, or where the tuned model has layers of its own.

    Raises:
        GraftError: The checkpoints do not hold the same tensors in the same shapes.
        CheckpointError: A checkpoint holds more than plain weights, or a tensor twice.
    """

    def __init__(self, base: TensorReader, tuned: TensorReader, strict: bool = True) -> None:
        self._tuned = LayoutReader(tuned, base)
        head = head_and_embedding(self._tuned.tensors)[0]
        tied = head_and_embedding(base.tensors)[0] is None
        self._base = with_head(base, head) if head and tied else base
        left, right = self._base.tensors, self._tuned.tensors
        self._of_base, self._of_tuned = (weights_in(side).keys() for side in (left, right))
        self.tied = head is None
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: info.shape for name, info in left.items() if name in right and right[name].shape == info.shape
        }
        without = {name: "only in the Base" for name in left if name not in right}
        without |= {name: "only in the tuned one" for name in right if name not in left}
        without |= {
            name: f"{left[name].shape} and {right[name].shape}"
            for name in sorted(left.keys() & right.keys())
            if name not in self.shapes
        }
        self._set_without(without, strict)

    def _problem(self, names: list[str]) -> GraftError:
        left, right = self._base.tensors, self._tuned.tensors
        both = {name: (left[name].shape, right[name].shape) for name in names if name in left and name in right}
        if empty := [name for name, (_, tuned) in both.items() if tuned == _UNGATHERED]:
            return _empty(self._tuned.folder, empty)
        outside = all(layer_of(name) is None for name in names)
        if outside and (resized := {name: shapes for name, shapes in both.items() if _is_resized(*shapes)}):
            return _other_vocabulary(self._base.folder, self._tuned.folder, resized)
        by_kind: dict[str, list[str]] = {}
        for name in names:
            kind, told = ("shapes", f"{name} {self.without[name]}") if name in both else (self.without[name], name)
            by_kind.setdefault(kind, []).append(told)
        problems = "; ".join(f"{kind}: {some_of(told)}" for kind, told in by_kind.items())
        if outside:
            return GraftError(
                f"{self._tuned.folder} and {self._base.folder} differ outside of their layers: {problems}. Expected "
                "both to hold what is selected; leave the rest out of the selection ('linear' does)."
            )
        if all(name not in right for name in names):
            return GraftError(
                f"{self._tuned.folder} is incomplete, or was not tuned from {self._base.folder}: {problems}. Finish "
                "its download or save the whole of it again, or leave what it lacks out of the selection."
            )
        return GraftError(
            f"{self._tuned.folder} was not tuned from {self._base.folder}: {problems}. Give the Base that the training "
            "started from."
        )

    def _is_unknown(self, name: str) -> bool:
        return super()._is_unknown(name) and name in self._of_tuned

    @property
    def weights(self) -> frozenset[str]:
        """See :class:`Update`."""
        return frozenset(self.shapes.keys() & self._of_base & self._of_tuned)

    def require_weights(self, names: Iterable[str]) -> None:
        """See :class:`Update`; both sides are checked."""
        names = list(names)
        super().require_weights(names)
        self._tuned.require_weights(names)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """See :class:`Update`."""
        tuned, base = self._tuned.rows(name, start, stop), self._base.rows(name, start, stop)
        return np.subtract(tuned, base, out=tuned) if tuned.dtype == base.dtype else tuned - base

    def changes(self, name: str) -> bool:
        """See :class:`Update`; tensors that hold no weights change with their bytes."""
        base, tuned = self._base.info(name), self._tuned.info(name)
        if base.code == tuned.code and all(
            np.array_equal(self._base.raw_rows(name, *window), self._tuned.raw_rows(name, *window))
            for window in row_windows(base)
        ):
            return False
        return not (base.is_weight and tuned.is_weight) or super().changes(name)

    def bfloat16_rows(self, name: str, start: int, stop: int) -> tuple[Bytes, Bytes] | None:
        """See :class:`Update`."""
        if {self._base.info(name).code, self._tuned.info(name).code} != {"BF16"}:
            return None
        return self._base.raw_rows(name, start, stop), self._tuned.raw_rows(name, start, stop)


class _Factors(NamedTuple):
    """Names of a module and of its two factors, as peft's file has them."""

    module: str
    down: str
    up: str
    of_embedding: bool = False
    experts: int = 1  # number of experts whose factors these are, all in one
    part: ExpertRows | None = None  # of the experts' matrices that is updated


class AdapterUpdate(_FromBase):
    """The update of a LoRA or rsLoRA adapter in peft's form: ``scaling * B @ A``, and the modules it stores whole.

    LoRA: arXiv 2106.09685. rsLoRA: arXiv 2312.03732. Of experts peft holds one pair of factors for a layer and kind,
    A [experts * rank, inputs] by experts and B [outputs, rank * experts] by ranks; the files' experts may be fused or
    single.

    An adapter of the embedding of a tied model leaves its output head as it is, and the other way round, unless it was
    trained with ``ensure_weight_tying``.

    Args:
        base: Checkpoint of the model that was adapted.
        folder: Folder of the adapter.
        config: Its settings, in place of ``adapter_config.json``.
        reader: Reader of the factors, by the names in peft's files, in place of ``adapter_model.safetensors``.
        strict: As of :class:`FullUpdate`.
        allow_pickle: Also read ``adapter_model.bin``.

    Raises:
        GraftError: The adapter's files do not give its exact update, or it does not fit the Base.
    """

    def __init__(
        self,
        base: TensorReader,
        folder: Path,
        config: LoraConfig | None = None,
        reader: TensorReader | None = None,
        strict: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        # Imported late: peft takes seconds, and whole checkpoints don't need it.
        from peft import PeftConfig

        from shadowlit.grafting.adapter import require_graftable, starts_from_weights

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
        self._reader = reader or open_checkpoint(folder, allow_pickle, adapter=True)
        self._reader.computed = repeated_keys(self._reader.tensors)
        self._reader = self._reader.learned()
        if empty := [name for name, info in self._reader.tensors.items() if info.shape == _UNGATHERED]:
            raise _empty(folder, empty)
        is_tied = head_and_embedding(base.tensors)[0] is None or bool(repeats_embedding(base))
        self._base = base = self._with_own_head(base)
        self._product = keeping(self._multiplied, count=1)
        self._factors: dict[str, _Factors] = {}
        self._whole: dict[str, str] = {}
        names, fused = canonical_keys(base), fused_experts(base)
        for stored in self._reader.tensors:
            if pair := factor_pair(stored):
                module, up, of_embedding = pair
                factors, host = _Factors(module, stored, up, of_embedding), weight_of(module)
                if is_experts(module):
                    self._factors |= self._of_experts(factors, fused)
                else:
                    self._factors[names.get(canonical_key(host), host)] = factors
            elif not is_adapter_name(stored):
                name = host_key(stored)
                self._whole[names.get(canonical_key(name), name)] = stored
        adapted = sorted({*self._factors, *self._whole})
        self._require_each_once(adapted)
        self._stored = {name: [self._reader.info(part).shape for part in self._parts_of(name)] for name in adapted}
        without = {name: "only in the adapter" for name in adapted if name not in base.tensors}
        without |= {name: self._shapes_of(name) for name in adapted if name not in without and not self._fits(name)}
        self.shapes: Mapping[str, tuple[int, ...]] = {n: base.tensors[n].shape for n in adapted if n not in without}
        self._set_without(without, strict)
        self._scalings = {name: self._scaling(factors) for name, factors in self._factors.items()}
        if is_tied and getattr(config, "ensure_weight_tying", False):
            self._tie()

    def _tie(self) -> None:
        """Let the embedding's update be the head's too, unless the adapter stores another one for the head."""
        head, embedding = head_and_embedding(self.shapes)
        if embedding is None:
            return
        windows = row_windows(described(self.shapes)[embedding])
        pairs = [[self.rows(name, *window) for name in (head, embedding)] for window in windows] if head else []
        if all(np.allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(other).max()) for one, other in pairs):
            self.tied = True
            self.shapes = {name: shape for name, shape in self.shapes.items() if name != head}

    def _with_own_head(self, base: TensorReader) -> TensorReader:
        """The Base with an output head, if it is tied and the adapter has one."""
        hosts = [host_key(name) for name in self._reader.tensors if not is_adapter_name(name)]
        hosts += [weight_of(pair[0]) for name in self._reader.tensors if (pair := factor_pair(name))]
        head = head_and_embedding(hosts)[0]
        return with_head(base, head) if head and head_and_embedding(base.tensors)[0] is None else base

    def require_weights(self, names: Iterable[str]) -> None:
        """See :class:`Update`; the Base's tensors are checked, and the adapter's that change them."""
        names = list(names)
        super().require_weights(names)
        self._reader.require_weights(part for name in names for part in self._parts_of(name))

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """See :class:`Update`."""
        # peft may store a host's tensor next to its factors, such as the embedding that it adapts.
        total: Rows = np.zeros((), np.float32)
        if name in self._whole:
            total = self._reader.rows(self._whole[name], start, stop) - self._base.rows(name, start, stop)
        if name not in self._factors:
            return total
        product, part = self._product(self._factors[name].down), self._factors[name].part
        if part is not None and part.expert is not None:
            product = product[part.expert, part.first_row :]
        return total + np.float32(self._scalings[name]) * product[start:stop].numpy()

    def _multiplied(self, down: str) -> torch.Tensor:
        """The product of two factors, by the name of the one, to the last bit what peft computes in a training."""
        import torch

        factors = next(factors for factors in self._factors.values() if factors.down == down)
        a, b = (torch.from_numpy(self._reader.rows(n, 0, self._reader.info(n).shape[0])) for n in (down, factors.up))
        if factors.part is None:
            return (b @ a).T if factors.of_embedding else b @ a
        a, b = a.reshape(factors.experts, -1, a.shape[1]), b.reshape(len(b), -1, factors.experts)
        return torch.einsum("o r e, e r i -> e o i", b, a)

    def scaled_factors(self, scale_of: Callable[[str], float]) -> dict[str, torch.Tensor]:
        """The factors by their names in peft's files; ``scale_of(tensor)`` is folded into those that start at zero."""
        tensors = {}
        for name, factors in self._factors.items():
            tensors[peft_key(factors.down)] = self._reader.read(factors.down)
            tensors[peft_key(factors.up)] = self._reader.read(factors.up) * scale_of(name)
        return tensors

    def _of_experts(
        self, factors: _Factors, fused: Mapping[str, tuple[tuple[int, ...], list[ExpertRows]]]
    ) -> dict[str, _Factors]:
        """The factors of a layer's experts, by the Base's names of what they change, recognised by their shapes."""
        if factors.up not in self._reader.tensors:
            return {weight_of(factors.module): factors}  # reported as half a pair
        down, up = (self._reader.info(name).shape for name in (factors.down, factors.up))
        for kind in ROWS_OF_FUSED:
            shape, parts = fused.get(canonical_key(f"{factors.module}.{kind}"), ((), []))
            if len(shape) == 3 and shape[1:] == (up[0], down[-1]) and down[0] == up[-1] and down[0] % shape[0] == 0:
                of = factors._replace(module=f"{factors.module}.{kind}", experts=shape[0])
                return {part.name: of._replace(part=part) for part in parts}
        raise GraftError(
            f"{self._folder} adapts {factors.module} by factors of the shapes {down} and {up}, to which the experts of "
            f"{self._base.folder} don't fit. Give the Base that the adapter was trained on, or merge the adapter into "
            "it (merge_and_unload) and give that."
        )

    def _parts_of(self, name: str) -> list[str]:
        """The adapter's names of everything that changes ``name``."""
        factors = [self._factors[name].down, self._factors[name].up] if name in self._factors else []
        return [*factors, *([self._whole[name]] if name in self._whole else [])]

    def _require_each_once(self, adapted: list[str]) -> None:
        """Every stored tensor has one part in the update."""
        changes = {tuple(self._parts_of(name)) for name in adapted}  # one pair of factors is all experts'
        used = Counter(stored for parts in changes for stored in parts)
        odd = sorted(name for name in {*self._reader.tensors, *used} if used[name] != 1)
        if odd:
            raise GraftError(
                f"{self._folder} should hold each factor of LoRA and each whole tensor once; it is not so for "
                f"{some_of(odd)}. Save the adapter again, or merge it first."
            )

    def _added(self, name: str) -> list[tuple[int, ...]]:
        """The shapes of what is added to a tensor: () for factors that don't fit each other."""
        stored = self._stored[name]
        added = stored[-1:] if name in self._whole else []
        if name in self._factors and self._factors[name].part is None:
            down, up = (s if len(s) == 2 else (0, 0) for s in stored[:2])
            product = (down[1], up[0]) if self._factors[name].of_embedding else (up[0], down[1])
            added.append(product if down[0] == up[1] > 0 else ())
        return added

    def _fits(self, name: str) -> bool:
        """Whether all that is added has the Base's shape."""
        return all(one == self._base.tensors[name].shape for one in self._added(name))

    def _shapes_of(self, name: str) -> str:
        return f"{self._base.tensors[name].shape} and {some_of(self._stored[name])}"

    def _problem(self, names: list[str]) -> GraftError:
        if unknown := [name for name in names if name not in self._base.tensors]:
            return GraftError(
                f"{self._folder} adapts {some_of(unknown)}, which {self._base.folder} doesn't have. Give the Base that "
                "the adapter was trained on, or merge the adapter into it (merge_and_unload) and give that."
            )
        both = {name: (self._base.tensors[name].shape, self._added(name)[-1]) for name in names}
        if all(layer_of(name) is None and _is_resized(*shapes) for name, shapes in both.items()):
            return _other_vocabulary(self._base.folder, self._folder, both)
        first = names[0]
        return GraftError(
            f"{self._folder} changes {first} {self._base.tensors[first].shape} by tensors of the shapes "
            f"{some_of(self._stored[first])}, which don't fit. Give the Base that the adapter was trained on."
        )

    def _scaling(self, factors: _Factors) -> float:
        from peft.utils.other import get_pattern_key

        config, rank = self._config, self._reader.info(factors.down).shape[0] // factors.experts
        try:
            # peft names a bare parameter by its whole path, a module without its weight.
            paths = (factors.module, weight_of(factors.module))
            keys = (get_pattern_key(config.alpha_pattern.keys(), path) for path in paths)
            alpha = next((config.alpha_pattern[key] for key in keys if key in config.alpha_pattern), config.lora_alpha)
            plain = not config.alpha_pattern and not config.rank_pattern
            if plain and leaf_of(factors.module) == GATE_UP and rank == 2 * config.r:
                alpha *= 2  # as peft does for all-linear, or for gate_proj and up_proj, in a mixture that it wraps
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


def _is_resized(base: tuple[int, ...], tuned: tuple[int, ...]) -> bool:
    """Whether two matrices differ in their numbers of rows alone."""
    return len(base) == len(tuned) == 2 and base[0] != tuned[0] and base[1] == tuned[1]


def _other_vocabulary(base: Path, tuned: Path, shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> GraftError:
    """The error for embeddings or heads that have other numbers of rows in the tuned model."""
    found = [f"{there[0]} rows of {name}, the Base {here[0]}" for name, (here, there) in shapes.items()]
    return GraftError(
        f"the tuned model has {some_of(found)}: its vocabulary was resized in {tuned}, so that no update of the "
        f"embedding or the output head of {base} can be taken from it. Leave them out of the selection: 'linear' "
        "grafts everything else that the layers have learned."
    )


def _empty(folder: Path, names: list[str]) -> GraftError:
    """The error for tensors without elements."""
    return GraftError(
        f"{folder} holds {len(names)} tensors without any elements ({some_of(names)}), which is what DeepSpeed ZeRO-3 "
        "saves if the shards are not gathered first. Gather them from the training's checkpoint with zero_to_fp32.py, "
        "or train again with stage3_gather_16bit_weights_on_model_save=true, and give the result."
    )


def zero_update(found: str) -> GraftError:
    """The error for an update in which nothing changes."""
    return GraftError(
        f"the update is zero ({found}), so nothing would change. Check that tuned is the trained model and not the "
        "Base (an adapter whose lora_B are all zero has learned nothing), that select chooses what was trained, and "
        "that the scale is not 0. With --allow-zero (allow_zero=True) it is no error."
    )


def open_update(base: TensorReader, tuned: Path, allow_pickle: bool = False, strict: bool = True) -> Update:
    """The update in the folder ``tuned``, by the Base's names: a whole checkpoint, or an adapter in peft's form.

    ``strict`` is that of :class:`FullUpdate`.
    """
    if (tuned / "adapter_config.json").is_file():
        return AdapterUpdate(base, tuned, strict=strict, allow_pickle=allow_pickle)
    return FullUpdate(base, open_model(tuned, allow_pickle).learned(), strict)
