"""Cross entropy from hidden states and the output head's weight, without the logits of a whole batch.

The logits of one chunk of tokens at a time are computed and turned in place into the gradient of the loss, which is
multiplied into the gradients of the hidden states and of the weight at once. The backward pass recomputes nothing:
three matrix products, as for full logits, and peak memory that does not grow with vocabulary times tokens. The idea is
that of Liger Kernel (arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shadowlit.grafting.arithmetic import accumulation_dtype, widen

# Logits of one chunk, by the kind of device. Measured on one CPU core, 512 tokens, width 128, vocabulary 151,936: 128
# or 256 tokens per chunk take 0.8 s, 55 take 1.0 s, 16 take 1.7 s; whole logits 1.5 s. On a GPU fewer, longer products
# should win; not measured.
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    factors: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the summed cross entropy of a linear head's predictions in nats, a float32 scalar (float64 for float64
    inputs).

    ``Σ_n factors_n (logsumexp(z_n) - z_n[targets_n])`` with ``z = softcap(scale * (hidden @ weight.T + bias))`` and
    ``softcap(x) = cap * tanh(x / cap)``. Products are computed in the weight's dtype, or in autocast's where it is
    on; the softmax, the sums and the gradient of the weight in float32 (float64 where the inputs are).

    The gradients are computed with the loss and only scaled in the backward pass, in place: it can run once.

    Args:
        hidden: ``[N, H]``, hidden states, each of which predicts a token.
        weight: ``[V, H]``.
        targets: ``[N]``, int64, the tokens.
        bias: ``[V]``.
        scale: Factor of the logits.
        cap: Soft cap of the logits (Gemma 2, arXiv 2408.00118); ``None`` for none.
        factors: ``[N]``, floating, by which the tokens' losses are multiplied; ``None`` for 1.
        chunk_size: Number of tokens whose logits exist at a time; ``None`` for one that suits the device.
    """
    head = _Head(scale, cap, _product_dtype(weight), chunk_size or default_chunk_size(weight.shape[0], weight.device))
    learns = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, factors, head, learns)


@torch.no_grad()
def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    chunk_size: int | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropies ``[N]`` of single tokens in nats, and whether these are the most probable ones, bool ``[N]``.

    Arguments and dtype as of :func:`linear_cross_entropy_sum`; ``watch`` is called with a copy of the logits ``[n, V]``
    and the targets ``[n]`` of every chunk.
    """
    head = _Head(scale, cap, _product_dtype(weight), chunk_size or default_chunk_size(weight.shape[0], weight.device))
    losses = torch.empty(len(targets), dtype=_sum_dtype(head.dtype), device=hidden.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, logits, _ in head.chunks(hidden, weight, bias):
            if watch is not None:
                watch(logits.clone(), targets[part])  # a metric may keep them, and the buffer is overwritten
            correct[part] = logits.argmax(-1) == targets[part]
            losses[part] = _losses(logits, targets[part])[0]
    return losses, correct


def recomputed_cross_entropy_sum(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk_size: int
) -> Tensor:
    """Return the summed cross entropy of any head's predictions; the logits of each chunk are computed again for the
    gradient.

    Four products instead of three, but the head may be anything: adapted, quantised, of several layers. Arguments as of
    :func:`recomputed_token_losses`.
    """

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits, tokens, reduction="sum")

    sums = _recomputed(logits_of, hidden, targets, chunk_size, loss)
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropies ``[n]`` in nats of logits ``[n, V]`` and int64 targets ``[n]``."""
    return F.cross_entropy(logits, targets, reduction="none")


def recomputed_token_losses(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    chunk_size: int,
    loss: Callable[..., Tensor] = cross_entropies,
    *others: Tensor,
) -> Tensor:
    """Losses ``[N]`` of single tokens with a gradient, by default cross entropies in nats.

    The factor of each token's loss is only known in the backward pass, where the logits of a chunk are computed again.
    ``logits_of`` turns hidden states ``[n, H]`` into logits ``[n, V]``, and ``loss`` float32 logits (float64 where they
    are) and int64 targets ``[n]`` into losses ``[n]``, or several numbers a token; its further arguments are the
    chunk's rows of ``others``, ``[N, ...]`` each.
    """
    return torch.cat(_recomputed(logits_of, hidden, targets, chunk_size, loss, *others))


