"""The operations on a mesh of Explicit axes: each by itself on every device's part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxfp8._explicit import Split, check_divides
from jaxfp8._xla import pad_last
from jaxfp8.padded import PaddedKernel, padded_size


# Compiled, because JAX runs a `shard_map` over some axes of a mesh only so. `operation` is the
# public one, on each device; its `options` are pairs, and hashable.
_compiled = functools.partial(jax.jit, static_argnames=("operation", "split", "options"))


def dense(
    x: Any,
    kernel: PaddedKernel,
    bias: Any,
    x_scale: Any,
    out_scale: Any,
    residual: Any,
    *,
    operation: Callable,
    split: Split,
    options: tuple,
) -> Any:
    """`fp8_dense`; x is a float or a QuantizedInput.

    A device has some of the kernel's *padded* rows, so it multiplies by them all: which of them are
    logical shows when the parts lie side by side. With an out_scale the qvalue is returned.
    """
    if out_scale is None:
        check_divides(kernel.qvalue, 0, kernel.out_features, "kernel")
    operands = x, kernel, bias, x_scale, out_scale, residual
    return _dense(*operands, operation=operation, split=split, options=options)


@_compiled
def _dense(x, kernel, bias, x_scale, out_scale, residual, *, operation, split, options):
    n, n_pad = kernel.out_features, kernel.qvalue.shape[0]
    if split.features is not None and n < n_pad:
        # First to where they are wanted: what splits them now need not divide the padded size.
        if bias is not None:
            bias = pad_last(split.bring(split.of_features(bias), bias), n_pad)
        if residual is not None:
            residual = pad_last(split.bring(split.result, residual), n_pad)

    def local(x, kernel, bias, scales, residual):
        rows = kernel.qvalue.shape[0]
        if split.features is not None:
            kernel = _of_rows(kernel)
        scales = dict(zip(("x_scale", "out_scale"), scales, strict=True))
        y = operation(x, kernel, bias, **scales, residual=residual, **dict(options))
        return y if out_scale is None else y.qvalue[..., :rows]

    scales = (x_scale, out_scale)
    specs = (
        jax.tree.map(split.of_rows, x),
        *jax.tree.map(split.of_features, (kernel, bias)),
        jax.tree.map(lambda _: PartitionSpec(), scales),
        None if residual is None else split.result,
    )
    y = split.run(local, (x, kernel, bias, scales, residual), specs, split.result)
    if split.features is not None and out_scale is None:
        return lax.slice_in_dim(y, 0, n, axis=y.ndim - 1)
    return y


@_compiled
def dense_float(x, w, bias, residual, *, operation, split, options):
    """`fp8_dense_float`. A device quantizes and pads the columns of w that it has."""
    specs = (
        split.of_rows(x),
        PartitionSpec(None, split.features),
        None if bias is None else split.of_features(bias),
        None if residual is None else split.result,
    )

    def local(x, w, bias, residual):
        return operation(x, w, bias, residual=residual, **dict(options))

    return split.run(local, (x, w, bias, residual), specs, split.result)


@_compiled
def matmul(lhs, rhs, lhs_scale, rhs_scale, bias, *, operation, split, options):
    """`scaled_matmul`."""

    def local(lhs, rhs, lhs_scale, rhs_scale, bias):
        rows = rhs.shape[0]
        rhs, rhs_scale = _padded(rhs), _padded(rhs_scale, 1)
        bias = None if bias is None else _padded(bias)
        return operation(lhs, rhs, lhs_scale, rhs_scale, bias, **dict(options))[..., :rows]

    specs = (
        split.of_rows(lhs),
        split.of_features(rhs),
        split.of_rows(lhs_scale),
        split.of_features(rhs_scale),
        None if bias is None else split.of_features(bias),
    )
    return split.run(local, (lhs, rhs, lhs_scale, rhs_scale, bias), specs, split.result)


@_compiled
def quantize(x, x_scale, *, operation, split, options):
    """`quantize_input`: the qvalue, and its scale if there is no x_scale."""

    def local(x, x_scale):
        q = operation(x, x_scale=x_scale, **dict(options))
        return (q.qvalue, q.scale) if x_scale is None else (q.qvalue,)

    specs = (split.of_rows(x), None if x_scale is None else PartitionSpec())
    out_specs = (split.result,) * (2 if x_scale is None else 1)
    return split.run(local, (x, x_scale), specs, out_specs)


def _of_rows(kernel: PaddedKernel) -> PaddedKernel:
    """A device's rows of a kernel, all of them logical, as a kernel of their own.

    Its qvalue is copied where they are no multiple of 16.
    """
    scale = _padded(kernel.scale, 1)
    rows = kernel.qvalue.shape[0]
    return PaddedKernel(_padded(kernel.qvalue), scale, kernel.in_features, rows)


def _padded(a: jax.Array, value: float = 0) -> jax.Array:
    """The first axis padded to a multiple of 16; a scalar, and what is one, as it is."""
    if not a.ndim or a.shape[0] == padded_size(a.shape[0]):
        return a
    widths = [(0, padded_size(a.shape[0]) - a.shape[0])] + [(0, 0)] * (a.ndim - 1)
    return jnp.pad(a, widths, constant_values=value)
