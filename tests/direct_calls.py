"""The custom calls themselves: past Python's checks, with the kernel named and the scratch seen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import Product, quantized_randn, random_scales

from jaxfp8 import PaddedKernel, _cutlass
from jaxfp8._xla import ACTIVATIONS
from jaxfp8.padded import padded_size
from jaxfp8.quantize import FP8_DTYPE, is_fp8


FROM_TABLE = -1


def kernels(accumulation: str = "") -> list[int]:
    """The indices of the library's kernels: all, or those of "fast" or "promoted" accumulation."""
    names = _cutlass.plugin().build["kernels"]
    return [i for i, name in enumerate(names) if name.startswith(accumulation)]


def kernel_name(kernel: int) -> str:
    return "table" if kernel == FROM_TABLE else _cutlass.plugin().build["kernels"][kernel]


@contextlib.contextmanager
def naming(kernel: int) -> Iterator[None]:
    """Say in a failure which kernel it was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{kernel_name(kernel)}: {error}") from None


@functools.cache
def scaled_operands(m: int, n: int, k: int) -> tuple:
    """lhs, rhs, the scales of their rows, a bias, and the product as a reference."""
    rng = np.random.default_rng(0)
    lhs, rhs = quantized_randn(rng, (m, k)), quantized_randn(rng, (n, k))
    # Results of about 1, where the activations bend.
    size = np.float32(13 / np.sqrt(k))
    scales = random_scales(rng, (m, 1)), random_scales(rng, (n,)) * size
    bias = rng.standard_normal(n, np.float32)
    return *map(jnp.asarray, (lhs, rhs, *scales, bias)), Product.of(lhs, rhs)


def attributes(kernel: int, activation: str | int | None, promoted: bool) -> dict[str, np.int32]:
    _cutlass.plugin()  # registers the targets, whichever test is the first of its process
    code = activation if isinstance(activation, int) else list(ACTIVATIONS).index(activation)
    return {
        "activation": np.int32(code),
        "kernel": np.int32(kernel),
        "promoted": np.int32(promoted),
    }


STATIC = ("kernel", "activation", "out_dtype", "promoted", "width", "out_features")


def result(m: int, n: int, n_pad: int, out_dtype: Any, width: int | None) -> jax.ShapeDtypeStruct:
    """A product's result: of logical width, or padded where it is e4m3, or of the `width` named."""
    right = n_pad if is_fp8(out_dtype) else n
    return jax.ShapeDtypeStruct((m, right if width is None else width), out_dtype)


def optional(a: Any, dtype: Any = jnp.float32) -> jax.Array:
    """An absent operand is an empty one."""
    return jnp.zeros(0) if a is None else jnp.asarray(a, dtype)


@functools.partial(jax.jit, static_argnames=STATIC)
def matmul(
    lhs: Any,
    rhs: Any,
    lhs_scale: Any,
    rhs_scale: Any,
    bias: Any = None,
    out_scale: Any = None,
    residual: Any = None,
    *,
    kernel: int = FROM_TABLE,
    activation: str | int | None = None,
    out_dtype: Any = jnp.bfloat16,
    promoted: bool = False,
    width: int | None = None,
    out_features: int | None = None,
) -> jax.Array:
    """`jaxfp8_scaled_matmul_v1`."""
    n = rhs.shape[0] if out_features is None else out_features
    out = result(lhs.shape[0], n, rhs.shape[0], out_dtype, width)
    call = jax.ffi.ffi_call(_cutlass.MATMUL_TARGET, out)
    return call(
        lhs,
        rhs,
        lhs_scale,
        rhs_scale,
        optional(bias),
        optional(out_scale),
        optional(residual, None),
        out_features=np.int64(n),
        **attributes(kernel, activation, promoted),
    )


@functools.partial(jax.jit, static_argnames=STATIC)
def dense(
    x: Any,
    weight: PaddedKernel,
    bias: Any = None,
    x_scale: Any = None,
    out_scale: Any = None,
    residual: Any = None,
    *,
    kernel: int = FROM_TABLE,
    activation: str | int | None = None,
    out_dtype: Any = jnp.bfloat16,
    promoted: bool = False,
    width: int | None = None,
    out_features: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`jaxfp8_dense_v1`: the result, then its scratch: x quantized, and the scales of x.

    Where rows are stored by classes (N unaligned), the scratch has whole classes of them, in their
    order. What lies behind, up to whole tiles, is cut off: it is never written.
    """
    m, n = x.shape[0], weight.out_features
    rows = _cutlass.scratch_rows(m, n, out_dtype)
    results = [
        result(m, n, weight.qvalue.shape[0], out_dtype, width),
        jax.ShapeDtypeStruct((rows, weight.qvalue.shape[1]), weight.qvalue.dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    ]
    call = jax.ffi.ffi_call(_cutlass.DENSE_TARGET, results)
    out, qx, qx_scale = call(
        x,
        weight.qvalue,
        weight.scale,
        optional(bias),
        optional(x_scale),
        optional(out_scale),
        optional(residual, None),
        out_features=np.int64(n if out_features is None else out_features),
        **attributes(kernel, activation, promoted),
    )
    by_classes = not is_fp8(out_dtype) and n * jnp.dtype(out_dtype).itemsize % 16
    written = -(-m // 8) * 8 if by_classes else m
    return out, qx[:written], qx_scale[:written]


@functools.partial(jax.jit, static_argnames="k_pad")
def quantize(
    x: Any, x_scale: Any = None, *, k_pad: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """`jaxfp8_quantize_v1`: x in e4m3, padded, and the scales of its rows."""
    _cutlass.plugin()
    m, k = x.shape
    results = [
        jax.ShapeDtypeStruct((m, padded_size(k) if k_pad is None else k_pad), FP8_DTYPE),
        jax.ShapeDtypeStruct((m, 1), jnp.float32),
    ]
    return tuple(jax.ffi.ffi_call(_cutlass.QUANTIZE_TARGET, results)(x, optional(x_scale)))
