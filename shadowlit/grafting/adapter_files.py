"""The update of an adapter's files in peft's form."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import canonical_keys, head_and_embedding, repeats_embedding
from shadowlit.checkpoint.names import (
    EMBEDDING_KEYS,
    adapted_module,
    bias_of,
    canonical_key,
    host_key,
    is_adapter_name,
    is_linear_factor,
    module_of,
    peft_key,
    repeated_keys,
    weight_of,
)
from shadowlit.checkpoint.pickled import open_checkpoint
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import GraftError, first_line
from shadowlit.grafting.adapter import (
    AdaptedLayer,
    adapted_layers,
    dependence,
    is_plain,
    require_graftable,
    starts_from_weights,
)
from shadowlit.grafting.factors import Factors
from shadowlit.grafting.lora_files import LoraUpdate
from shadowlit.grafting.update import UNGATHERED, FromBase, Rows, Update, no_elements

_Value = TypeVar("_Value")
_TOKENS = "trainable_tokens_delta"


def adapter_update(
    base: TensorReader,
    folder: Path,
    config: PeftConfig | None = None,
    reader: TensorReader | None = None,
    strict: bool = True,
    allow_pickle: bool = False,
) -> Update:
    """Return the update of an adapter in peft's form; LoRA's is read by rows, any other is merged layer by layer.

    Args:
        base: Checkpoint of the model that was adapted.
        folder: Folder of the adapter.
        config: Its settings, in place of ``adapter_config.json``.
        reader: Reader of its tensors, by the names in peft's files, in place of ``adapter_model.safetensors``.
        strict: See :class:`shadowlit.grafting.update.FullUpdate`.
        allow_pickle: Also read ``adapter_model.bin``.

    Raises:
        GraftError: The adapter's files do not give its exact update, or it does not fit the Base.
    """
    config = config or read_adapter_config(folder)
    require_graftable(config)
    if starts_from_weights(config):
        raise GraftError(
            f"{folder} holds an adapter with {dependence(config)}, whose file lacks the "
            "residual that it left in the weights. Convert it to LoRA when saving (peft's "
            "path_initial_model_for_weight_conversion), or save the merged model."
        )
    if getattr(config, "fan_in_fan_out", False):
        raise GraftError(f"{folder} adapts transposed layers (fan_in_fan_out=true). Merge it first.")
    reader = reader or open_checkpoint(folder, allow_pickle, adapter=True)
    reader.computed = repeated_keys(reader.tensors)
    reader = reader.learned()
    if empty := [name for name, info in reader.tensors.items() if info.shape == UNGATHERED]:
        raise no_elements(folder, empty)
    by_rows = is_plain(config, start=False) and not getattr(config, "lora_bias", False)
    if by_rows and isinstance(config, LoraConfig):
        return LoraUpdate(base, folder, config, reader, strict)
    return MergedUpdate(base, folder, config, reader, strict)


def read_adapter_config(folder: Path) -> PeftConfig:
    """Return the settings of the adapter in a folder; raise a GraftError if peft can't read them."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # of json, of peft's many configs: many types, one remedy
        raise GraftError(
            f"{folder / 'adapter_config.json'} is not an adapter's config that peft reads ({first_line(error)}). "
            "Save or download the adapter again."
        ) from error