def _recomputed(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    chunk_size: int,
    loss: Callable[..., Tensor],
    *others: Tensor,
) -> list[Tensor]:
    """``loss(logits, targets, *others)`` of every chunk; a single one is kept, and not computed again."""

    def of_chunk(part: Tensor, *rest: Tensor) -> Tensor:
        return loss(widen(logits_of(part)), *rest)

    if len(targets) <= chunk_size:
        return [of_chunk(hidden, targets, *others)]
    parts = zip(*(one.split(chunk_size) for one in (hidden, targets, *others)), strict=True)
    return [checkpoint(of_chunk, *part, use_reentrant=False) for part in parts]


def default_chunk_size(num_tokens: int, device: torch.device) -> int:
    """Return the number of positions per chunk that suit a device, for a vocabulary of ``num_tokens``."""
    return max(16, _CHUNK_ELEMENTS.get(device.type, 2**26) // num_tokens)


class _Head(NamedTuple):
    """From hidden states to capped logits, chunk by chunk, in one buffer that every chunk overwrites."""

    scale: float
    cap: float | None
    dtype: torch.dtype
    chunk_size: int

    def chunks(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the range of tokens, their logits ``[n, V]`` in the dtype of sums, and their hidden states."""
        weight = weight.to(self.dtype)
        sums = _sum_dtype(self.dtype)
        rows = min(self.chunk_size, len(hidden))
        buffer = torch.empty(rows, weight.shape[0], dtype=sums, device=hidden.device)
        for start in range(0, len(hidden), max(1, rows)):
            part = slice(start, min(start + rows, len(hidden)))
            states = hidden[part].to(self.dtype)
            logits = buffer[: len(states)]
            if self.dtype == sums:
                torch.mm(states, weight.t(), out=logits)
            else:
                logits.copy_(torch.mm(states, weight.t()))
            if bias is not None:
                logits.add_(bias)
            if self.scale != 1:
                logits.mul_(self.scale)
            if self.cap is not None:
                logits.div_(self.cap).tanh_().mul_(self.cap)
            yield part, logits, states


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factors: Tensor | None,
        head: _Head,
        learns: Sequence[bool],  # which of hidden, weight and bias
    ) -> Tensor:
        sums = _sum_dtype(head.dtype)
        total = torch.zeros((), dtype=accumulation_dtype(hidden.device), device=hidden.device)
        by_hidden = torch.zeros_like(hidden) if learns[0] else None
        by_weight = torch.zeros_like(weight, dtype=sums) if learns[1] else None
        by_bias = torch.zeros_like(bias, dtype=sums) if bias is not None and learns[2] else None
        cast = weight.to(head.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, logits, states in head.chunks(hidden, cast, bias):
                slope = 1 - (logits / head.cap).square_() if head.cap is not None and any(learns) else None
                losses, exponentials = _losses(logits, targets[part])
                if factors is not None:
                    losses = losses * factors[part]
                total += losses.sum(dtype=total.dtype)
                if not any(learns):
                    continue
                # Softmax minus one-hot, in the buffer of the logits.
                gradient = logits.mul_(exponentials.reciprocal_())
                gradient.scatter_add_(1, targets[part, None], gradient.new_full((len(losses), 1), -1.0))
                if factors is not None:
                    gradient.mul_(factors[part, None])
                if slope is not None:
                    gradient.mul_(slope)
                if head.scale != 1:
                    gradient.mul_(head.scale)
                if by_bias is not None:
                    by_bias += gradient.sum(0)
                gradient = gradient.to(head.dtype)
                if by_hidden is not None:
                    by_hidden[part] = torch.mm(gradient, cast)
                if by_weight is not None:
                    _add_product(by_weight, gradient.t(), states)
        ctx.gradients = (
            by_hidden,
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None or bias is None else by_bias.to(bias.dtype),
        )
        return total.to(sums)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of linear_cross_entropy_sum were consumed by an earlier backward pass. Compute the "
                "loss again instead of retaining the graph."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a second gradient of the head would be the largest tensor of a small model's backward pass.
        return (*(None if g is None else g.mul_(outer[0]) for g in gradients), None, None, None, None)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in float32 also where the factors are in half precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(total.device)[0] >= 8:
        # Without a product in half precision of the weight's size.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right)


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropies ``[n]``, and the sums ``[n, 1]`` of the exponentials by which the logits are overwritten."""
    chosen = logits.gather(1, targets[:, None])
    largest = logits.amax(-1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    return (total.log() + (largest - chosen))[:, 0], total


def _product_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
