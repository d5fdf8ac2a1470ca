"""Where a training starts that does not start at the Base: at a tuned Base, or with an adapter of an earlier run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import in_layout_of_module
from shadowlit.checkpoint.names import adapter_key, canonical_name, is_adapter_name, saved_name
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.delta.checkpoints import Start, open_start
from shadowlit.distributed import local, local_slices
from shadowlit.errors import GraftError
from shadowlit.grafting.adapter import starts_from_weights, type_of
from shadowlit.pair.pair import ModelPair

# Settings of peft's configs that change neither what a stored adapter computes nor which tensors it has; the tensors'
# names and shapes are compared by themselves.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "init_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "module_dropout",
    "modules_to_save", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type",
})  # fmt: skip


class StartFrom:
    """What ``model.start_from`` names: a tuned Base or an adapter; without a name the Base, at which nothing is done.

    Args:
        source: ``model.start_from``; see :func:`shadowlit.delta.checkpoints.open_start`.
    """

    def __init__(self, source: str | None) -> None:
        self.source = source
        self._start: Start | None = None
        self._kept: dict[str, Tensor] = {}  # by name, what an adapter was at the start

    @property
    def weights(self) -> TensorReader | None:
        """The tuned Base's weights, if training starts there."""
        return self._start.reader if self._start is not None and self._start.adapter is None else None

    def fingerprints(self) -> dict[str, str]:
        """``{"start": ...}`` of these weights, on which the update depends."""
        return {} if self.weights is None else {"start": self.weights.fingerprint()}

    def open(
        self, pair: ModelPair, adapter: PeftConfig | None, model: nn.Module | None, in_four_bits: bool, compares: bool
    ) -> None:
        """Open the source, from its headers alone.

        Args:
            pair: The pair that is trained.
            adapter: ``model.adapter``.
            model: The model with this adapter and without weights; None for full tuning.
            in_four_bits: Whether the frozen weights are stored in 4 bits.
            compares: Whether the objective compares every batch with the weights at the start.

        Raises:
            PairError: There is none, or it is of another architecture.
            GraftError: It does not fit the pair or these settings.
        """
        if self.source is None:
            return
        self._start = open_start(self.source, pair)
        if self._start.adapter is not None:
            _require_same_adapter(self._start, adapter, model)
        elif in_four_bits:
            raise GraftError(
                f"model.start_from, {self.source}, holds whole weights, but with model.quantization the update is that "
                "of the adapter alone, without the change of the weights in 4 bits. Start from an adapter, or set "
                "model.quantization=null."
            )
        elif compares and adapter is None:
            raise GraftError(
                "model.objective compares every batch with the weights at the start, which are those of "
                "model.start_from and would be a third copy of all weights. Compare with the Instruct (kl_to), train "
                "an adapter (model.adapter), or leave the distance out (kl_weight=0)."
            )

    def load(self, model: nn.Module, keep: bool) -> None:
        """Load a stored adapter into the model's, each rank its part; ``keep`` what an adapter is at the start."""
        if self._start is not None and self._start.adapter is not None:
            _load_adapter(model, self._start.reader)
        if self._start is not None and keep:
            self._kept = {name: local(p).clone() for name, p in model.named_parameters() if p.requires_grad}

    def values(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Return the trained parameters of a model and this rank's part of each at the start; None if that
        is the Base.
        """
        if self._start is None:
            return None
        if not self._kept:
            return _values_of(model, self._start.reader)
        return ((p, self._kept[name]) for name, p in model.named_parameters() if name in self._kept)


def _require_same_adapter(start: Start, adapter: PeftConfig | None, model: nn.Module | None) -> None:
    """Raise unless the adapter that is trained, in ``model``, has the settings and the tensors of the stored one."""
    assert start.adapter is not None
    remedy = (
        "Set model.adapter to the settings of the stored adapter; for another adapter on top, merge it into the Base "
        "('shadowlit graft BASE ADAPTER BASE MERGED --select all --dtype float32') and set "
        "model.start_from=MERGED."
    )
    stored = start.adapter.to_dict()
    if adapter is None or model is None:
        rank = f"{{r: {stored['r']}}}" if "r" in stored else type_of(start.adapter)
        raise GraftError(f"model.start_from holds an adapter ({rank}), but model.adapter is null. {remedy}")
    if type_of(adapter) != type_of(start.adapter) or starts_from_weights(adapter):
        kinds = type_of(start.adapter), f"{type_of(adapter)} (init_lora_weights={_start(adapter)!r})"
        raise GraftError(f"model.start_from holds a {kinds[0]} adapter, but model.adapter is {kinds[1]}. {remedy}")
    wanted = adapter.to_dict()
    differing = [name for name in wanted.keys() & stored.keys() - _HARMLESS if wanted[name] != stored[name]]
    problems = [f"{name} is {stored[name]!r}, not {wanted[name]!r}" for name in sorted(differing)]
    found = {adapter_key(name): info.shape for name, info in start.reader.tensors.items()}
    expected = {_key_of(name): tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    buffers = {_key_of(name) for name, _ in _buffers(model)}
    problems += [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not trained" for name in found if name not in expected and name not in buffers]
    problems += [
        f"{name} is {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
    ]
    if problems:
        raise GraftError(f"model.start_from holds another adapter than model.adapter: {some_of(problems, 3)}. {remedy}")


def _start(adapter: PeftConfig) -> Any:
    return getattr(adapter, "init_lora_weights", None)


def _buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What peft stores with an adapter without training it, as VeRA's projections."""
    return [one for one in model.named_buffers(remove_duplicate=False) if is_adapter_name(one[0])]


def _key_of(name: str) -> str:
    """That of a tensor of a module."""
    return adapter_key(saved_name(f"model.{name}"))


@torch.no_grad()
def _load_adapter(model: nn.Module, stored: TensorReader) -> None:
    """Load a stored adapter into the adapter of ``model``, of which every rank reads its rows."""
    names = {adapter_key(name): name for name in stored.tensors}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, part in [*trained, *_buffers(model)]:
        if (key := _key_of(name)) in names:
            local(part).copy_(stored.read_slice(names[key], local_slices(part)))


def _values_of(model: nn.Module, weights: TensorReader) -> Iterator[tuple[Tensor, Tensor]]:
    """The trained parameters of ``model``, and this rank's part of each in a checkpoint of all weights."""
    trained = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    reader = in_layout_of_module(weights, {name: tuple(p.shape) for name, p in trained.items()})
    for name, parameter in trained.items():
        yield parameter, reader.read_slice(name, local_slices(parameter))
