"""The operations in plain JAX: the reference, and what runs where CUTLASS cannot.

e4m3 fits bfloat16 exactly, and so does every product of two of them fit float32; so bfloat16
operands with float32 accumulation are exact up to the order of the sums. Measured on a 2-core
CPU at 256x4096x4096: 18 ms this way, 32 ms with float32 operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfp8.quantize import cast_to_fp8, quantize


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32


# The order is the CUDA handler's numbering (`cuda/src/gemm.h`, enum Activation).
ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda y: y,
    "relu": lambda y: jnp.maximum(y, 0),
    "gelu": lambda y: jax.nn.gelu(y, approximate=True),
    "silu": jax.nn.silu,
}


def scaled_matmul(
    lhs: Float8e4m3fn[Array, "M K_pad"],
    rhs: Float8e4m3fn[Array, "N_pad K_pad"],
    lhs_scale: Float32[Array, "..."],
    rhs_scale: Float32[Array, "..."],
    bias: Float32[Array, " N"] | None,
    out_scale: Float32[Array, ""] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    out_features: int,
    activation: str | None,
    out_dtype: Any,
    promoted: bool,
) -> Float[Array, "M N"] | Float8e4m3fn[Array, "M N_pad"]:
    """`activation(lhs_scale * rhs_scale * (lhs @ rhs.T) + bias) + residual`, rounded once.

    All in float32. With `out_scale`, and no residual, the result is quantized by it, and stays
    padded for the next product.

    On a CPU the accumulator is float32 either way. On a GPU XLA may see through the casts and take
    an FP8 product of cuBLASLt's, which it accumulates fast at DEFAULT precision alone.
    """
    # Without the barrier XLA on a GPU takes the rounding to e4m3 out of a compiled chain of two
    # layers, and multiplies what was to be rounded (jax 0.11.2 on an H200: 2.6 % off).
    lhs = lax.optimization_barrier(lhs)
    precision = lax.Precision.HIGHEST if promoted else lax.Precision.DEFAULT
    y = contract(lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16), precision)
    y = lhs_scale * (as_row(rhs_scale) * y)
    if bias is not None:
        y = y + as_row(pad_last(bias, rhs.shape[0]))
    y = ACTIVATIONS[activation](y)
    if out_scale is not None:
        return cast_to_fp8(y, out_scale)
    y = y[:, :out_features]
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def quantize_rows(
    x: Float[Array, "M K"], x_scale: Float32[Array, ""] | None, *, width: int
) -> tuple[Float8e4m3fn[Array, "M K_pad"], Float32[Array, "..."]]:
    """x by a scale for each row or by `x_scale`, zero-padded to `width`, and that scale."""
    if x_scale is None:
        qx, scale = quantize(x, axis=-1)
    else:
        qx, scale = cast_to_fp8(x, x_scale), x_scale
    return pad_last(qx, width), scale


def dense(
    x: Float[Array, "M K"],
    qvalue: Float8e4m3fn[Array, "N_pad K_pad"],
    scale: Float32[Array, "..."],
    bias: Float32[Array, " N"] | None,
    x_scale: Float32[Array, ""] | None,
    out_scale: Float32[Array, ""] | None = None,
    residual: Float[Array, "M N"] | None = None,
    **options: Any,
) -> Float[Array, "M N"] | Float8e4m3fn[Array, "M N_pad"]:
    """`quantize_rows`, then `scaled_matmul`, whose options these are."""
    qx, lhs_scale = quantize_rows(x, x_scale, width=qvalue.shape[1])
    return scaled_matmul(qx, qvalue, lhs_scale, scale, bias, out_scale, residual, **options)


def contract(
    a: Float[Array, "M K"], b: Float[Array, "N K"], precision: lax.Precision | None = None
) -> Float32[Array, "M N"]:
    """`a @ b.T` accumulated in float32, neither operand transposed in memory."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def pad_last(x: Array, size: int) -> Array:
    """Zero-pad the last axis to `size`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def as_row(a: Array) -> Array:
    """A vector of features as `[1, N]`, so that `jax_numpy_rank_promotion="raise"` is content."""
    return a[None, :] if a.ndim else a
