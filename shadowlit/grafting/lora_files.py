"""The update of a LoRA adapter's files, read a few rows at a time."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import (
    ExpertRows,
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
    weight_of,
)
from shadowlit.checkpoint.reader import TensorReader, described, keeping
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.errors import GraftError, first_line
from shadowlit.grafting.factors import Factors
from shadowlit.grafting.update import FromBase, Rows, is_resized, other_vocabulary

if TYPE_CHECKING:
    from peft import LoraConfig

_MAX_SCALING = 1e6  # of an adapter; LoRA's usual ones are between 0.1 and 10


class _Factors(NamedTuple):
    """Names of a module and of its two factors, as peft's file has them."""

    module: str
    down: str
    up: str
    of_embedding: bool = False
    experts: int = 1  # number of experts whose factors these are, all in one
    part: ExpertRows | None = None  # of the experts' matrices that is updated


class LoraUpdate(FromBase):
    """The update of a LoRA or rsLoRA adapter in peft's form: ``scaling * B @ A``, and the modules it stores whole.

    LoRA: arXiv 2106.09685. rsLoRA: arXiv 2312.03732. Of experts peft holds one pair of factors for a layer and kind,
    A [experts * rank, inputs] by experts and B [outputs, rank * experts] by ranks; the files' experts may be fused or
    single.

    An adapter of the embedding of a tied model leaves its output head as it is, and the other way round, unless it was
    trained with ``ensure_weight_tying``.

    Args:
        base: Checkpoint of the model that was adapted.
        folder: Folder of the adapter.
        config: Its settings.
        reader: Reader of the factors, by the names in peft's files.
        strict: See :class:`shadowlit.grafting.update.FullUpdate`.

    Raises:
        GraftError: The adapter's files do not give its exact update, or it does not fit the Base.
    """

    def __init__(
        self,
        base: TensorReader,
        folder: Path,
        config: LoraConfig,
        reader: TensorReader,
        strict: bool = True,
    ) -> None:
        self._config: Any = config
        self._folder = folder
        self._reader = reader
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
        factors = next(factors for factors in self._factors.values() if factors.down == down)
        a, b = (torch.from_numpy(self._reader.rows(n, 0, self._reader.info(n).shape[0])) for n in (down, factors.up))
        if factors.part is None:
            return (b @ a).T if factors.of_embedding else b @ a
        a, b = a.reshape(factors.experts, -1, a.shape[1]), b.reshape(len(b), -1, factors.experts)
        return torch.einsum("o r e, e r i -> e o i", b, a)

    @property
    def factored(self) -> Mapping[str, Callable[[], Factors]]:
        """See :class:`Update`; experts' factors are not among them, nor what the adapter has also learned whole."""
        plain = (n for n, found in self._factors.items() if found.part is None and n not in self._learned_whole)
        return {name: partial(self._read_factors, name) for name in plain if name in self.shapes}

    @cached_property
    def _learned_whole(self) -> frozenset[str]:
        """What the adapter stores whole next to its factors with other values than the Base's own.

        peft stores an embedding that it adapts, with the Base's.
        """
        headers = described(self.shapes)

        def is_learned(name: str) -> bool:
            rows = partial(self._reader.rows, self._whole[name]), partial(self._base.rows, name)
            return any(np.any(rows[0](*window) != rows[1](*window)) for window in row_windows(headers[name]))

        return frozenset(
            name for name in self._whole.keys() & self._factors.keys() & self.shapes.keys() if is_learned(name)
        )

    def _read_factors(self, name: str) -> Factors:
        found = self._factors[name]
        down, up = (
            torch.from_numpy(self._reader.rows(one, 0, self._reader.info(one).shape[0])).float()
            for one in (found.down, found.up)
        )
        scaling = self._scalings[name]
        return Factors(down.T * scaling, up.T.contiguous()) if found.of_embedding else Factors(up * scaling, down)

    def scaled_factors(self, scale_of: Callable[[str], float]) -> dict[str, torch.Tensor]:
        """Return the factors by their names in peft's files; ``scale_of(tensor)`` is folded into those that start at
        zero.
        """
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
                f"{self._folder} should hold each factor of LoRA and each whole tensor exactly once, but doesn't for "
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
        if all(layer_of(name) is None and is_resized(*shapes) for name, shapes in both.items()):
            return other_vocabulary(self._base.folder, self._folder, both)
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
            problem = f"a scale of {scaling}"
        except (AttributeError, TypeError, OverflowError, re.error) as error:
            problem = first_line(error)
        raise GraftError(
            f"{self._folder / 'adapter_config.json'} has lora_alpha={reprlib.repr(config.lora_alpha)} and "
            f"alpha_pattern={reprlib.repr(config.alpha_pattern)}, by which {factors.module} gets {problem}. Save the "
            "adapter again."
        )
