"""The package needs torch 2.13; a lent machine may have an older one, on which the rest can still be tested."""

from __future__ import annotations

import inspect


def accept_grouped_heads() -> None:
    """Let ``varlen_attn`` of torch 2.11 take ``enable_gqa``: its kernel has grouped heads without being told."""
    from shadowlit.training import varlen

    kernel = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(kernel).parameters:
        return

    def without_enable_gqa(*args, enable_gqa: bool = False, **kwargs):
        return kernel(*args, **kwargs)

    varlen.varlen_attn = without_enable_gqa
