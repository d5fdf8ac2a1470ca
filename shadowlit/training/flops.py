"""Floating-point operations of a training step, and the peak of a GPU: the two sides of MFU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shadowlit.checkpoint.names import canonical_name, is_adapter_name, is_of_experts, is_original_name, tower_of
from shadowlit.grafting.parameters import host_of

# Dense bfloat16 with float32 accumulation, in FLOP/s, from NVIDIA's data sheets (which mostly print twice these, with
# sparsity). The first name that the device's name contains counts.
_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second of a device in dense bfloat16; ``None`` where they are unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


@dataclass(frozen=True)
class Work:
    """The operations of a model, from counts of its parameters alone.

    A product with a weight of ``n`` elements costs ``2 n`` operations per token in the forward pass and ``2 n`` for
    each of the two gradients, of its input and of the weight: ``6 n`` (Kaplan et al., arXiv 2001.08361, section 2.1). A
    frozen weight has no gradient: ``4 n``, also under an adapter, whose factors cost ``6 n``. In a mixture of experts
    only the share of a token's experts counts, in the head only the supervised tokens; looking up embeddings is free.
    Attention costs ``12 * heads * head_dim`` per layer and pair of a token and one that it sees: 2 operations per head
    and channel for the score and 2 for the value, three times with the gradients (PaLM, arXiv 2204.02311, appendix B,
    which counts all pairs; here a causal mask, packed conversations and sliding windows exclude some). Recomputation
    does not count, since this is model FLOPs utilisation.
    """

    per_token: float  # forward and backward pass, without the head
    per_supervised: float  # in the head
    attention: tuple[float, ...]  # per pair, for each layer
    windows: tuple[int | None, ...]  # tokens that a token sees in each layer; None for all before it

    @classmethod
    def of(cls, model: nn.Module) -> Work:
        """Count the language model in a transformers model, wrapped by peft or sharded or neither."""
        host = host_of(model)
        config = host.config.get_text_config()
        head, embedding = host.get_output_embeddings(), host.get_input_embeddings()
        in_head = {id(p) for p in head.parameters()} if head is not None else set()
        looked_up = {id(p) for p in embedding.parameters()} - in_head
        per_token, active = 0.0, _active_share(config)
        for name, parameter in model.named_parameters():
            if id(parameter) in in_head or id(parameter) in looked_up or is_original_name(name):
                continue
            if tower_of(name) != "language":  # which works on patches of images, not on tokens
                continue
            if parameter.dim() >= 2 or is_adapter_name(name):
                share = active if is_of_experts(canonical_name(name)) else 1.0
                in_byte = 2 if parameter.dtype == torch.uint8 else 1  # weights in 4 bits
                per_token += (6 if parameter.requires_grad else 4) * parameter.numel() * in_byte * share
        per_supervised = sum((6 if p.requires_grad else 4) * p.numel() for p in head.parameters()) if head else 0.0
        num_layers = int(config.num_hidden_layers)
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(per_token, per_supervised, (12.0 * heads * width,) * num_layers, _windows(config, num_layers))

    def flops(self, tokens: float, supervised: float, pairs: Mapping[int | None, float]) -> float:
        """Operations of steps with so many tokens, supervised ones, and pairs by window."""
        attention = sum(cost * pairs[window] for cost, window in zip(self.attention, self.windows, strict=True))
        return self.per_token * tokens + self.per_supervised * supervised + attention


def count_pairs(batch: Mapping[str, Tensor], windows: set[int | None]) -> tuple[Tensor, dict[int | None, Tensor]]:
    """Return the tokens of a batch that aren't padding, and pairs of a token and one that it sees, by window; on its
    device.

    A token at position ``p`` of its conversation sees ``p + 1`` tokens, itself included, and at most the window.
    """
    if "position_ids" in batch:
        seen = batch["position_ids"] + 1
        tokens = torch.full((), seen.numel(), device=seen.device)
    elif "attention_mask" in batch:
        mask = batch["attention_mask"]
        seen = mask.cumsum(-1) * mask
        tokens = mask.sum()
    else:
        ids = batch["input_ids"]
        seen = torch.arange(1, ids.shape[-1] + 1, device=ids.device).expand_as(ids)
        tokens = torch.full((), ids.numel(), device=ids.device)
    return tokens, {window: (seen if window is None else seen.clamp(max=window)).sum() for window in windows}


def _active_share(config: Any) -> float:
    """Share of a mixture's experts that a token uses, by the names in transformers' configs."""
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((value for name in names if (value := getattr(config, name, None))), None)
    return chosen / total if chosen and total else 1.0


def _windows(config: Any, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, from transformers' configs."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,) * num_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
