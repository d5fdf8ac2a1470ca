"""Linear layers whose frozen weights are stored in 4 bits (QLoRA), and whole weights that replace them for a graft."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shadowlit.checkpoint.names import canonical_name, weight_of
from shadowlit.distributed import local, local_slices, whole


def four_bits(weight: Tensor) -> Tensor:
    """Return what is left of a weight ``[out, in]`` that is stored in 4 bits, in its own dtype."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*_quantise(weight))


def _quantise(weight: Tensor) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")


class FourBitLinear(nn.Linear):
    """A linear layer with a frozen weight in NF4 with double quantisation (QLoRA, arXiv 2305.14314).

    The weight ``[out, in]`` is stored as indices of 4 bits into a table of normal quantiles, with a scale of 8 bits for
    each 64 of them and a float32 one for each 256 scales. It is dequantised in every forward and backward pass, and the
    product is computed in the dtype of the input, or that of autocast. Under FSDP2 the indices are sharded by rows; the
    scales, 0.13 bits per weight, are not. ``linear`` has the shape and the bias; its weight is not read.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.dtype = linear.weight.dtype  # of the dequantised weight
        num_blocks = -(-linear.weight.numel() // 64)
        new = linear.weight.new_empty
        indices = new(self.out_features, self.in_features // 2, dtype=torch.uint8)
        self.weight = nn.Parameter(indices, requires_grad=False)
        self.register_buffer("scales", new(num_blocks, dtype=torch.uint8), persistent=False)
        for name, shape in (("scales_table", [256]), ("scales_of_scales", [-(-num_blocks // 256)]), ("mean_scale", [])):
            self.register_buffer(name, new(shape, dtype=torch.float32), persistent=False)
        self._loaded: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def quantise(self, weight: Tensor) -> None:
        """Store ``weight`` ``[out, in]``, which is whole on every rank."""
        for name, values in self._parts_of(weight).items():
            local(getattr(self, name)).copy_(values)

    def holds(self, weight: Tensor) -> bool:
        """Return whether this is what is stored of ``weight`` ``[out, in]``, which is whole on every rank."""
        return all(torch.equal(local(getattr(self, name)), values) for name, values in self._parts_of(weight).items())

    def load(self, weight: Tensor | None) -> None:
        """Compute with these rows of this rank's, on any device, instead of the stored ones; ``None`` for those."""
        self._loaded = None if weight is None else (weight, self.logical_weight())

    def logical_weight(self) -> Tensor:
        """Zeros without memory in the shape, dtype, device and placement of the dequantised weight, if resharded."""
        stored, shape = self.weight, torch.Size((self.out_features, self.in_features))
        rows = local(stored).shape[0]
        zeros = torch.zeros((), dtype=self.dtype, device=local(stored).device).expand(rows, self.in_features)
        if not isinstance(stored, DTensor):
            return zeros
        return DTensor.from_local(zeros, stored.device_mesh, stored.placements, shape=shape, stride=(shape[1], 1))

    def dequantised(self) -> Tensor:
        """Return the stored weight ``[out, in]``; of a sharded model in a forward or backward pass only."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        double = QuantState(self.scales_of_scales, code=self.scales_table, blocksize=256, dtype=torch.float32)
        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(
            self.scales, shape, blocksize=64, quant_type="nf4", dtype=self.dtype, offset=self.mean_scale, state2=double
        )
        return dequantize_4bit(self.weight.view(-1, 1), state)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``; ``[..., in]`` to ``[..., out]``."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._loaded is not None:
            part, like = self._loaded
            return F.linear(x, whole(part.to(x.device, non_blocking=True), like).to(x.dtype), bias)
        return _Product.apply(x, bias, self)

    def _parts_of(self, weight: Tensor) -> dict[str, Tensor]:
        """This rank's rows of the indices of ``weight``, and the scales."""
        packed, state = _quantise(weight.to(local(self.weight).device, self.dtype))
        return {
            "weight": packed.view(self.out_features, -1)[local_slices(self.weight)],
            "scales": state.absmax,
            "scales_table": state.state2.code,
            "scales_of_scales": state.state2.absmax,
            "mean_scale": state.offset,
        }


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias``, without keeping the dequantised weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantised().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ ctx.layer.dequantised().to(gradient.dtype), of_bias, None


def quantised_layers(model: nn.Module) -> dict[str, FourBitLinear]:
    """Return the 4-bit layers of ``model``, by the checkpoint names of their weights."""
    return {
        canonical_name(weight_of(prefix)): module
        for prefix, module in model.named_modules()
        if isinstance(module, FourBitLinear)
    }