class MergedUpdate(FromBase):
    """The update of an adapter of any type that peft merges, one layer of the Base in memory at a time.

    peft puts the adapter on layers of the Base's shapes whose weights are never touched, and merges it into the Base's
    own as they are asked for. Arguments and errors are those of :func:`adapter_update`.
    """

    def __init__(
        self, base: TensorReader, folder: Path, config: PeftConfig, reader: TensorReader, strict: bool = True
    ) -> None:
        self._base, self._folder, self._reader = base, folder, reader
        names = canonical_keys(base)
        own = [stored for stored in reader.tensors if is_adapter_name(stored)]
        stored_whole = {host_key(stored): stored for stored in reader.tensors if not is_adapter_name(stored)}
        self._whole = {names.get(canonical_key(name), name): stored for name, stored in stored_whole.items()}
        hosts = {module: weight_of(module) for module in map(adapted_module, own) if module}
        modules = {module: names.get(canonical_key(host), host) for module, host in hosts.items()}
        self._modules = modules
        adapted = {*modules.values(), *self._whole}
        self._set_without({name: "only in the adapter" for name in adapted if name not in base.tensors}, strict=True)
        tokens = {module for stored in own if _TOKENS in stored and (module := adapted_module(stored))}
        self._require_untied(adapted, {modules[module] for module in tokens})
        try:
            self._layers = self._built(config, modules, own, tokens)
        except GraftError:
            raise
        except Exception as error:  # of peft's many types
            raise GraftError(
                f"{folder} does not fit {base.folder} ({first_line(error)}). Give the Base that the adapter was "
                "trained on, or merge the adapter into it (merge_and_unload) and give that."
            ) from error
        shapes = {name: (base.tensors[name].shape, reader.info(stored).shape) for name, stored in self._whole.items()}
        wrong = {name: f"{one} and {other}" for name, (one, other) in shapes.items() if one != other}
        self._set_without(wrong, strict)
        found = sorted({*self._layers, *self._whole} - wrong.keys())
        self.shapes: Mapping[str, tuple[int, ...]] = {name: base.tensors[name].shape for name in found}
        self._update = lru_cache(maxsize=2)(self._merged)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """See :class:`shadowlit.grafting.update.Update`."""
        total: Rows = np.zeros((), np.float32)
        if name in self._whole:
            total = self._reader.rows(self._whole[name], start, stop) - self._base.rows(name, start, stop)
        return total + self._update(name)[start:stop].numpy() if name in self._layers else total

    @cached_property
    def factored(self) -> Mapping[str, Callable[[], Factors]]:
        """See :class:`shadowlit.grafting.update.Update`: LoRA's next to trained biases or tokens."""
        plain = {name: layer for name, layer in self._layers.items() if name in self.shapes and name not in self._whole}
        products = {name: layer.factors(_itself) for name, layer in plain.items()}
        return {name: partial(_itself, product) for name, product in products.items() if product is not None}

    def require_weights(self, names: Iterable[str]) -> None:
        """See :class:`shadowlit.grafting.update.Update`; the Base's tensors are checked."""
        names = list(names)
        super().require_weights(names)
        self._reader.require_weights(self._whole[name] for name in names if name in self._whole)

    def scaled_factors(self, scale_of: Callable[[str], float]) -> dict[str, Tensor]:
        """Return the adapter's tensors by their names in peft's files, with ``scale_of(tensor)`` folded into the
        update.
        """
        state = {peft_key(stored): self._reader.read(stored) for stored in self._reader.tensors}
        hosts = {key: self._modules.get(adapted_module(key) or "") for key in state if is_linear_factor(key)}
        return {key: t * scale_of(host) if (host := hosts.get(key)) else t for key, t in state.items()}

    def _problem(self, names: list[str]) -> GraftError:
        found = "; ".join(f"{name}: {self.without[name]}" for name in names[:3])
        return GraftError(
            f"{self._folder} adapts {some_of(names)}, which {self._base.folder} doesn't have in this shape ({found}). "
            "Give the Base that the adapter was trained on, or merge the adapter into it (merge_and_unload) and give "
            "that."
        )

    def _require_untied(self, adapted: set[str], tokens: set[str]) -> None:
        """Raise if one side of a tied embedding is adapted; trained tokens are those of both."""
        head, embedding = head_and_embedding(self._base.tensors)
        if head is not None and not repeats_embedding(self._base):
            return
        self.tied = bool(tokens)
        if sides := {name for name in (head, embedding) if name in adapted} - tokens:
            raise GraftError(
                f"{self._folder} changes {some_of(sorted(map(str, sides)))}, but in {self._base.folder} embedding and "
                "output head are one tensor, and no Instruct can hold an update of only one of them. Leave them out."
            )

    def _built(
        self, config: PeftConfig, modules: Mapping[str, str], own: list[str], tokens: set[str]
    ) -> dict[str, AdaptedLayer]:
        """The adapted layers, by the Base's names of the tensors that they change."""
        config, root = copy.deepcopy(config), nn.Module()
        settings: dict[str, Any] = dict.fromkeys(_OF_OTHER_MODULES)
        aside = tokens if getattr(config, "trainable_token_indices", None) else set()
        settings["target_modules"] = [module for module in modules if module not in aside]
        if indices := getattr(config, "trainable_token_indices", None):
            flat = isinstance(indices, list)
            settings["trainable_token_indices"] = {m: indices if flat else next(iter(indices.values())) for m in tokens}
        for name, value in settings.items():
            if hasattr(config, name):
                setattr(config, name, value)
        self._names: dict[int, str] = {}  # the Base's, by the parameter that stands for it
        for module, name in modules.items():
            parent, _, leaf = module.rpartition(".")
            _within(root, parent).add_module(leaf, self._empty_layer(name))
        for parameter_name, parameter in root.named_parameters():
            module, _, leaf = parameter_name.rpartition(".")
            self._names[id(parameter)] = modules[module] if leaf == "weight" else bias_of(module_of(modules[module]))
        with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):
            model = get_peft_model(root, config)
            loaded: Any = set_peft_model_state_dict(
                model, {peft_key(stored): self._reader.read(stored) for stored in own}
            )
        missing = [name for name, p in model.named_parameters() if p.requires_grad and name in loaded.missing_keys]
        if missing or loaded.unexpected_keys:
            raise ValueError(
                f"its file lacks {some_of(missing)}, and has {some_of(loaded.unexpected_keys)} unexpectedly"
            )
        layers = adapted_layers(model).values()
        return {self._names[id(getattr(layer.layer.get_base_layer(), layer.parameter))]: layer for layer in layers}

    def _empty_layer(self, name: str) -> nn.Module:
        """A layer with the shape of the Base's tensor ``name`` and untouched memory."""
        shape, bias = self._base.tensors[name].shape, bias_of(module_of(name)) in self._base.tensors
        if len(shape) > 2:
            raise GraftError(f"{self._folder} adapts {name} {shape}, which is not a matrix. Merge it first.")
        with torch.device("meta"):
            if len(shape) == 1:
                layer: nn.Module = nn.LayerNorm(shape, bias=bias)
            elif canonical_key(name) in EMBEDDING_KEYS:
                layer = nn.Embedding(shape[0], shape[1])
            else:
                layer = nn.Linear(shape[1], shape[0], bias=bias)
        return layer.to_empty(device="cpu")

    def _merged(self, name: str) -> Tensor:
        layer = self._layers[name]
        host = getattr(layer.layer.get_base_layer(), layer.parameter)
        with torch.no_grad():
            return layer.delta_weight(host, self._values)

    def _values(self, parameter: Tensor) -> Tensor:
        name = self._names.get(id(parameter))
        return parameter.detach() if name is None else self._base.read(name)


# Settings by which peft chooses modules, what it trains besides the adapter, and what it asks of the whole model: the
# files tell the former, and only layers are built.
_OF_OTHER_MODULES = (
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters",
    "trainable_token_indices", "base_model_name_or_path", "task_type",
)  # fmt: skip


def _itself(value: _Value) -> _Value:
    return value


def _within(root: nn.Module, path: str) -> nn.Module:
    """The module at a path below ``root``, made where it is missing."""
    for part in filter(None, path.split(".")):
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root
