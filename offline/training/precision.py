"""In which precision this machine multiplies matrices fastest: bfloat16 where it has instructions for that.

Read by tower training. Invariant: measured once per process and device; the
weights stay float32, whatever the products are in.
"""

import time
from functools import lru_cache

import torch

# bfloat16 must be so much faster to be worth its rounding.
_LEAST_GAIN = 1.5
_TRIES = 5


@lru_cache(maxsize=4)
def products_precision(device: str) -> torch.dtype:
    """torch.bfloat16 or torch.float32."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    full, low = _product_seconds(torch.float32), _product_seconds(torch.bfloat16)
    return torch.bfloat16 if full > _LEAST_GAIN * low else torch.float32


def _product_seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(512, 128, dtype=dtype), torch.ones(128, 2048, dtype=dtype)
    seconds = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return min(seconds)
