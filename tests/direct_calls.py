"""The custom calls themselves: past Python's checks, with the kernel named and the scratch seen."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8 import PaddedKernel, _cutlass
from jaxfp8._xla import ACTIVATIONS


FROM_TABLE = -1


def kernels(accumulation: str = "") -> list[int]:
    """The indices of the library's kernels: all, or those of "fast" or "promoted" accumulation."""
    names = _cutlass.plugin().build["kernels"]
    return [i for i, name in enumerate(names) if name.startswith(accumulation)]


def kernel_name(kernel: int) -> str:
    return "table" if kernel == FROM_TABLE else _cutlass.plugin().build["kernels"][kernel]


def attributes(kernel: int, activation: str | int | None, promoted: bool) -> dict[str, np.int32]:
    _cutlass.plugin()  # registers the targets, whichever test is the first of its process
    code = activation if isinstance(activation, int) else list(ACTIVATIONS).index(activation)
    return {
        "activation": np.int32(code),
        "kernel": np.int32(kernel),
        "promoted": np.int32(promoted),
    }


STATIC = ("kernel", "activation", "out_dtype", "promoted")


@functools.partial(jax.jit, static_argnames=STATIC)
def matmul(
    lhs: Any,
    rhs: Any,
    lhs_scale: Any,
    rhs_scale: Any,
    bias: Any = None,
    *,
    kernel: int = FROM_TABLE,
    activation: str | int | None = None,
    out_dtype: Any = jnp.bfloat16,
    promoted: bool = False,
) -> jax.Array:
    """`jaxfp8_scaled_matmul_v1`."""
    out = jax.ShapeDtypeStruct((lhs.shape[0], rhs.shape[0]), out_dtype)
    call = jax.ffi.ffi_call(_cutlass.MATMUL_TARGET, out)
    return call(
        lhs,
        rhs,
        lhs_scale,
        rhs_scale,
        jnp.zeros(0) if bias is None else bias,
        **attributes(kernel, activation, promoted),
    )


@functools.partial(jax.jit, static_argnames=(*STATIC, "width", "out_features"))
def dense(
    x: Any,
    weight: PaddedKernel,
    bias: Any = None,
    x_scale: Any = None,
    *,
    kernel: int = FROM_TABLE,
    activation: str | int | None = None,
    out_dtype: Any = jnp.bfloat16,
    promoted: bool = False,
    width: int | None = None,
    out_features: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`jaxfp8_dense_v1`: the result, then its scratch: x quantized, and the scales of x.

    Where rows are stored by classes (N unaligned), the scratch has more rows, in their order.
    """
    m, n = x.shape[0], weight.out_features
    rows = _cutlass.scratch_rows(m, n, out_dtype)
    results = [
        jax.ShapeDtypeStruct((m, n if width is None else width), out_dtype),
        jax.ShapeDtypeStruct((rows, weight.qvalue.shape[1]), weight.qvalue.dtype),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    ]
    call = jax.ffi.ffi_call(_cutlass.DENSE_TARGET, results)
    return tuple(
        call(
            x,
            weight.qvalue,
            weight.scale,
            jnp.zeros(0) if bias is None else bias,
            jnp.zeros(0) if x_scale is None else jnp.asarray(x_scale, jnp.float32),
            out_features=np.int64(n if out_features is None else out_features),
            **attributes(kernel, activation, promoted),
        )
    )
