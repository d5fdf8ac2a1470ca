"""Which dtypes a processor computes fast."""

from __future__ import annotations

import torch


def slow_on_cpu(dtype: torch.dtype, device: torch.device | str) -> str:
    """Return why a dtype is slow on a device, as a sentence without its full stop; empty if it is not.

    Without the kernels of oneDNN (on x86: without AVX-512), torch multiplies bfloat16 matrices element by element. On
    such a processor bfloat16 reached 0.5 and float32 51 billion operations per second and core.
    """
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    mkldnn, name = torch.ops.mkldnn, str(dtype).removeprefix("torch.")
    fast = mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported()
    return "" if fast else f"This CPU has no kernels for {name}, so that it is up to 100 times slower than float32"
