"""Which adapters can be grafted, why the others can't, and what an adapter has learned of each weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call

from shadowlit.checkpoint.names import canonical_name, changes_bias, is_adapter_name, is_linear_factor
from shadowlit.distributed import local_slices
from shadowlit.errors import GraftError
from shadowlit.grafting.factors import Factors
from shadowlit.grafting.parameters import host_of
from shadowlit.pair.folders import is_tied

# peft's types of adapters that have one update of the weights, which `merge` of their layers computes, as
# tests/grafting/test_adapters.py proves for each: those whose update is the same on any weights, and the others.
_ADDITIVE = {"LORA", "LOHA", "LOKR", "VERA", "FOURIERFT", "C3A", "GRALORA", "RANDLORA", "WAVEFT", "SHIRA", "BEFT"}
_OTHER_LAYERS = {"LN_TUNING", "TRAINABLE_TOKENS"}  # not linear ones
_DEPENDENT = {"OFT", "BOFT", "IA3", "HRA", "HIRA", "DELORA", "ROAD", "GLORA", "VBLORA", "MISS", *_OTHER_LAYERS}
_MERGEABLE = _ADDITIVE | _DEPENDENT

# Settings of peft.LoraConfig under which there is no one update of the weights, or under which the factors change
# layers of the host that the graft cannot name.
_REFUSED = {
    "layer_replication": "it repeats layers, so the trained model has layers that the Instruct hasn't",
    "alora_invocation_tokens": "its factors act on some positions only, so there is no update of the weights",
    "use_qalora": "its factors act on pooled inputs, so there is no update of the weights of this shape",
    "use_bdlora": "its factors are block-diagonal, which has not been proven exact here",
    "arrow_config": "it mixes several adapters per token, so there is no one update of the weights",
    "kasa_config": "it splits the weights that it adapts, which has not been proven exact here",
    "velora_config": "it changes what the backward pass sees, which has not been proven exact here",
    "monteclora_config": "it samples its factors, so there is no one update of the weights",
}
_FROM_DATA = ("eva", "corda", "lora_ga", "loftq")  # starts that peft computes before, and leaves next to the weights


def require_graftable(adapter: PeftConfig | None) -> None:
    """Raise unless the graft of an adapter of these settings is exact.

    Exact is whatever peft merges into the weights: LoRA (arXiv 2106.09685) with its variants rsLoRA and DoRA, any rank
    and alpha patterns, biases, ``modules_to_save``, on modules and on bare parameters (fused experts); starts taken
    from the weights (PiSSA, OLoRA), whose residual is part of the update; and the other types that have one update of
    the weights.

    Raises:
        GraftError: Naming every setting that makes the graft inexact, with the reason.
    """
    if adapter is None:
        return
    kind = type_of(adapter)
    if kind not in _MERGEABLE:
        reason = "adds to the prompt" if adapter.is_prompt_learning else "is not proven to merge into the weights"
        raise GraftError(
            f"adapter is a {type(adapter).__name__} ({kind}), which {reason}, so it has no update of the weights that "
            f"could be grafted. Expected a LoraConfig or one of {', '.join(sorted(_MERGEABLE))}, or null for full "
            "tuning."
        )
    problems = [
        f"adapter.{name}={getattr(adapter, name)!r} can't be grafted exactly: {reason}"
        for name, reason in _REFUSED.items()
        if getattr(adapter, name, None)
    ]
    start = _start_of(adapter)
    if isinstance(start, str) and start.startswith(_FROM_DATA):
        problems.append(
            f"adapter.init_lora_weights={start!r} is computed from activations, gradients or quantised weights, which "
            "are unavailable when the adapter is created"
        )
    if problems:
        raise GraftError(
            ". ".join(problems) + ". Use LoRA, rsLoRA (adapter.use_rslora=true) or full tuning (adapter=null)."
        )


def adapt_all_linear(adapter: PeftConfig) -> None:
    """Let an adapter without targets adapt all linear layers, unless its type is for other layers."""
    targets = [getattr(adapter, name, None) for name in ("target_modules", "target_parameters")]
    if targets == [None, None] and type_of(adapter) not in _OTHER_LAYERS:
        adapter.target_modules = "all-linear"  # type: ignore[attr-defined]


def type_of(adapter: PeftConfig) -> str:
    """Return peft's name of an adapter's type, e.g. ``LORA``."""
    return str(getattr(adapter.peft_type, "value", adapter.peft_type))


def dependence(adapter: PeftConfig) -> str:
    """Return the settings by which an adapter's update depends on the weights that it is on; empty if it does not."""
    found = [] if type_of(adapter) in _ADDITIVE else [f"peft_type={type_of(adapter)}"]
    found += ["use_dora=True"] if getattr(adapter, "use_dora", False) else []
    found += [f"init_lora_weights={_start_of(adapter)!r}"] if starts_from_weights(adapter) else []
    return " and ".join(found)


