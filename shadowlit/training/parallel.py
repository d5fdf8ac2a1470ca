"""Parallelism as one free function outside the model, and the local view of sharded parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from shadowlit.checkpoint.names import tower_of
from shadowlit.errors import ShadowlitError

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

    The order matters: a layer recomputes inside its compiled graph, and FSDP2's hooks are outside of both, so that one
    all-gather serves one layer.

    Args:
        model: A transformers causal language model, with or without peft's adapters, on the meta device when it
            is to be sharded.
        mesh: One-dimensional mesh of the data-parallel ranks; ``None`` leaves the parameters whole.
        activation_checkpointing: What every decoder layer recomputes in the backward pass: nothing (``False``,
            ``none``), everything (``True``, ``full``), or what :func:`_keeps` does not keep (``selective``).
        compile_layers: Whether to compile every decoder layer with ``torch.compile``.
        compute_dtype: Dtype of the all-gathered parameters under FSDP2; gradients are reduced in float32.
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


def data_parallel_mesh(strategy: Strategy, mesh: DeviceMesh | None) -> DeviceMesh | None:
    """Return the part of Lightning's mesh that parameters are sharded over; ``None`` for a strategy that keeps them
    whole.

    Raises:
        ShadowlitError: The mesh would split tensors.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    assert mesh is not None
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    if sizes["tensor_parallel"] != 1:
        raise ShadowlitError(
            f"ModelParallelStrategy has a mesh of {sizes}: it would split tensors, and shard nothing. Set its "
            f"data_parallel_size={strategy.world_size} and tensor_parallel_size=1."
        )
    return mesh["data_parallel"]


def compute_dtype_of(precision: str) -> torch.dtype:
    """Return the dtype that products are computed in, by ``trainer.precision``; a ShadowlitError for any other
    precision.
    """
    if precision == "32-true":
        return torch.float32
    if precision == "bf16-mixed":
        return torch.bfloat16
    raise ShadowlitError(
        f"trainer.precision is {precision!r}; expected '32-true' or 'bf16-mixed'. Trainable parameters are float32, "
        "since a small update does not survive in half precision ('bf16-true' would also round the rotary frequencies)."
    )


def _keeps(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of a decoder layer that are expensive for their memory; the others are recomputed.

    An element of a product costs as many multiplications as the inner dimension, one of attention as the sequence is
    long. Kept are attention and products whose result is no wider than their input: queries, keys, values, projections
    back to the hidden size, the first factors of adapters.
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

    Under FSDP2 the root unit holds embeddings, last norm and head, and gathers them for the model's forward pass only.
    Results with a gradient must be tensors or tuples of them, for the root unit to notice the backward pass.
    """
    return model.within_forward(function, *args) if isinstance(model, FSDPModule) else function(*args)  # type: ignore[operator]


def _call(function: Callable[..., _T], *args: Any) -> _T:
    return function(*args)


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Let FSDP2's ranks add the gradients of the next backward pass now, or keep them, whole and in float32.

    Sums over micro-batches and ranks may be taken in either order. Does nothing without FSDP2; Lightning handles DDP.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
