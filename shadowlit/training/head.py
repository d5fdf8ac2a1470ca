"""From a model's hidden states to its losses, without materialising the full logits.

Only where this is proven on the model itself to be what the model computes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from shadowlit.errors import ShadowlitError
from shadowlit.grafting.arithmetic import widen
from shadowlit.grafting.parameters import host_of
from shadowlit.pair.folders import is_image_text
from shadowlit.training.linear_loss import (
    cross_entropies,
    default_chunk_size,
    linear_cross_entropy_sum,
    linear_token_losses,
    recomputed_cross_entropy_sum,
    recomputed_token_losses,
)
from shadowlit.training.parallel import within_forward

log = logging.getLogger(__name__)

Way = Literal["auto", "chunked", "recomputed", "torch", "liger", "logits"]
Inputs = Mapping[str, Tensor]
# From logits [n, V], targets [n], and a reference's logits [n, V] where there is one, to one number per token [n].
LogitsFunction = Callable[..., Tensor]
Watch = Callable[[Tensor, Tensor], None]  # is called with logits [n, V] and targets [n]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Head:
    """The parts of a causal language model around its output head.

    ``logits = softcap(scale * module(decoder(tokens)))``, with ``softcap(x) = cap * tanh(x / cap)``.

    Attributes:
        decoder: Everything before the head; gives ``last_hidden_state`` ``[B, T, H]``.
        module: The head, from ``[..., H]`` to ``[..., V]``.
        scale: Factor of the head's output (Cohere, Granite, Falcon-H1).
        cap: Soft cap of the logits (Gemma 2 and later); ``None`` for none.
    """

    decoder: nn.Module
    module: nn.Module
    scale: float
    cap: float | None

    @property
    def is_linear(self) -> bool:
        """Whether the head is its weight and bias and nothing else: no adapter, no quantisation, no hook."""
        hooks = self.module._forward_hooks or self.module._forward_pre_hooks
        return type(self.module) is nn.Linear and not hooks

    def finish(self, output: Tensor) -> Tensor:
        """From the head's output to the model's logits."""
        logits = output * self.scale if self.scale != 1 else output
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True)
class Predictions:
    """What a reference predicts at the supervised positions of a batch, without the logits of all of them.

    Attributes:
        states: ``[N, H]``, the last hidden states; the logits ``[N, V]`` of a model whose head is unknown.
        logits_of: Function from states ``[n, H]`` to float32 logits ``[n, V]``, the reference's head.
    """

    states: Tensor
    logits_of: Callable[[Tensor], Tensor]


class HeadLoss:
    """Losses of a causal language model's predictions at chosen positions.

    Only the hidden states of these positions pass through the head, a chunk at a time, so that the logits of a batch
    never exist. :func:`understand` proves on the model at hand that the model itself computes the same; where it can't,
    the model's own logits are used.

    Args:
        model: A transformers causal language model, wrapped by peft, sharded by FSDP2, or neither.
        way: Implementation. ``chunked``: gradients with the loss, for a plain linear head. ``recomputed``: any head,
            with logits computed again in the backward pass. ``torch``: torch's own ``linear_cross_entropy``. ``liger``:
            Liger Kernel's. ``logits``: the full logits. ``auto``: chunked where possible, else recomputed, else logits.
            A batch whose tokens have weights is chunked instead of given to torch's or Liger's, which know none.
        planned_for: Device of a model without weights, of which only shapes are asked: the head is the one that it
            names, without proof. ``None`` for a real model.

    Raises:
        ShadowlitError: The implementation does not support this model or this machine.
    """

    def __init__(self, model: nn.Module, way: Way = "auto", planned_for: torch.device | None = None) -> None:
        self.model = model
        self.head: Head | None = None
        self._device = planned_for
        if way != "logits":
            self.head, why = named_head(model) if planned_for else understand(model)
            if self.head is None:
                if way != "auto":
                    raise ShadowlitError(f"model.head_loss is {way!r}, but {why}. Use auto or logits.")
                log.info("the full logits are computed, since %s", why)
        self.way: Way = _resolved(way, self.head)

    def loss(self, inputs: Inputs, positions: Tensor, targets: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return the summed cross entropy, a float32 scalar with a gradient (float64 for a model in it).

        Args:
            inputs: Keyword arguments of the model: ``input_ids`` ``[B, T]`` and what belongs to it.
            positions: ``[N]``, int64, into the ``B * T`` hidden states: those that predict.
            targets: ``[N]``, int64, the tokens that they predict.
            factors: ``[N]``, float32, by which the tokens' losses are multiplied; ``None`` for 1.
        """
        # Not as an argument: FSDP2 would cast it to the dtype of the parameters.
        return self._at(partial(self._loss, factors=factors), inputs, positions, targets)

    def map_logits(
        self,
        inputs: Inputs,
        positions: Tensor,
        targets: Tensor,
        function: LogitsFunction,
        reference: Predictions | None = None,
    ) -> Tensor:
        """``function(logits, targets)`` of all tokens, with a gradient; arguments as of :meth:`loss`.

        ``function`` turns float32 logits ``[n, V]`` and the targets ``[n]`` of a chunk into one number per token
        ``[n]``, or several ``[n, K]``; it is called again in the backward pass, where the logits are computed again.
        With a ``reference``, it gets the reference's logits ``[n, V]``, without a gradient, as third argument.
        """
        return self._at(partial(self._map_logits, reference=reference), inputs, positions, targets, function)

    @torch.no_grad()
    def predict(self, inputs: Inputs, positions: Tensor, known: Predictions | None, live: bool) -> Predictions:
        """Return the predictions of the weights that are loaded, which outlast them.

        The head is copied, unless ``known`` holds a copy already, or it is frozen and ``live``: loaded whenever the
        predictions are used.
        """
        heads = [] if known is None else [known.logits_of]

        def keep(states: Tensor) -> Tensor:
            if not heads:
                heads.append(self._kept_head(live))
            return states

        return Predictions(self._at(keep, inputs, positions), heads[0])

    @torch.no_grad()
    def token_losses(
        self, inputs: Inputs, positions: Tensor, targets: Tensor, watch: Watch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross entropies ``[N]``, float32, and whether the target is the most probable token, bool ``[N]``.

        ``watch`` is called with the float32 logits ``[n, V]`` and the targets ``[n]`` of every chunk.
        """
        return self._at(self._token_losses, inputs, positions, targets, watch)

    @torch.no_grad()
    def logits_at(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """Return the model's logits at chosen positions only: ``[N, V]``, float32 (float64 for a model in it)."""
        return self._at(self._logits, inputs, positions)

    def _at(self, function: Callable[..., _T], inputs: Inputs, positions: Tensor, *args: Any) -> _T:
        """Call ``function`` with the hidden states at ``positions``, or with the logits where the head is unknown."""
        if self.head is None:
            logits = self.model(**inputs, use_cache=False).logits
            return function(logits.flatten(0, 1).index_select(0, positions), *args)
        decoder = self.head.decoder

        def run(inputs: Inputs, positions: Tensor, *args: Any) -> _T:
            hidden = decoder(**inputs, use_cache=False).last_hidden_state
            return function(hidden.flatten(0, 1).index_select(0, positions), *args)

        return within_forward(self.model, run, inputs, positions, *args)

    def _logits(self, states: Tensor) -> Tensor:
        return widen(states if self.head is None else self.head.finish(self.head.module(states)))

    def _kept_head(self, live: bool) -> Callable[[Tensor], Tensor]:
        if self.head is None:
            return widen
        kept = live and not any(p.requires_grad for p in self.head.module.parameters())
        module, finish = self.head.module if kept else copy.deepcopy(self.head.module), self.head.finish
        return lambda states: widen(finish(module(states)))

    def _chunk_size(self, states: Tensor) -> int:
        """Positions whose logits are computed at a time; all where the model has computed them already."""
        if self.head is None:
            return max(1, len(states))
        return default_chunk_size(_vocabulary(self.model), self._device or states.device)

    def _loss(self, states: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
        if self.head is None or self.way == "recomputed":
            if factors is not None:
                return (factors * self._map_logits(states, targets, cross_entropies)).sum()
            return recomputed_cross_entropy_sum(self._logits, states, targets, self._chunk_size(states))
        head = self.head
        assert isinstance(head.module, nn.Linear)
        weight: Tensor = head.module.weight
        bias: Tensor | None = head.module.bias
        if self.way != "chunked" and factors is not None:
            rank_zero_warn(
                f"model.head_loss is {self.way!r}, which doesn't support weights of tokens. Batches that have some "
                "are computed as with 'chunked'."
            )
        if self.way == "chunked" or factors is not None:
            return linear_cross_entropy_sum(
                states, weight, targets,
                bias=bias, scale=head.scale, cap=head.cap, factors=factors, chunk_size=self._chunk_size(states),
            )  # fmt: skip
        device = states.device.type
        if torch.is_autocast_enabled(device):  # neither of the two follows it
            dtype = torch.get_autocast_dtype(device)
            states, weight = states.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if self.way == "torch":
            return F.linear_cross_entropy(
                states,
                weight,
                targets,
                linear_bias=bias,
                reduction="sum",
                options=nn.LinearCrossEntropyOptions(),
            ).float()
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(
            states, weight, targets, bias=bias, reduction="sum", softcap=head.cap, accum_dtype=torch.float32
        ).float()

    def _map_logits(
        self, states: Tensor, targets: Tensor, function: LogitsFunction, reference: Predictions | None = None
    ) -> Tensor:
        size = self._chunk_size(states)
        if reference is None:
            return recomputed_token_losses(self._logits, states, targets, size, function)
        logits_of = torch.no_grad()(reference.logits_of)

        def compare(logits: Tensor, tokens: Tensor, others: Tensor) -> Tensor:
            return function(logits, tokens, logits_of(others))

        return recomputed_token_losses(self._logits, states, targets, size, compare, reference.states)

    def _token_losses(self, states: Tensor, targets: Tensor, watch: Watch | None) -> tuple[Tensor, Tensor]:
        head = self.head
        if head is not None and self.way != "recomputed":
            assert isinstance(head.module, nn.Linear)
            weight, bias = head.module.weight, head.module.bias
            return linear_token_losses(
                states, weight, targets,
                bias=bias, scale=head.scale, cap=head.cap, chunk_size=self._chunk_size(states), watch=watch,
            )  # fmt: skip
        losses, correct = [], []
        size = self._chunk_size(states)
        for some, tokens in zip(states.split(size), targets.split(size), strict=True):
            logits = self._logits(some)
            if watch is not None:
                watch(logits, tokens)
            losses.append(cross_entropies(logits, tokens))
            correct.append(logits.argmax(-1) == tokens)
        return torch.cat(losses), torch.cat(correct)


def named_head(model: nn.Module) -> tuple[Head | None, str]:
    """Return the decoder, the head and what follows it by their names in transformers; or ``None`` and the reason."""
    host = host_of(model)
    module = host.get_output_embeddings() if hasattr(host, "get_output_embeddings") else None
    decoder = _body_of(host)
    if module is None or decoder in (None, host):
        return None, f"{type(host).__name__} has no output head or no decoder that transformers can name"
    return Head(decoder, module, *_finish_of(host.config.get_text_config())), ""


@torch.no_grad()
def understand(model: nn.Module) -> tuple[Head | None, str]:
    """Find the decoder, the head and what follows it, and prove on a few tokens that they are the whole model.

    The model runs once with the head's output replaced by numbers from -100 to 100. Its logits must then be what
    :meth:`Head.finish` makes of these numbers, whatever the weights are, and the head's input must be the output of the
    decoder alone. Returns the head, or ``None`` and the reason, a clause for the user.
    """
    head, why = named_head(model)
    if head is None:
        return None, why
    name, module, decoder = type(host_of(model)).__name__, head.module, head.decoder
    device = next(model.parameters()).device
    tokens = {"input_ids": torch.arange(8, device=device)[None] % _vocabulary(model)}
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ramp = torch.linspace(-100, 100, output.numel(), device=output.device).view_as(output).to(output.dtype)
        seen.append((args[0], ramp))
        return ramp.clone()

    with evaluating(model), torch.compiler.set_stance("force_eager"):
        hook = module.register_forward_hook(replace)
        try:
            logits = model(**tokens, use_cache=False).logits
        finally:
            hook.remove()
        hidden = within_forward(model, lambda batch: decoder(**batch, use_cache=False).last_hidden_state, tokens)
    if len(seen) != 1:
        return None, f"{name} calls its output head {len(seen)} times in a forward pass"
    given, ramp = seen[0]
    if not _alike(given, hidden):
        return None, f"{name} passes something other than its decoder's last hidden state to its output head"
    if not _alike(logits, head.finish(ramp)):
        return None, (
            f"{name} changes its logits by more than the scale of {head.scale:g} and the soft cap of {head.cap} that "
            "its config names"
        )
    return head, ""


def _body_of(host: Any) -> nn.Module | None:
    """Everything before the head: the decoder, or the part of a vision-language model that takes images too."""
    if is_image_text(host.config):
        return host.base_model
    return host.get_decoder() if hasattr(host, "get_decoder") else None


def _finish_of(config: Any) -> tuple[float, float | None]:
    """Scale and cap of the logits, under the names that transformers' configs use."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= _number(config, name) or 1.0
    return scale / (_number(config, "logits_scaling") or 1.0), _number(config, "final_logit_softcapping")


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None


def _alike(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    left, right = left.float(), right.float()
    # Equal up to the rounding of half precision; the mistakes that this must find are far larger.
    return bool((left - right).abs().max() <= 1e-2 * right.abs().max())


def _resolved(way: Way, head: Head | None) -> Way:
    if head is None:
        return "logits"
    if way == "auto":
        return "chunked" if head.is_linear else "recomputed"
    if way == "recomputed":
        return way
    expected = "Use auto, which takes what fits."
    if not head.is_linear:
        raise ShadowlitError(
            f"model.head_loss is {way!r}, which needs an nn.Linear as output head, but this one is a "
            f"{type(head.module).__name__}. {expected}"
        )
    if way == "torch" and not hasattr(F, "linear_cross_entropy"):
        raise ShadowlitError(
            f"model.head_loss is 'torch', but torch {torch.__version__} has no linear_cross_entropy. {expected}"
        )
    if way == "liger" and (find_spec("liger_kernel") is None or head.module.weight.device.type != "cuda"):
        raise ShadowlitError(
            "model.head_loss is 'liger', which needs the package liger-kernel and a model on a GPU (device: "
            f"{head.module.weight.device}). Install it, or use auto."
        )
    if way in ("torch", "liger") and (head.scale != 1 or (way == "torch" and head.cap is not None)):
        raise ShadowlitError(
            f"model.head_loss is {way!r}, which can't scale or cap logits as this model does (scale {head.scale:g}, "
            f"cap {head.cap}). {expected}"
        )
    return way


def _vocabulary(model: nn.Module) -> int:
    return int(host_of(model).config.get_text_config().vocab_size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context, then every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
