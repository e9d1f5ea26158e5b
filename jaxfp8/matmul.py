"""`scaled_matmul` and `fp8_dense`: argument checks, and which operation computes what is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxfp8 import _derivatives, _explicit_operations, _options
from jaxfp8._explicit import split_of, whole
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
            options=_options.as_pairs(activation, out_dtype, precision, implementation),
        )
    if 0 in lead:
        return jnp.zeros((*lead, n), out_dtype)
    operation = _derivatives.matmul_operation(n, activation, out_dtype, promoted, implementation)
    m = _options.rows(lead)
    lhs_scale = lhs_scale.reshape(m, 1) if lhs_scale.ndim else lhs_scale
    y = operation(lhs.reshape(m, k), rhs, lhs_scale, rhs_scale, bias, None, None)
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
    residual: Float[Array, "*lead N"] | None = None,
    precision: Any = None,
    implementation: str | None = None,
) -> Any:
    """A dense layer on FP8 tensor cores: quantize x, multiply by the padded kernel, slice to N.

    Equivalent JAX: `(activation(x @ kernel.dequantize() + bias) + residual).astype(out_dtype)`,
    with x rounded to e4m3 and everything after the product in float32. On a Hopper GPU it is one
    custom call. Derivatives with respect to x, bias and residual are straight-through (as if x were
    not rounded).

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
        residual: `[*lead, N]` of the result's dtype, added in float32 behind the activation, before
            the one rounding: `x + dense(h)`. In the same kernel where the result has 16 bits and
            its rows are multiples of 16 bytes; else XLA adds it. Not with an `out_scale`.
        precision: None follows `jax_default_matmul_precision`. DEFAULT accumulates inside the
            tensor core (about 14 bits); HIGH and HIGHEST promote partial sums to float32;
            `DotAlgorithmPreset.ANY_F8_ANY_F8_F32[_FAST_ACCUM]` says it outright. Without CUTLASS
            the accumulator is float32 always.
        implementation: "cutlass" or "xla" is that one, or an error that says why not. None takes
            CUTLASS where it can run.

    Returns:
        `[*lead, N]` of `out_dtype`, or a QuantizedInput if `out_scale` was given.

    Raises:
        TypeError: if x is not a float of 16 bits or more, the residual not of the result's dtype, a
            leaf of the kernel was cast, or the result is differentiated with respect to the kernel,
            or where something is quantized.
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
    lead = shape[:-1]
    residual = _options.check_residual(residual, (*lead, n), result_dtype, out_scale)
    values = x if qx is None else qx.qvalue
    if split := split_of(values, kernel.qvalue, name="kernel", features_axis=0):
        operands = x if qx is None else qx, kernel, bias, x_scale, out_scale, residual
        y = _explicit_operations.dense(
            *operands,
            operation=fp8_dense,
            split=split,
            options=_options.as_pairs(activation, out_dtype, precision, implementation),
        )
        return y if out_scale is None else QuantizedInput(y, out_scale, n)
    bias, residual = whole(bias), whole(residual)
    m = _options.rows(lead)
    if residual is not None:
        residual = residual.astype(work_dtype).reshape(m, n)
    width = n if out_scale is None else kernel.qvalue.shape[0]
    options = (activation, work_dtype, promoted, implementation)
    if 0 in lead:
        y = jnp.zeros((*lead, width), work_dtype)
    elif qx is not None:
        qvalue = qx.qvalue.reshape(m, kernel.qvalue.shape[1])
        scale = qx.scale.reshape(m, 1) if qx.scale.ndim else qx.scale
        operation = _derivatives.matmul_operation(n, *options)
        y = operation(qvalue, kernel.qvalue, scale, kernel.scale, bias, out_scale, residual)
    else:
        x = x.astype(jnp.float32) if x.dtype == jnp.float64 else x
        operation = _derivatives.dense_operation(*options)
        y = operation(x.reshape(m, k), kernel, bias, x_scale, out_scale, residual)
    y = y.reshape(*lead, width).astype(result_dtype)
    return y if out_scale is None else QuantizedInput(y, out_scale, n)