def stored_values(adapter: PeftConfig) -> str:
    """Return the settings by which an adapter stores values of its host next to its update; empty if it stores none."""
    found = {name: getattr(adapter, name, None) for name in ("modules_to_save", "trainable_token_indices")}
    found["bias"] = None if (value := getattr(adapter, "bias", None)) == "none" else value
    return " and ".join(f"{name}={value!r}" for name, value in found.items() if value)


def _start_of(adapter: PeftConfig) -> bool | str:
    return getattr(adapter, "init_lora_weights", True)


def starts_from_weights(adapter: PeftConfig) -> bool:
    """Return whether peft takes the start of the factors out of the host's weights, and leaves a residual (PiSSA, OLoRA
    …).
    """
    return _start_of(adapter) not in (True, False, "gaussian", "orthogonal")


def is_plain(adapter: PeftConfig, start: bool = True) -> bool:
    """Return whether this is LoRA without a variant; with ``start`` also whether its factors start without peft's own
    code.
    """
    others = any(getattr(adapter, name, None) for name in ("use_dora", "trainable_token_indices"))
    simple = not start or _start_of(adapter) in (True, False, "gaussian")
    return type_of(adapter) == "LORA" and not others and simple


def why_not_movable(adapter: PeftConfig | None, transformed: bool, on_tuned: bool = False) -> str | None:
    """Return why an adapter's factors don't give the graft on the Instruct; None where they do.

    ``transformed``: the graft transforms the update; ``on_tuned``: the adapter was trained on a tuned Base.
    """
    if adapter is None:
        return "Every weight is trained."
    if on_tuned:
        return (
            "It was trained on the tuned weights of model.start_from, whose own update it lacks; export.parts=[delta] "
            "and 'delta lora' make an adapter of the whole update."
        )
    if settings := dependence(adapter) or stored_values(adapter):
        return f"With {settings} its update of the Instruct differs from that of the Base."
    if transformed:
        return (
            "The exported graft transforms the update, so the adapter's factors do not give it; "
            "export.parts=[delta] and 'delta lora' make an adapter of it."
        )
    return None


def leaves_residual(model: nn.Module) -> bool:
    """Return whether the frozen weights under the adapter of ``model`` are a residual instead of the host's own."""
    return any(starts_from_weights(adapter) for adapter in getattr(model, "peft_config", {}).values())


class _Product(nn.Module):
    """An adapter's update as a module, to which other factors than its layer's own can be given."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, adapter: str) -> Tensor:
        """The scaled product of an adapter's factors."""
        return self.layer.get_delta_weight(adapter)


