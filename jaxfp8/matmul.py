"""`scaled_matmul`, `fp8_dense` and `fp8_dense_float`: argument checks and transforms."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxfp8 import _derivatives, _explicit_operations, _options
from jaxfp8._explicit import split_of
from jaxfp8.inputs import QuantizedInput, as_quantized_input
from jaxfp8.padded import ALIGNMENT, PaddedKernel, check_kernel
from jaxfp8.quantize import FP8_DTYPE, check_float


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32


def scaled_matmul(
    lhs: Float8e4m3fn[Array, "*lead K_pad"],
    rhs: Float8e4m3fn[Array, "N_pad K_pad"],
    lhs_scale: Float32[Array, "..."],
    rhs_scale: Float32[Array, "..."],
    bias: Float32[Array, " N_pad"] | None = None,
    *,
    activation: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    precision: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*lead N_pad"]:
    """Multiply two quantized arrays, scale, add a bias, activate; round once, at the end.

    Equivalent JAX, all in float32 until the last cast:
    `activation(lhs_scale * (rhs_scale * (lhs @ rhs.T)) + bias).astype(out_dtype)`.

    Args:
        lhs: e4m3 `[*lead, K_pad]`, K_pad a multiple of 16.
        rhs: e4m3 `[N_pad, K_pad]`, K-major, N_pad a multiple of 16.
        lhs_scale: float32 `[]` (per tensor) or `[*lead, 1]` (per token). Told by shape.
        rhs_scale: float32 `[]` (per tensor) or `[N_pad]` (per channel).
        bias: float `[N_pad]`, or None.
        activation: None, "relu", "gelu" (the tanh form) or "silu".
        out_dtype: bfloat16, float16 or float32.
        precision: see `fp8_dense`.
        implementation: see `fp8_dense`.

    Raises:
        TypeError: if an operand is not e4m3, or a scale or the bias not float.
        ValueError: for any shape that does not fit, an unknown activation, out_dtype, precision or
            implementation.
    """
    _options.check_activation(activation)
    _options.check_implementation(implementation)
    out_dtype = _options.check_out_dtype(out_dtype)
    promoted = _options.is_promoted(precision)
    for name, a in (("lhs", lhs), ("rhs", rhs)):
        dtype = getattr(a, "dtype", type(a).__name__)
        if dtype != FP8_DTYPE:
            raise TypeError(
                f"`{name}` must be float8_e4m3fn, but it is {dtype}. Quantize it with "
                "`quantize`, or use `fp8_dense`, which quantizes x itself."
            )
    if lhs.ndim < 1 or rhs.ndim != 2 or lhs.shape[-1] != rhs.shape[1]:
        raise ValueError(
            "`lhs` must be [*lead, K_pad] and `rhs` [N_pad, K_pad] (K-major, so an [in, out] "
            f"weight is transposed first), but their shapes are {lhs.shape} and {rhs.shape}."
        )
    n, k = rhs.shape
    if n % ALIGNMENT or k % ALIGNMENT or n == 0 or k == 0:
        raise ValueError(
            f"`rhs` must have both sides a positive multiple of {ALIGNMENT}, but its shape is "
            f"{rhs.shape}. Pad it with zeros, or use `PaddedKernel.from_dense` and `fp8_dense`."
        )
    lead = lhs.shape[:-1]
    lhs_scale = _options.check_vector(
        lhs_scale, "lhs_scale", ((), (*lead, 1)), "per tensor or per token"
    )
    rhs_scale = _options.check_vector(
        rhs_scale, "rhs_scale", ((), (n,)), "per tensor or per channel"
    )
    if bias is not None:
        bias = _options.check_vector(bias, "bias", ((n,),), "one value for each output feature")
    if split := split_of(lhs, rhs, name="rhs", features_axis=0):
        return _explicit_operations.matmul(
            *(lhs, rhs, lhs_scale, rhs_scale, bias),
            operation=scaled_matmul,
            split=split,
            options=_pairs(activation, out_dtype, precision, implementation),
        )
    if 0 in lead:
        return jnp.zeros((*lead, n), out_dtype)
    operation = _derivatives.matmul_operation(n, activation, out_dtype, promoted, implementation)
    m = _options.rows(lead)
    lhs_scale = lhs_scale.reshape(m, 1) if lhs_scale.ndim else lhs_scale
    y = operation(lhs.reshape(m, k), rhs, lhs_scale, rhs_scale, bias, None)
    return y.reshape(*lead, n)


def fp8_dense(
    x: Any,
    kernel: PaddedKernel,
    bias: Float32[Array, " N"] | None = None,
    *,
    activation: str | None = None,
    x_scale: Float32[Array, ""] | None = None,
    out_dtype: Any = None,
    out_scale: Float32[Array, ""] | None = None,
    precision: Any = None,
    implementation: str | None = None,
) -> Any:
    """A dense layer on FP8 tensor cores: quantize x, multiply by the padded kernel, slice to N.

    Equivalent JAX: `activation(x @ kernel.dequantize() + bias).astype(out_dtype)`, with x rounded
    to e4m3 and everything after the product in float32. On a Hopper GPU it is one custom call.
    Derivatives with respect to x and bias are straight-through (as if x were not rounded).

    Args:
        x: float array of 16 bits or more, `[*lead, K]`, any number of leading axes. float64
            computes in float32 and casts back. Or one already quantized: a QuantizedInput (from
            `quantize_input`, or from a layer with `out_scale`), or a pair `(qx, scale)` as
            `quantize` returns it, e4m3 `[*lead, K]` and float32 `[*lead, 1]` or `[]`.
        kernel: a PaddedKernel for one layer (no stack), logical size K x N.
        bias: float `[N]`, added in float32, or None.
        activation: None, "relu", "gelu" (the tanh form) or "silu", applied in float32.
        x_scale: float32 `[]`, a static scale of x (values past ±448·x_scale saturate). None: one
            scale for each row, from its absolute maximum.
        out_dtype: bfloat16, float16, float32 or float64; None is x's dtype, or bfloat16 for a
            quantized x. float8_e4m3fn is said by `out_scale`, and may be.
        out_scale: float32 `[]`, a static scale by which the result is quantized in the same
            kernel: the next layer's `x_scale`. The result is a QuantizedInput of N features.
        precision: None follows `jax_default_matmul_precision`. DEFAULT accumulates inside the
            tensor core (about 14 bits); HIGH and HIGHEST promote partial sums to float32;
            `DotAlgorithmPreset.ANY_F8_ANY_F8_F32[_FAST_ACCUM]` says it outright. Without CUTLASS
            the accumulator is float32 always.
        implementation: "cutlass" or "xla" is that one, or an error that says why not. None takes
            CUTLASS where it can run.

    Returns:
        `[*lead, N]` of `out_dtype`, or a QuantizedInput if `out_scale` was given.

    Raises:
        TypeError: if x is not a float of 16 bits or more, a leaf of the kernel was cast, or the
            result is differentiated with respect to the kernel, or where something is quantized.
        ValueError: if a shape does not fit, or an option is unknown.
        RuntimeError: when run, if "cutlass" was named and cannot run here.
    """
    _options.check_activation(activation)
    _options.check_implementation(implementation)
    promoted = _options.is_promoted(precision)
    qx = as_quantized_input(x, "x") if isinstance(x, QuantizedInput | tuple) else None
    if qx is None:
        check_float(x, "x")
        x = jnp.asarray(x)
    shape = x.shape if qx is None else qx.shape
    check_kernel(kernel, "kernel")
    k, n = kernel.in_features, kernel.out_features
    if kernel.stack:
        raise ValueError(
            f"`kernel` must be one layer's, but it is a stack of shape {kernel.stack}. Use "
            "`jax.vmap` or `nn.scan` over the stack."
        )
    if not shape or shape[-1] != k:
        raise ValueError(
            f"`x` must have {k} features in its last axis, the in_features of `kernel`, but its "
            f"shape is {shape}."
        )
    if bias is not None:
        bias = _options.check_vector(bias, "bias", ((n,),), "one value for each output feature")
    if x_scale is not None:
        x_scale = _options.check_vector(x_scale, "x_scale", ((),), "one static scale")
    if qx is not None and x_scale is not None:
        raise ValueError("`x_scale` must be None for an `x` that is quantized: it has its own.")
    if out_dtype is None and out_scale is None:
        out_dtype = x.dtype if qx is None else jnp.bfloat16
    result_dtype, work_dtype, out_scale = _options.check_result(out_dtype, out_scale)
    values = x if qx is None else qx.qvalue
    if split := split_of(values, kernel.qvalue, name="kernel", features_axis=0):
        y = _explicit_operations.dense(
            *(fp8_dense, split, x if qx is None else qx, kernel, bias, x_scale, out_scale),
            options=_pairs(activation, out_dtype, precision, implementation),
        )
        return y if out_scale is None else QuantizedInput(y, out_scale, n)
    lead = shape[:-1]
    m = _options.rows(lead)
    width = n if out_scale is None else kernel.qvalue.shape[0]
    options = (activation, work_dtype, promoted, implementation)
    if 0 in lead:
        y = jnp.zeros((*lead, width), work_dtype)
    elif qx is not None:
        qvalue = qx.qvalue.reshape(m, kernel.qvalue.shape[1])
        scale = qx.scale.reshape(m, 1) if qx.scale.ndim else qx.scale
        operation = _derivatives.matmul_operation(n, *options)
        y = operation(qvalue, kernel.qvalue, scale, kernel.scale, bias, out_scale)
    else:
        x = x.astype(jnp.float32) if x.dtype == jnp.float64 else x
        operation = _derivatives.dense_operation(*options)
        y = operation(x.reshape(m, k), kernel, bias, x_scale, out_scale)
    y = y.reshape(*lead, width).astype(result_dtype)
    return y if out_scale is None else QuantizedInput(y, out_scale, n)


def fp8_dense_float(
    x: Float[Array, "*lead K"],
    w: Float[Array, "K N"],
    bias: Float[Array, " N"] | None = None,
    *,
    activation: str | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*lead N"]:
    """`fp8_dense` on a float weight, quantized at every call: the layer of a training step.

    The result is the one that `fp8_dense(x, PaddedKernel.from_dense(w), bias)` gives; derivatives
    with respect to x, w and bias are those of `activation(x @ w + bias)` (straight-through).

    Args:
        x: float array of 16 bits or more, `[*lead, K]`.
        w: float array of 16 bits or more, Flax's `[K, N]`.
        bias: float `[N]`, or None.
        activation: see `fp8_dense`, like `out_dtype`, `precision` and `implementation`.

    Raises:
        TypeError, ValueError, RuntimeError: as `fp8_dense` and `PaddedKernel.from_dense`.
    """
    check_float(x, "x")
    check_float(w, "w")
    if jnp.ndim(w) != 2:
        raise ValueError(f"`w` must have shape [K, N], but its shape is {jnp.shape(w)}.")
    out_dtype = jnp.dtype(jnp.result_type(x) if out_dtype is None else out_dtype)
    x, w = jnp.asarray(x), jnp.asarray(w)
    if split := split_of(x, w, name="w", features_axis=1):
        return _explicit_operations.dense_float(
            *(x, w, bias),
            operation=fp8_dense_float,
            split=split,
            options=_pairs(activation, out_dtype, precision, implementation),
        )
    operation = _float_operation(activation, out_dtype, _freeze(precision), implementation)
    return operation(x, w, bias)


@functools.cache
def _float_operation(activation, out_dtype, precision, implementation):
    def dense(x, w, bias, activation, out_dtype):
        return fp8_dense(
            x,
            PaddedKernel.from_dense(w),
            bias,
            activation=activation,
            out_dtype=out_dtype,
            precision=precision,
            implementation=implementation,
        )

    @jax.custom_jvp
    def operation(x, w, bias):
        return dense(x, w, bias, activation, out_dtype)

    @operation.defjvp
    def _(primals, tangents):
        x, w, bias = primals
        x_dot, w_dot, bias_dot = tangents
        y = operation(x, w, bias)
        y_dot = _matmul(x_dot, w) + _matmul(x, w_dot)
        if bias is not None:
            y_dot += bias_dot.astype(jnp.float32).reshape((1,) * (y_dot.ndim - 1) + (-1,))
        pre = _float_operation(None, jnp.dtype(jnp.float32), precision, implementation)
        return y, _derivatives.activation_jvp(activation, out_dtype, y_dot, lambda: pre(x, w, bias))

    return operation


def _matmul(x, w) -> Float32[Array, "*lead N"]:
    with jax.numpy_dtype_promotion("standard"):  # both are floats; "strict" means the caller's
        dtype = jnp.promote_types(x.dtype, w.dtype)
    return jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)


def _pairs(activation: Any, out_dtype: Any, precision: Any, implementation: Any) -> tuple:
    """The options of an operation, hashable."""
    return (
        ("activation", activation),
        ("out_dtype", out_dtype),
        ("precision", _freeze(precision)),
        ("implementation", implementation),
    )


def _freeze(precision: Any) -> Any:
    return tuple(precision) if isinstance(precision, list) else precision
