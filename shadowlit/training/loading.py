"""Loads a checkpoint folder for training: the model is built on the meta device and filled with each rank's rows."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from shadowlit.checkpoint.headers import TensorInfo, some_of
from shadowlit.checkpoint.layout import in_layout_of_module
from shadowlit.checkpoint.names import (
    TOWERS,
    canonical_name,
    count_towers,
    factor_of,
    is_adapter_name,
    is_of_experts,
    is_weight,
    tower_of,
)
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.distributed import local, local_slices
from shadowlit.errors import CheckpointError, GraftError, ShadowlitError, first_line
from shadowlit.grafting.adapter import adapted_layers, is_plain, require_untied, starts_from_weights, type_of
from shadowlit.grafting.parameters import host_of, host_parameters
from shadowlit.grafting.quantised import quantised_layers
from shadowlit.limits import bounded_matching
from shadowlit.pair.folders import is_image_text
from shadowlit.training.quantisation import quantise_layers

log = logging.getLogger(__name__)


def load_for_training(
    reader: TensorReader | None,
    config: PreTrainedConfig,
    *,
    adapter: PeftConfig | None,
    device: torch.device,
    mesh: DeviceMesh | None,
    parallelize: Callable[[nn.Module], None],
    attn_implementation: str = "sdpa",
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    towers: Sequence[str] = ("language",),
    frozen_dtype: torch.dtype | None = None,
    four_bits: bool = False,
) -> nn.Module:
    """Build the model of a checkpoint for training, with float32 masters of all trainable parameters.

    Full fine-tuning trains float32 copies of all weights, or of ``towers`` in a vision-language model, whose other
    towers stay frozen, without masters. With an adapter the weights stay frozen and the factors are float32. An adapter
    of experts, or of other bare parameters, makes the weights float32 too, since peft adds its product to them and
    bfloat16 would lose most of it. No rank ever holds the whole model: it is sharded on the meta device and filled by
    rows from the safetensors files. Adapters whose start is peft's own (all except plain LoRA) are an exception: every
    process holds the whole model in float32 on its CPU first.

    Args:
        reader: Reader of the Base's checkpoint, in the shape of its Instruct; None for a model without values, on the
            meta device, which completes the adapter's settings.
        config: The model's configuration.
        adapter: Settings of an adapter of peft's; ``None`` for full fine-tuning.
        device: Device of the parameters; ``meta`` for a model without weights, of which nothing is read but headers.
        mesh: Data-parallel mesh of FSDP2, or ``None``.
        parallelize: Function that is applied between building and filling; see
            :func:`shadowlit.training.parallel.parallelize`.
        attn_implementation: Name of the attention kernel in transformers.
        experts_implementation: Name of the implementation of experts in transformers; ``None`` for its default.
        trust_remote_code: Whether to run modelling code that comes with the folder.
        seed: Seed of the adapter's initialisation, which is the same on any number of ranks.
        towers: Trainable parts, see ``train_towers`` of :class:`shadowlit.training.module.ShadowModule`.
        frozen_dtype: Dtype of what stays frozen, under an adapter or in towers; ``None`` for that of the files.
        four_bits: Store the frozen weights of linear layers in 4 bits; see
            :class:`shadowlit.grafting.quantised.FourBitLinear`.

    Raises:
        ShadowlitError: No parameter belongs to one of ``towers``.
        CheckpointError: The checkpoint lacks a tensor that the model needs.
        GraftError: The adapter is not plain LoRA and has fused experts to adapt; it can't be sharded; or it changes one
            side of a tied embedding.
    """
    options = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    stored = torch.float32 if reader is None else stored_dtype(reader.tensors)
    by_peft = adapter is not None and not is_plain(adapter)
    without_weights = device.type == "meta"
    # Peft takes starts and norms from the weights, in their precision, and may replace them by a residual.
    dtype = torch.float32 if adapter is None or by_peft else frozen_dtype or stored
    auto = AutoModelForImageTextToText if is_image_text(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, **options
        )
    if four_bits:
        quantise_layers(model)
    if getattr(config.get_text_config(), "output_router_logits", False):
        log.info(
            "config.json asks for the routers' auxiliary loss; it is not part of the loss here, see "
            "docs/reference/moe.md"
        )
    frozen = _outside(model, towers)
    if adapter is None:
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(frozen_dtype or stored)
    elif frozen and getattr(adapter, "exclude_modules", None) is None:
        # Names of targets such as q_proj, and all-linear, would match layers of a vision tower too.
        adapter.exclude_modules = _modules_of(model, frozen)  # type: ignore[attr-defined]
    if adapter is not None:
        _name_linear(model, adapter)
        _try_patterns(model, adapter)
    if adapter is not None and without_weights and starts_from_weights(adapter):
        adapter = copy.copy(adapter)  # whose factors have the same shapes
        adapter.init_lora_weights = True  # type: ignore[attr-defined]
    elif adapter is not None and by_peft and reader is not None and not without_weights:
        _require_modules(model, adapter)
        if mesh is not None:
            require_unsharded(adapter)
        _fill(model, reader, torch.device("cpu"), seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(model, adapter)
        if not starts_from_weights(adapter):
            for name, parameter in model.named_parameters():
                if not (parameter.requires_grad or is_adapter_name(name)):
                    parameter.data = parameter.data.to(frozen_dtype or stored)
        require_untied(model)
        parallelize(model)
        return model.to(device).train()
    if adapter is not None:
        with torch.device("meta"):
            model = _adapted(model, adapter)
            if any(isinstance(module, ParamWrapper) for module in model.modules()):
                model = model.float()
        require_untied(model)
    if reader is None:
        return model
    parallelize(model)
    if not without_weights:
        _fill(model, reader, device, seed, adapter)
    return model.train()


@torch.no_grad()
def _fill(
    model: nn.Module,
    reader: TensorReader,
    device: torch.device,
    seed: int,
    adapter: PeftConfig | None = None,
) -> None:
    host = host_of(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in host_parameters(model).items()}
    reader = in_layout_of_module(reader, shapes)
    model.to_empty(device=device)
    ranks = {
        id(factor.weight): layer.r[name]
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for name, factor in layer.lora_A.items()
    }
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        host.tie_weights()  # to_empty gives every module its own storage; FSDP2 ties the weights again
    quantised = quantised_layers(model)
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        if is_adapter_name(name):
            assert isinstance(adapter, LoraConfig)
            start = _adapter_start(name, parameter, adapter, seed, ranks.get(id(parameter), 1))
            local(parameter).copy_(start[local_slices(parameter)])
            continue
        stored_name = canonical_name(name)
        if stored_name not in reader.tensors:
            raise CheckpointError(
                f"{reader.folder} has no tensor {stored_name!r}, which the model of its config.json needs. "
                "Expected one tensor per parameter. Download the checkpoint again, or convert it with transformers."
            )
        if stored_name in quantised:
            quantised[stored_name].quantise(reader.read(stored_name))
        else:
            local(parameter).copy_(reader.read_slice(stored_name, local_slices(parameter)))
    # Buffers that no checkpoint holds (rotary frequencies, embedding scales). transformers' own initialisation skips
    # every parameter marked above.
    host.initialize_weights()


def _name_linear(model: nn.Module, adapter: PeftConfig) -> None:
    """Replace all-linear by the ends of names if some layers are chosen: peft ignores the choice for whole names."""
    layers = getattr(adapter, "layers_to_transform", None)
    if layers in (None, []) or getattr(adapter, "target_modules", None) != "all-linear":
        return
    if any(is_of_experts(name) and p.dim() == 3 for name, p in model.named_parameters()):
        raise GraftError(
            f"model.adapter.layers_to_transform is {layers} without target_modules, but peft can't choose layers of "
            "experts, which are bare parameters. Name the modules, e.g. target_modules: [q_proj, k_proj, v_proj, "
            "o_proj]."
        )
    head = cast(Any, model).get_output_embeddings()
    names = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head]
    adapter.target_modules = {name.rpartition(".")[2] for name in names}  # type: ignore[attr-defined]


def require_fitting(architecture: Mapping[str, Any]) -> nn.Module:
    """Return the adapted model without weights, on the meta device; nothing is read, and no setting changes.

    Args:
        architecture: Arguments of :func:`load_for_training` that describe the model.

    Raises:
        GraftError: The adapter doesn't fit the model.
    """
    options = {"adapter": copy.deepcopy(architecture["adapter"]), "parallelize": lambda _: None, "four_bits": False}
    with isolate_rng(include_cuda=False):
        model = load_for_training(None, device=torch.device("meta"), mesh=None, **{**architecture, **options})
        adapted_layers(model)
        return model


def _adapted(model: nn.Module, adapter: PeftConfig) -> nn.Module:
    """Peft's model around one on the meta device; a GraftError in place of whatever peft raises."""
    names = [name for name, _ in model.named_modules()]
    for key in getattr(adapter, "modules_to_save", None) or ():
        if not any(name.endswith(key) for name in names):
            ends = sorted({end for name in names if not (end := name.rpartition(".")[2]).isdigit()} - {""})
            raise GraftError(
                f"model.adapter.modules_to_save has {key!r}, which is not a module of {type(model).__name__}. Expected "
                f"names such as {some_of(ends, 3)}. Correct or remove it."
            )
    for setting in ("trainable_token_indices", "token_indices"):
        if not (chosen := getattr(adapter, setting, None)):
            continue
        rows = cast(Any, model).get_input_embeddings().weight.shape[0]
        tokens = [token for each in (chosen.values() if isinstance(chosen, Mapping) else [chosen]) for token in each]
        if outside := [token for token in tokens if not 0 <= token < rows]:
            raise GraftError(
                f"model.adapter.{setting} has {some_of(outside, 3)}; expected numbers from 0 to {rows - 1}, which are "
                "the rows of the embedding. Correct or remove them."
            )
    try:
        return get_peft_model(model, adapter, low_cpu_mem_usage=True)
    except ShadowlitError:
        raise
    except Exception as error:  # peft's types check their settings in their own ways, or not at all
        raise GraftError(
            f"model.adapter, a {type(adapter).__name__}, doesn't fit {type(model).__name__} ({first_line(error)}). "
            "Correct its options: target_modules names modules of the model, and ranks and sizes of blocks fit their "
            "shapes."
        ) from error


