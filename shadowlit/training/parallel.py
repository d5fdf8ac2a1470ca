"""Parallelism as one free function outside the model, and the local view of sharded parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from shadowlit.checkpoint.names import tower_of

_T = TypeVar("_T")


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    *,
    activation_checkpointing: bool | Literal["none", "full", "selective"] = False,
    compile_layers: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Apply activation checkpointing, then compilation, then sharding, in place.

    The order matters: a layer recomputes what it checkpointed inside its compiled graph, and FSDP2's hooks stand
    outside of both, so that one all-gather serves one layer.

    Args:
        model: a transformers causal language model, with or without peft's adapters, on the meta device when it
            is to be sharded.
        mesh: a one-dimensional mesh over the data-parallel ranks; ``None`` leaves the parameters whole.
        activation_checkpointing: what every decoder layer computes again in the backward pass instead of storing it:
            nothing (``False``, ``none``), all (``True``, ``full``), or what :func:`_keeps` leaves (``selective``).
        compile_layers: compile every decoder layer with ``torch.compile``.
        compute_dtype: dtype of the all-gathered parameters under FSDP2; gradients are reduced in float32.
    """
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = [module for _, module in named]
    if activation_checkpointing not in (False, "none"):
        # transformers' own hooks; the non-reentrant form works with frozen inputs, as LoRA has them.
        options: dict[str, Any] = {"use_reentrant": False}
        if activation_checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps)
        model.activation_checkpointing_enable(options)  # type: ignore[operator]
    if compile_layers:
        for name, layer in named:
            if tower_of(name) == "language":  # a vision tower's shapes change with every batch of images
                layer.compile()
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.within_forward = _call  # type: ignore[assignment]
    register_fsdp_forward_method(model, "within_forward")


def _keeps(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results of a decoder layer are kept: those that take long to compute for the memory that they take.

    An element of a product costs as many multiplications as its inner dimension has, one of attention as the sequence
    is long. So attention is kept, and products whose result is no wider than what went in: queries, keys, values,
    the projections back to the hidden size, the lower half of an adapter. Computed again are the products into the
    wide middle of the MLP, the upper halves of adapters, and whatever works on single elements.
    """
    if operation in _PRODUCTS:
        matrix = args[_PRODUCTS[operation]]
        keep = matrix.shape[-1] <= matrix.shape[-2]
    else:
        keep = "attention" in str(operation) or "flash_attn" in str(operation)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# Products of matrices, and which argument is the right one, [inner, outer].
_PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}


def within_forward(model: nn.Module, function: Callable[..., _T], *args: Any) -> _T:
    """Call ``function(*args)``, which uses parts of ``model``, as if it were the model's forward pass.

    Under FSDP2 the root unit holds embeddings, last norm and head, and gathers them for the model's forward pass
    only: its parts called by themselves would find shards. What has a gradient must be returned as a tensor, or in a
    tuple, for the root unit to notice the backward pass.
    """
    return model.within_forward(function, *args) if isinstance(model, FSDPModule) else function(*args)  # type: ignore[operator]


def _call(function: Callable[..., _T], *args: Any) -> _T:
    return function(*args)


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Let FSDP2's ranks add the gradients of the next backward pass, or keep them, whole and in float32, for later.

    Sums over micro-batches and over ranks may be taken in either order. Without FSDP2 nothing is done; DDP is told by
    Lightning.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
