"""Names of parameters: from what wrappers make of them back to what the checkpoint files call them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shadowlit.checkpoint.names import canonical_name, is_adapter_name, is_of_experts, is_original_name, routers
from shadowlit.grafting.quantised import quantised_layers


def host_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of ``model`` that stand for tensors of the checkpoint, by their checkpoint names.

    Adapter factors are left out, and so is the frozen original of a copy that peft trains
    (``modules_to_save``): the copy is the one that the forward pass uses. Shared storage appears once. For a weight in
    4 bits stands a tensor of its shape, without memory.
    """
    parameters: dict[str, Tensor] = {
        canonical_name(name): parameter
        for name, parameter in model.named_parameters()
        if not is_adapter_name(name) and not is_original_name(name)
    }
    return parameters | {name: layer.logical_weight() for name, layer in quantised_layers(model).items()}


def host_of(model: nn.Module) -> Any:
    """Return the transformers model itself, taken out of peft's wrapper where there is one."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def linear_names(model: nn.Module) -> frozenset[str]:
    """Return the checkpoint names of weights and biases of every ``nn.Linear`` of ``model`` but its output head, and of
    experts.

    The paper's code lists seven projections by name; the modules themselves know better, so architectures that
    call them ``wqkv`` or ``w1`` are covered too. The output head maps to the vocabulary and is not a linear layer
    in the sense of the paper. Experts count, which transformers 5 holds in one bare parameter per layer and kind; the
    routers that choose among them don't, as in the paper's code.
    """
    host = host_of(model)
    head = host.get_output_embeddings() if hasattr(host, "get_output_embeddings") else None
    heads = set() if head is None else set(head.modules())  # with what an adapter has wrapped
    linear = {
        canonical_name(f"{prefix}.{name}")
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in heads and not is_adapter_name(prefix)
        for name, _ in module.named_parameters(recurse=False)
    }
    parameters = host_parameters(model)
    experts = {name for name, parameter in parameters.items() if is_of_experts(name) and parameter.dim() >= 2}
    return frozenset(linear | experts) - routers(parameters)
