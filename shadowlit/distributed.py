"""Ranks and sharded parameters: what every rank holds, this rank's part of a tensor, and the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shadowlit.errors import ShadowlitError

_T = TypeVar("_T")


def rank() -> int:
    """Return the number of this process among the ranks; 0 without several."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def of_all_ranks(own: list[_T], group: dist.ProcessGroup | None = None) -> list[_T]:
    """Return what every rank has, one after the other, on all of them; a collective. ``own`` without several ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return own
    parts: list[list[_T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own, group=group)
    return [one for part in parts for one in part]


def on_all_ranks(function: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Call a function on every rank; a collective.

    Raises:
        ShadowlitError: That of the first rank that raised one; on every rank, so that none waits for another.
    """
    own: list[ShadowlitError] = []
    try:
        function()
    except ShadowlitError as error:
        own = [error]
    if found := of_all_ranks(own, group):
        raise found[0] from (own[0].__cause__ if own else None)


def on_first_rank(function: Callable[[], object]) -> None:
    """Call a function on rank 0 alone, such as a check of its disks; a collective, with errors as of the above."""
    on_all_ranks(lambda: function() if rank() == 0 else None)


def local(parameter: Tensor) -> Tensor:
    """Return the part of ``parameter`` on this rank, detached and sharing its storage; all of it when it
    isn't sharded.
    """
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Return where this rank's part of ``parameter`` lies in the whole tensor: one slice per dimension."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def whole(part: Tensor, like: Tensor) -> Tensor:
    """Gather ``part``, this rank's share of a tensor placed as ``like`` is; a collective over its mesh."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def place(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a ``tensor`` that every rank has whole, placed as ``like``; the inverse of :func:`whole`."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    part = tensor[local_slices(like)].to(like.device)
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def from_first_rank(read: Callable[[], Tensor] | None, dtype: torch.dtype, like: Tensor) -> Tensor:
    """This rank's part, placed as ``like``, of a whole tensor that rank 0 reads; ``None`` elsewhere. A collective."""
    device = local(like).device
    found = torch.empty(like.shape, dtype=dtype, device=device) if read is None else read().to(device)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(found, src=0)
    return found[local_slices(like)]


def reshard_all(model: nn.Module) -> None:
    """Make every FSDP unit hold its shards again.

    Must precede every read or write of local shards: after a forward pass the root unit keeps its parameters
    gathered, and what is written to them then is lost silently at the next reshard.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