@dataclass
class AdaptedLayer:
    """A layer of peft around one of the host's, and the name there of a parameter that its adapter changes."""

    layer: BaseTunerLayer
    adapter: str
    parameter: str
    additive: bool  # whether the update is the same whatever weights the layer is on

    def __post_init__(self) -> None:
        scalings = getattr(self.layer, "scaling", None)
        # Of LoRA peft's own: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        self.scaling: float | None = scalings.get(self.adapter) if isinstance(scalings, dict) else None

    def delta_weight(self, host: Tensor, tuned: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the float32 update of the host's parameter as the adapter trains it, in this rank's part of the host.

        Args:
            host: The parameter.
            tuned: Returns the whole of a parameter, whichever weights are loaded.
        """
        layer = self.layer
        if self.additive and isinstance(layer, LoraLayer) and self.parameter != "bias":
            acting = layer.scaling[self.adapter]  # peft multiplies by it, and a graft may have set it to zero
            layer.scaling[self.adapter] = self.scaling
            # A product of sharded factors would be added up in another order, with other last bits.
            product, module = _Product(layer), cast(nn.Module, layer)
            # Not those of a layer that this one is wrapped around.
            own = {name: p for name, p in module.named_parameters() if is_adapter_name(name.partition(".")[0])}
            factors = {f"layer.{name}": tuned(p) for name, p in own.items()}
            update = functional_call(product, factors, (self.adapter,))
            layer.scaling[self.adapter] = acting
            return update.detach().float()[local_slices(host)]
        start = tuned(host).float()
        merged = self._merged(tuned)
        return (merged if self.additive else merged - start)[local_slices(host)]

    @torch.no_grad()
    def factors(self, tuned: Callable[[Tensor], Tensor]) -> Factors | None:
        """Return the two factors whose product :meth:`delta_weight` is, whole; None where it is no plain product.

        A product are the updates of LoRA and rsLoRA of linear layers and embeddings, but not those of fused experts,
        of a bias, of DoRA, or of any other type. Arguments are those of :meth:`delta_weight`; a collective if sharded.
        """
        if not (self.additive and isinstance(self.layer, LoraLayer) and self.parameter == "weight" and self.scaling):
            return None
        layer: Any = self.layer
        if isinstance(layer, ParamWrapper) or getattr(layer, "fan_in_fan_out", False):
            return None
        if self.adapter in layer.lora_embedding_A:
            down, up = (tuned(side[self.adapter]) for side in (layer.lora_embedding_A, layer.lora_embedding_B))
            return Factors(down.detach().float().T * self.scaling, up.detach().float().T)
        if self.adapter not in layer.lora_A or not isinstance(layer.lora_A[self.adapter], nn.Linear):
            return None
        up, down = (tuned(side[self.adapter].weight) for side in (layer.lora_B, layer.lora_A))
        return Factors(up.detach().float() * self.scaling, down.detach().float())

    def _merged(self, tuned: Callable[[Tensor], Tensor]) -> Tensor:
        """The host's parameter with the adapter merged into it by peft, in float32; into zeros for an additive one."""
        layer: Any = self.layer
        own = {id(p) for p in self.layer.get_base_layer().parameters(recurse=False)}

        def value(p: nn.Parameter) -> Tensor:
            if self.additive and id(p) in own:
                return torch.zeros(p.shape, device=p.device)
            return tuned(p).to(torch.float32, copy=True)

        # Copied but for its buffers, which layers may share (VeRA), one layer at a time.
        memo = {id(p): nn.Parameter(value(p), requires_grad=False) for p in layer.parameters()}
        twin = copy.deepcopy(layer, {**memo, **{id(buffer): buffer for buffer in layer.buffers()}})
        if self.scaling is not None:
            twin.scaling[self.adapter] = self.scaling
        twin.merge(adapter_names=[self.adapter])
        return getattr(twin.get_base_layer(), self.parameter).detach()

    def set_scale(self, scale: float) -> None:
        """Multiply the adapter's own scaling by ``scale``: 1 as in training, 0 switches it off.

        Factors that are not finite, times 0, would not be 0.
        """
        layer: Any = self.layer
        if self.scaling is not None:
            layer.scaling[self.adapter] = self.scaling * scale
        layer._disable_adapters = scale == 0


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Return the adapted layers of ``model``, by the checkpoint names of the weights and biases that their adapters
    change.
    """
    layers = {}
    for prefix, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if len(layer.active_adapters) != 1 or layer.merged:
            raise GraftError(
                f"{prefix} has the active adapters {layer.active_adapters} "
                f"({'merged' if layer.merged else 'not merged'}); expected exactly one, not merged."
            )
        (adapter,) = layer.active_adapters
        parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        names = [parameter, *(["bias"] if _changes_bias(layer, adapter, prefix) else [])]
        additive = _is_additive(layer, adapter)
        for name in names:
            layers[canonical_name(f"{prefix}.{name}")] = AdaptedLayer(layer, adapter, name, additive)
    return layers


def _is_additive(layer: BaseTunerLayer, adapter: str) -> bool:
    if isinstance(layer, LoraLayer):
        return adapter not in layer.lora_variant  # such as DoRA
    return any(map(is_linear_factor, layer.adapter_layer_names))


def _changes_bias(layer: BaseTunerLayer, adapter: str, prefix: str) -> bool:
    has_bias = getattr(layer.get_base_layer(), "bias", None) is not None
    if getattr(layer, "lora_bias", {}).get(adapter):
        if not has_bias:
            raise GraftError(
                f"adapter.lora_bias=true adds a bias to {canonical_name(prefix)}, which has none, so no Instruct can "
                "hold it. Adapt only layers with a bias (adapter.target_modules), or leave lora_bias out."
            )
        return True
    changes = changes_bias(layer.adapter_layer_names[0]) and not getattr(layer, "is_feedforward", False)
    return has_bias and changes


def require_untied(model: nn.Module) -> None:
    """Raise a GraftError if an adapter sits on one side of a tied embedding: merged, it would change the other too."""
    host = host_of(model)
    if not is_tied(host.config):
        return
    for side, module in (("embedding", host.get_input_embeddings()), ("output head", host.get_output_embeddings())):
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            raise GraftError(
                f"the adapter changes the {side}, but in this model embedding and output head are one tensor "
                "(tie_word_embeddings), and no Instruct can hold an update of only one of them. Leave embed_tokens and "
                "lm_head out of adapter.target_modules and adapter.modules_to_save."
            )
