"""Which adapters train on a Base in 4 bits, and which of its layers are quantised."""

from __future__ import annotations

from importlib.util import find_spec

from peft import PeftConfig
from torch import nn

from shadowlit.checkpoint.names import is_of_experts, tower_of, weight_of
from shadowlit.errors import GraftError
from shadowlit.grafting.adapter import is_plain
from shadowlit.grafting.quantised import FourBitLinear


def require_quantisable(adapter: PeftConfig | None, compiled: bool) -> None:
    """Raise a GraftError unless a Base in 4 bits can be trained with this adapter, in layers compiled or not."""
    if adapter is None:
        reason = "in full tuning, but weights in 4 bits can't be trained. Set model.adapter, e.g. {r: 16}"
    elif not is_plain(adapter) or any(getattr(adapter, n, None) for n in ("target_parameters", "modules_to_save")):
        names = ("use_dora", "target_parameters", "modules_to_save", "trainable_token_indices", "init_lora_weights")
        name = next((name for name in names if getattr(adapter, name, None)), "peft_type")
        reason = (
            f"with adapter.{name}={getattr(adapter, name)!r}, which needs or trains whole weights. Use LoRA or rsLoRA "
            "of linear layers, from its usual start"
        )
    elif compiled:
        reason = "with model.compile_layers=true, which is not proven for it. Set compile_layers=false"
    elif find_spec("bitsandbytes") is None:
        reason = "but its package is not installed. Run 'pip install bitsandbytes' (the extra shadowlit[qlora])"
    else:
        return
    raise GraftError(f"model.quantization is 'nf4' {reason}, or set model.quantization=null.")


def quantise_layers(model: nn.Module) -> None:
    """Replace the linear layers of a language model on the meta device, except the output head, by 4-bit ones.

    Of a vision-language model the other towers stay as they are.

    Raises:
        GraftError: The model has experts, most of whose weights are in no linear layer.
    """
    experts = [name for name, parameter in model.named_parameters() if is_of_experts(name) and parameter.dim() == 3]
    if experts:
        raise GraftError(
            f"model.quantization is 'nf4', but the experts of this model are bare parameters ({experts[0]} …), not "
            "linear layers, and would stay as large as they are. Set model.quantization=null."
        )
    head = model.get_output_embeddings()  # type: ignore[operator]
    for prefix, module in list(model.named_modules()):
        for name, layer in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if type(layer) is nn.Linear and layer is not head and tower_of(weight_of(path)) == "language":
                setattr(module, name, FourBitLinear(layer))