def _try_patterns(model: nn.Module, adapter: PeftConfig) -> None:
    """Match the adapter's regular expressions as peft will, which has no limit of time; peft reports wrong ones."""
    wholes = {name: getattr(adapter, name, None) for name in ("target_modules", "exclude_modules")}
    patterns = [(name, value) for name, value in wholes.items() if isinstance(value, str)]
    patterns += [(name, key) for name in ("rank_pattern", "alpha_pattern") for key in getattr(adapter, name, {}) or {}]
    for name, pattern in patterns:
        with contextlib.suppress(re.error), bounded_matching(f"model.adapter.{name} has {pattern!r}"):
            for module, _ in model.named_modules():
                re.fullmatch(pattern if name in wholes else rf"(.*\.)?({pattern})", module)


def require_unsharded(adapter: PeftConfig | None) -> None:
    """Raise a GraftError for an adapter that FSDP2 can't shard."""
    if adapter is not None and type_of(adapter) == "VBLORA":
        raise GraftError(
            "model.adapter is a VBLoRAConfig, whose layers share one bank of vectors, which FSDP2 can't shard with "
            "each of them. Use one device or DDP, or another adapter."
        )


def _require_modules(model: nn.Module, adapter: PeftConfig) -> None:
    """Raise for an adapter of modules alone that would adapt bare parameters."""
    experts = any(is_of_experts(name) and p.dim() == 3 for name, p in model.named_parameters())
    if getattr(adapter, "target_parameters", None) or (
        experts and getattr(adapter, "target_modules", None) == "all-linear"
    ):
        raise GraftError(
            f"adapter with {_kind(adapter)} adapts modules, but experts are bare parameters. Use plain LoRA "
            "(init_lora_weights=true), or set adapter.target_modules to modules other than experts, e.g. [q_proj, "
            "k_proj, v_proj, o_proj]."
        )


