"""Attention of variable length: every sample of a packed row by itself, at the cost of its own length squared.

With a mask, packed rows cost the square of the whole row. Here torch's own flash kernel gets the samples' borders
(``torch.nn.attention.varlen``, no package needed); where it is unavailable, on a CPU or in float32, each sample is
computed separately. It is registered in transformers as ``varlen`` (``model.attn_implementation``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from shadowlit.errors import ShadowlitError
from shadowlit.pair.folders import is_image_text

NAME = "varlen"
_TAKES_BORDERS = (NAME, "flash_attention_2", "flash_attention_3", "flash_attention_4")


def borders_of(position_ids: Tensor) -> dict[str, Any]:
    """Return where the samples of packed rows begin, under the names by which transformers passes them to attention.

    Best computed while a batch is on the CPU: the length of the longest sample is a Python number, for which every
    layer would have to wait for a GPU.

    Args:
        position_ids: ``[B, T]`` int64, 0 at the first token of each sample; every row begins with one.

    Returns:
        ``cu_seq_lens_q`` and ``cu_seq_lens_k``: int32 ``[N + 1]``, the first token of each of the N samples in the
        concatenated rows, and ``B * T``. ``max_length_q`` and ``max_length_k``: tokens of the longest sample.
    """
    begins = (position_ids.flatten() == 0).nonzero().flatten()
    borders = torch.cat([begins, begins.new_tensor([position_ids.numel()])]).to(torch.int32)
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def takes_borders(attn_implementation: str) -> bool:
    """Return whether attention of this name takes :func:`borders_of`; others get a mask from ``position_ids``."""
    return attn_implementation in _TAKES_BORDERS


def knows_attention_of(config: PreTrainedConfig) -> bool:
    """Return whether a model's attention is what :func:`varlen_attention` computes: no caps of scores, no sinks."""
    text = config.get_text_config()
    return getattr(text, "attn_logit_softcapping", None) is None and text.model_type != "gpt_oss"


def kernel_of(name: str, config: PreTrainedConfig, *, packs: bool, compiled: bool) -> str:
    """Return the name of a model's attention kernel in transformers, with ``auto`` decided: varlen for packed rows,
    else sdpa.

    Raises:
        ShadowlitError: The model has a vision tower, and the kernel is causal in every layer.
    """
    if name == NAME and is_image_text(config):
        raise ShadowlitError(
            f"model.attn_implementation is {NAME!r}, which is causal in every layer, but '{config.model_type}' "
            "has a vision tower, in which patches see each other. Use sdpa or flash_attention_2."
        )
    if name != "auto":
        return name
    return NAME if packs and not compiled and not is_image_text(config) and knows_attention_of(config) else "sdpa"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample; a function of transformers' attention interface.

    ``query`` is ``[B, H, T, D]``, ``key`` and ``value`` are ``[B, H_kv, T, D]`` with H a multiple of H_kv, the result
    is ``[B, T, H, D]``. A token sees ``sliding_window`` tokens, itself included. Without ``cu_seq_lens_q`` (see
    :func:`borders_of`) the borders are found in ``position_ids`` ``[B or 1, T]``, and without these each row is one
    sample. A batch with an ``attention_mask`` ``[B, 1, T, T]`` is padded, and left to ``sdpa``; so are the tokens of an
    answer, which see more keys, from the cache, than there are queries.

    Raises:
        ShadowlitError: The model caps its scores or has attention sinks (Gemma 2, GPT-OSS).
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ShadowlitError(
                f"model.attn_implementation is 'varlen', but {type(module).__name__} needs '{name}', which it doesn't "
                "know. Set it to 'eager', or to 'flash_attention_2' where that is installed."
            )
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, _, length, _ = query.shape
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings are float32, and so is what they turn
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if cu_seq_lens_q is None or max_length_q is None:
        if position_ids is None:
            position_ids = torch.arange(length, device=query.device)[None]
        borders = borders_of(position_ids.expand(batch, -1))
        cu_seq_lens_q, max_length_q = borders["cu_seq_lens_q"], borders["max_length_q"]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * T, H, D]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        # (-1, 0) is plain causal; a window counts the tokens to the left of a token.
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        output = varlen_attn(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
            scale=scaling, window_size=window, enable_gqa=key.shape[1] != query.shape[1],
        )  # fmt: skip
        assert isinstance(output, Tensor)
    else:
        output = _one_by_one(q, k, v, cu_seq_lens_q, dropout, scaling, sliding_window)
    return output.unflatten(0, (batch, length)), None


@torch.compiler.disable  # the number of samples decides how many calls there are
def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of each sample by itself; ``[B * T, H, D]`` in and out."""
    lengths = borders.diff().tolist()
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        mask, length = None, len(q)
        if sliding_window is not None and length > sliding_window:
            places = torch.arange(length, device=q.device)
            behind = places[:, None] - places
            mask = (behind >= 0) & (behind < sliding_window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        part = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=True,
        )  # fmt: skip
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def _varlen_mask(**kwargs: Any) -> Tensor | None:
    """No mask for packed rows and whole ones; that of ``sdpa`` for padded ones, and where keys come from a cache."""
    is_plain = kwargs.get("attention_mask") is None and kwargs["q_length"] == kwargs["kv_length"]
    return None if is_plain else sdpa_mask(**kwargs)


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, _varlen_mask)
