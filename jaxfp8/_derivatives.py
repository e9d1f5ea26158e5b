"""The operations with their derivative rules: straight-through in x, refused in FP8 operands."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxfp8 import _dispatch, _xla
from jaxfp8._vmap import fold_rows
from jaxfp8.padded import PaddedKernel
from jaxfp8.quantize import is_fp8


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


@functools.cache
def matmul_operation(out_features, activation, out_dtype, promoted, implementation):
    """`(lhs, rhs, lhs_scale, rhs_scale, bias, out_scale, residual) -> [M, N]`.

    Differentiable in the scales, the bias and the residual, if the result is a float.
    """
    static = dict(
        out_features=out_features, activation=activation, out_dtype=out_dtype, promoted=promoted
    )

    @fold_rows(rows=(True, False, None, False, False, False, True))
    def primal(*args):
        return _dispatch.call("scaled_matmul", implementation, *args, **static)

    operation = jax.custom_jvp(primal)

    @functools.partial(operation.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        lhs, rhs, *floats = primals
        if not is_zero(tangents[:2]):
            raise TypeError(
                "The operands of this product are float8_e4m3fn and cannot be differentiated. "
                "Differentiate `fp8_dense` with respect to a float x, train a layer with a float "
                "`param_dtype`, or wrap them in `jax.lax.stop_gradient`."
            )
        _refuse_quantized_result(out_dtype)
        y = operation(*primals)
        *of_product, of_residual = tangents[2:]
        if is_zero(of_product) and not is_zero(of_residual):
            return y, jnp.zeros_like(y) + of_residual
        reference = functools.partial(_xla.scaled_matmul, lhs, rhs, **static)
        _, tangent = jax.jvp(reference, tuple(floats), _instantiate(floats, tangents[2:]))
        return y, tangent

    return operation


@functools.cache
def dense_operation(activation, out_dtype, promoted, implementation):
    """`(x, kernel, bias, x_scale, out_scale, residual) -> [M, N]`.

    Differentiable in x, the bias and the residual.
    """

    @fold_rows(rows=(True, False, False, False, False, True))
    def primal(x, kernel, bias, x_scale, out_scale, residual):
        return _dispatch.call(
            "dense",
            implementation,
            x,
            kernel.qvalue,
            kernel.scale,
            bias,
            x_scale,
            out_scale,
            residual,
            out_features=kernel.out_features,
            activation=activation,
            out_dtype=out_dtype,
            promoted=promoted,
        )

    operation = jax.custom_jvp(primal)

    @functools.partial(operation.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        _, kernel, *_ = primals
        x_dot, kernel_dot, bias_dot, _, _, residual_dot = tangents
        if not is_zero(kernel_dot):
            raise TypeError(
                "`kernel` is a PaddedKernel, which holds FP8 weights and cannot be differentiated. "
                "To train the layer give it a float `param_dtype` (for example jnp.float32); to "
                "train something else beside it, pass `jax.lax.stop_gradient(params)`."
            )
        _refuse_quantized_result(out_dtype)
        y = operation(*primals)
        terms = []
        if not is_zero(x_dot):
            # x_scale drops out: rounding is straight-through, so x_scale * (x / x_scale) is x.
            terms.append(_tangent_matmul(x_dot, kernel))
        if not is_zero(bias_dot):
            terms.append(_xla.as_row(bias_dot))
        # Without the residual, which may vary over more of a shard_map's axes.
        pre = dense_operation(None, jnp.dtype(jnp.float32), promoted, implementation)
        return y, dense_tangent(
            y, terms, residual_dot, activation, lambda: pre(*primals[:-1], None)
        )

    return operation


@functools.cache
def quantize_operation(width, implementation):
    """`(x, x_scale) -> (qx [M, width], scale [M, 1])`, or `(qx,)` with an x_scale."""

    @fold_rows(rows=(True, False))
    def primal(x, x_scale):
        outs = _dispatch.call("quantize_rows", implementation, x, x_scale, width=width)
        return outs if x_scale is None else outs[:1]

    operation = jax.custom_jvp(primal)

    @functools.partial(operation.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        raise TypeError(
            "An input that is quantized once for several layers cannot be differentiated. Give "
            "`fp8_dense` the float x, whose derivative is straight-through, or wrap x in "
            "`jax.lax.stop_gradient`."
        )

    return operation


def _refuse_quantized_result(out_dtype: Any) -> None:
    if is_fp8(out_dtype):
        raise TypeError(
            "A quantized result (`out_scale`) cannot be differentiated. Leave `out_scale` out: the "
            "next layer then quantizes a float, whose derivative is straight-through."
        )


def dense_tangent(y, terms, residual_dot, activation, pre) -> Float[Array, "*lead N"]:
    """The tangent of a dense layer's result y, summed in float32.

    Only what is not zero is formed: a residual alone asks for no product, and of an activation
    whose pre-activation is infinite it gets no NaN.

    Args:
        y: the result, float `[*lead, N]`.
        terms: float32 tangents that are summed before the activation, each of a shape that
            broadcasts to y's.
        residual_dot: of y's shape, a symbolic zero, or None.
        activation: a name, or None.
        pre: a function that computes the float32 pre-activation.
    """
    y_dot = jnp.zeros_like(y, jnp.float32)  # varies over a shard_map's axes as y does
    if terms:
        z = y if activation is None else pre()
        z_dot = functools.reduce(jnp.add, terms, jnp.zeros_like(z, jnp.float32))
        if activation is not None:
            _, z_dot = jax.jvp(_xla.ACTIVATIONS[activation], (z,), (z_dot,))
        y_dot += z_dot
    if not is_zero(residual_dot):
        y_dot += residual_dot.astype(jnp.float32)
    return y_dot.astype(y.dtype)


def _tangent_matmul(x_dot, kernel: PaddedKernel) -> Float32[Array, "M N"]:
    """`x_dot @ kernel.dequantize()`. e4m3 is exact in x's dtype, so only the scale waits."""
    qvalue = kernel.qvalue.astype(x_dot.dtype)
    y_dot = _xla.contract(_xla.pad_last(x_dot, qvalue.shape[1]), qvalue)
    y_dot *= _xla.as_row(kernel.scale)
    return y_dot[:, : kernel.out_features]


def is_zero(tangents: Any) -> bool:
    """Whether all tangents are symbolic zeros; those of None are."""
    leaves = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    return all(isinstance(t, SymbolicZero) for t in leaves)


def _instantiate(primals: Any, tangents: Any) -> tuple:
    def one(p, t):
        return jnp.zeros_like(p) if isinstance(t, SymbolicZero) else t

    return tuple(jax.tree.map(one, tuple(primals), tuple(tangents)))
