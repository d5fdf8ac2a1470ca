"""Which adapters can be grafted while they train, and why the others can't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from shadowlit.checkpoint.names import canonical_name
from shadowlit.distributed import local, local_slices, whole
from shadowlit.errors import GraftError
from shadowlit.grafting.parameters import host_of
from shadowlit.pair.folders import is_tied

# Settings of peft.LoraConfig under which the effective weight is no longer host + scaling * B @ A, or under which
# the factors change layers of the host that the graft cannot name.
_REFUSED = {
    "use_dora": "its column norms depend on the weights it sits on, so what it learns on the Base is another update "
    "on the Instruct",
    "lora_bias": "the bias of its factors has no place in linear layers without one, so no Instruct can hold it",
    "trainable_token_indices": "it trains rows of the embedding beside the factors, which the graft does not pair",
    "layer_replication": "it repeats layers, so the trained model has layers that the Instruct hasn't",
    "alora_invocation_tokens": "its factors act on some positions only, so there is no update of the weights",
    "use_qalora": "its factors act on pooled inputs, so there is no update of the weights of this shape",
    "use_bdlora": "its factors are block-diagonal, which has not been proven exact here",
    "arrow_config": "it mixes several adapters per token, so there is no one update of the weights",
    "kasa_config": "its update is not host + scaling * B @ A",
    "velora_config": "it changes what the backward pass sees, which has not been proven exact here",
    "monteclora_config": "it samples its factors, so there is no one update of the weights",
}


def require_graftable(adapter: LoraConfig | None) -> None:
    """Raise unless the graft of an adapter of these settings is exact.

    Exact are LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732) with any rank and alpha patterns, biases, and
    ``modules_to_save``, on modules and on bare parameters (fused experts); and starts taken from the weights (PiSSA,
    OLoRA …), whose residual is part of the update.

    Raises:
        GraftError: Naming every setting that makes the graft inexact, with the reason.
    """
    if adapter is None:
        return
    problems = [
        f"adapter.{name}={getattr(adapter, name)!r} can't be grafted exactly: {reason}"
        for name, reason in _REFUSED.items()
        if getattr(adapter, name, None)
    ]
    if problems:
        raise GraftError(
            ". ".join(problems) + ". Use LoRA, rsLoRA (adapter.use_rslora=true) or full tuning (adapter=null)."
        )


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
    """A layer of the host with the LoRA factors of one adapter, and the scale they act with."""

    layer: LoraLayer
    adapter: str
    scaling: float  # peft's own: alpha / rank, or alpha / sqrt(rank) for rsLoRA

    def delta_weight(self, host: Tensor) -> Tensor:
        """This rank's part of the update of the host's weight, as the factors train it; a collective if sharded."""
        acting = self.layer.scaling[self.adapter]  # peft multiplies by it, and a graft may have set it to zero
        self.layer.scaling[self.adapter] = self.scaling
        # A product of sharded factors would be added up in another order, with other last bits.
        product = _Product(self.layer)
        factors = {
            name: whole(local(parameter), parameter)
            for name, parameter in product.named_parameters()
            if name.startswith("layer.lora_")
        }
        update = functional_call(product, factors, (self.adapter,))
        self.layer.scaling[self.adapter] = acting
        return update[local_slices(host)] if isinstance(host, DTensor) else update

    def set_scale(self, scale: float) -> None:
        """Let the factors act with ``scale`` times their own scaling: 1 as they train; 0 switches the adapter off.

        Factors that are not finite, times 0, would not be 0.
        """
        self.layer.scaling[self.adapter] = self.scaling * scale
        self.layer._disable_adapters = scale == 0


def adapted_layers(model: nn.Module) -> dict[str, tuple[LoraLayer, str]]:
    """The LoRA layers of ``model`` and their active adapters, by the checkpoint names of the weights they adapt."""
    layers = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if len(module.active_adapters) != 1 or module.merged:
            raise GraftError(
                f"{prefix} has the active adapters {module.active_adapters} "
                f"({'merged' if module.merged else 'not merged'}); expected exactly one, not merged."
            )
        parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        layers[canonical_name(f"{prefix}.{parameter}")] = (module, module.active_adapters[0])
    return layers


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


def starts_from_weights(adapter: LoraConfig) -> bool:
    """Whether peft takes the start of the factors out of the host's weights, and leaves a residual (PiSSA, OLoRA …)."""
    return adapter.init_lora_weights not in (True, False, "gaussian")


def why_not_movable(adapter: LoraConfig | None, transformed: bool) -> str | None:
    """Why an adapter's factors don't give the graft on the Instruct; None where they do."""
    if adapter is None:
        return "Every weight is trained."
    if starts_from_weights(adapter) or adapter.modules_to_save or adapter.bias != "none":
        return (
            "One that starts from the weights, or trains biases or whole modules besides its factors, means another "
            "update on the Instruct than on the Base."
        )
    if transformed:
        return (
            "The graft transforms the update (graft.transforms), so the adapter's factors do not give it; "
            "export.parts=[delta] and 'delta lora' make an adapter of it."
        )
    return None


def leaves_residual(model: nn.Module) -> bool:
    """Whether the frozen weights under the adapter of ``model`` are a residual instead of the host's own."""
    return any(starts_from_weights(adapter) for adapter in getattr(model, "peft_config", {}).values())
