"""torch's FP8 product on the very bits that ours gets."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch


def scaled_product(
    x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array, *, fast: bool
) -> np.ndarray:
    """`torch._scaled_mm` of e4m3 `[M, K]` and `[N, K]`, rounded to bfloat16, as float32 `[M, N]`.

    The scales are `[M, 1]` and `[N]` (its row-wise kernel), or both `[]` (cuBLASLt).

    Raises:
        RuntimeError: if torch has no kernel for it.
    """
    scale_b = _float(w_scale)
    product = torch._scaled_mm(
        _fp8(x),
        _fp8(w).t(),
        scale_a=_float(x_scale),
        scale_b=scale_b.unsqueeze(0) if scale_b.ndim else scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
    return product.float().cpu().numpy()


def _fp8(a: Any) -> torch.Tensor:
    codes = np.array(a).view(np.uint8)
    return torch.from_numpy(codes).to("cuda").view(torch.float8_e4m3fn)


def _float(a: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(a), device="cuda")
