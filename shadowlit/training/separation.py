"""Tests on the model itself, before it trains, whether it keeps packed samples apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shadowlit.errors import ShadowlitError
from shadowlit.grafting.parameters import host_of
from shadowlit.training.head import evaluating

_LENGTH = 16
_MOST = 0.02  # share of its whole influence that a sample may have on its neighbour; 0 in exact arithmetic


def require_separation(model: nn.Module) -> None:
    """Refuse a causal language model in which a sample of a packed row sees the one before it.

    Two rows end with the same sample and begin with different ones. Where restarting positions are borders, the logits
    of the second sample are the same in both, bit for bit except on mixtures of experts; otherwise they differ about
    as much as without borders. Convolutions and recurrent states mix neighbours too weakly to be distinguished from
    rounding in half precision, so a model that has them is refused.

    Costs four forward passes of 32 tokens, in which nothing is compiled; a collective with FSDP2.

    Raises:
        ShadowlitError: Samples would see each other.
    """
    host = host_of(model)
    kind = getattr(host.config, "model_type", type(host).__name__)
    kernel = getattr(host.config, "_attn_implementation", None)
    advice = "Set data.packing=null, and data.group_by_length=true to spare padding."
    if getattr(host, "_is_stateful", False) or any(isinstance(module, nn.Conv1d) for module in host.modules()):
        raise ShadowlitError(
            f"data.packing is set, but '{kind}' has recurrent or convolutional layers, which carry one sample into the "
            f"next; expected attention only. {advice}"
        )
    leak = _influence(model, restart=True) / max(_influence(model, restart=False), torch.finfo(torch.float32).tiny)
    if leak > _MOST:
        raise ShadowlitError(
            f"data.packing is set, but in '{kind}' with attn_implementation={kernel!r} a packed sample changes the "
            f"logits of the next one by {leak:.0%} of what it would without borders; expected 0 %: the attention "
            f"ignores the borders in position_ids. {advice}"
        )


@torch.no_grad()
def _influence(model: nn.Module, restart: bool) -> float:
    """Norm of the difference that the first sample of a row makes to the logits of the second."""
    device = next(model.parameters()).device
    vocabulary = host_of(model).get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(vocabulary, (2, _LENGTH), generator=generator)
    second = torch.randint(vocabulary, (1, _LENGTH), generator=generator).expand(2, -1)
    rows = torch.cat([first, second], 1).to(device)
    positions = torch.arange(2 * _LENGTH, device=device)[None]
    if restart:
        positions = positions % _LENGTH

    def logits(row: Tensor) -> Tensor:
        return model(input_ids=row[None], position_ids=positions, use_cache=False).logits[0, _LENGTH:].float()

    # Without dropout, which would change the logits too; such short rows aren't worth a compiled graph.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        return (logits(rows[0]) - logits(rows[1])).norm().item()