def _kind(adapter: PeftConfig) -> str:
    start = getattr(adapter, "init_lora_weights", True)
    return f"init_lora_weights={start!r}" if starts_from_weights(adapter) else f"peft_type={type_of(adapter)}"


def _outside(model: nn.Module, towers: Sequence[str]) -> frozenset[str]:
    """Names of the parameters that stay frozen, since they belong to none of ``towers``."""
    names = [name for name, _ in model.named_parameters()]
    trained: set[str] = set()
    for part in towers:
        try:
            with bounded_matching(f"model.train_towers has {part!r}"):
                chosen = {n for n in names if (tower_of(n) == part if part in TOWERS else re.search(part, n))}
        except re.error as error:
            raise ShadowlitError(
                f"model.train_towers has {part!r}, which is not a regular expression ({error}). Expected "
                f"{', '.join(TOWERS)}, or a pattern such as 'visual.blocks.31'."
            ) from None
        if not chosen:
            found = ", ".join(f"{tower} ({count})" for tower, count in count_towers(names).items())
            raise ShadowlitError(
                f"model.train_towers has {part!r}, which matches none of the {len(names)} parameters of "
                f"{type(model).__name__}; its towers are {found}. Name these, or a pattern that matches."
            )
        trained |= chosen
    if not trained:
        raise ShadowlitError("model.train_towers is empty, so nothing would be trained. Name a tower, e.g. [language].")
    return frozenset(names) - trained


def _modules_of(model: nn.Module, parameters: frozenset[str]) -> str:
    """A pattern for the outermost modules all of whose parameters are among these."""
    owned = {
        prefix
        for prefix, module in model.named_modules()
        if (names := [f"{prefix}.{name}" for name, _ in module.named_parameters()]) and parameters.issuperset(names)
    }
    outermost = sorted(prefix for prefix in owned if prefix.rpartition(".")[0] not in owned)
    return rf"({'|'.join(map(re.escape, outermost))})(\..*)?"


def _adapter_start(name: str, parameter: Tensor, adapter: LoraConfig, seed: int, rank: int) -> Tensor:
    """The whole initial value of a LoRA factor as in peft, from its own generator: the same on any number of ranks."""
    digest = hashlib.sha256(f"{seed}:{canonical_name(name)}".encode()).digest()
    # On the CPU, so that all devices draw the same: Lightning configures the model in the context of its device.
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    start = torch.zeros(parameter.shape, device="cpu")
    factor = factor_of(name)
    if factor == "A" and adapter.init_lora_weights == "gaussian":
        start.normal_(std=1 / rank, generator=generator)
    elif factor == "A" or (factor == "B" and is_weight(name) and not adapter.init_lora_weights):
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    elif factor == "embedding_B":
        start.normal_(generator=generator)
    return start


def stored_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the dtype of most elements of a checkpoint."""
    sizes: Counter[torch.dtype] = Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.num_elements
    return sizes.most_common(1)[0][0]
