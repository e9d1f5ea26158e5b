"""`fp8_dense_float`: a weight in floats, quantized at every call."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxfp8 import _derivatives, _explicit_operations, _options
from jaxfp8._explicit import split_of
from jaxfp8.matmul import fp8_dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.quantize import check_float


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


def fp8_dense_float(
    x: Float[Array, "*lead K"],
    w: Float[Array, "K N"],
    bias: Float[Array, " N"] | None = None,
    *,
    activation: str | None = None,
    out_dtype: Any = None,
    residual: Float[Array, "*lead N"] | None = None,
    precision: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*lead N"]:
    """`fp8_dense` on a float weight, quantized at every call: the layer of a training step.

    The result is the one that `fp8_dense(x, PaddedKernel.from_dense(w), bias)` gives; derivatives
    with respect to x, w, bias and residual are those of `activation(x @ w + bias) + residual`
    (straight-through).

    Args:
        x: float array of 16 bits or more, `[*lead, K]`.
        w: float array of 16 bits or more, Flax's `[K, N]`.
        bias: float `[N]`, or None.
        activation: see `fp8_dense`, like `out_dtype`, `residual`, `precision` and
            `implementation`.

    Raises:
        TypeError, ValueError, RuntimeError: as `fp8_dense` and `PaddedKernel.from_dense`.
    """
    check_float(x, "x")
    check_float(w, "w")
    if jnp.ndim(w) != 2:
        raise ValueError(f"`w` must have shape [K, N], but its shape is {jnp.shape(w)}.")
    out_dtype = jnp.dtype(jnp.result_type(x) if out_dtype is None else out_dtype)
    x, w = jnp.asarray(x), jnp.asarray(w)
    if bias is not None:
        shape = (w.shape[1],)
        bias = _options.check_vector(bias, "bias", (shape,), "one value for each output feature")
    # Of the whole result: on a mesh of Explicit axes `fp8_dense` sees a part.
    residual = _options.check_residual(residual, (*x.shape[:-1], w.shape[1]), out_dtype, None)
    if split := split_of(x, w, name="w", features_axis=1):
        return _explicit_operations.dense_float(
            *(x, w, bias, residual),
            operation=fp8_dense_float,
            split=split,
            options=_options.as_pairs(activation, out_dtype, precision, implementation),
        )
    precision = _options.hashable(precision)
    operation = _float_operation(activation, out_dtype, precision, implementation)
    return operation(x, w, bias, residual)


@functools.cache
def _float_operation(activation, out_dtype, precision, implementation):
    def dense(x, w, bias, residual, activation, out_dtype):
        return fp8_dense(
            x,
            PaddedKernel.from_dense(w),
            bias,
            activation=activation,
            out_dtype=out_dtype,
            residual=residual,
            precision=precision,
            implementation=implementation,
        )

    @jax.custom_jvp
    def operation(x, w, bias, residual):
        return dense(x, w, bias, residual, activation, out_dtype)

    @functools.partial(operation.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        x, w, bias, _ = primals
        x_dot, w_dot, bias_dot, residual_dot = tangents
        y = operation(*primals)
        terms = []
        if not _derivatives.is_zero(x_dot):
            terms.append(_matmul(x_dot, w))
        if not _derivatives.is_zero(w_dot):
            terms.append(_matmul(x, w_dot))
        if not _derivatives.is_zero(bias_dot):
            terms.append(bias_dot.reshape((1,) * (jnp.ndim(y) - 1) + (-1,)))
        pre = _float_operation(None, jnp.dtype(jnp.float32), precision, implementation)
        return y, _derivatives.dense_tangent(
            y, terms, residual_dot, activation, lambda: pre(x, w, bias, None)
        )

    return operation


def _matmul(x, w) -> Float32[Array, "*lead N"]:
    with jax.numpy_dtype_promotion("standard"):  # both are floats; "strict" means the caller's
        dtype = jnp.promote_types(x.dtype, w.dtype)
    return jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
