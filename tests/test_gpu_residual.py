"""A residual in the epilogue of every kernel for 16 bits; any other behind it, to the same bits."""

import functools

import direct_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from direct_calls import FROM_TABLE, kernels, naming, scaled_operands
from helpers import bits, dense_product, randn
from test_gpu_numerics import OFFSET, ROWS, accumulations, check_rows

from jaxfp8 import PaddedKernel, fp8_dense


pytestmark = pytest.mark.gpu
out_dtypes = pytest.mark.parametrize(
    "out_dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)


@out_dtypes
@accumulations
@pytest.mark.parametrize("n", [432, 424])
def test_every_kernel_of_scaled_matmul(n, accumulation, out_dtype):
    """Odd M, and features that end within a tile and within what TMA brings at once."""
    lhs, rhs, *scales, bias, product = scaled_operands(77, n, 1040)
    residual = randn(1, (77, n), out_dtype)

    @functools.partial(jax.jit, static_argnames="kernel")
    def every(lhs, rhs, scales, bias, residual, kernel):
        return [
            direct_calls.matmul(
                *(lhs, rhs, *scales, bias),
                residual=residual,
                kernel=kernel,
                activation=activation,
                out_dtype=out_dtype,
            )
            for activation in (None, "gelu")
        ]

    for kernel in kernels(accumulation):
        ys = every(lhs, rhs, scales, bias, residual, kernel)
        for y, activation in zip(ys, (None, "gelu"), strict=True):
            with naming(kernel):
                product.check(y, *scales, bias, residual, activation=activation, kind=accumulation)


@out_dtypes
@accumulations
def test_every_kernel_of_dense(accumulation, out_dtype):
    m, n, k = 301, 1288, 147
    x, bias, residual = randn(0, (m, k), out_dtype), randn(1, (n,)), randn(2, (m, n), out_dtype)
    weight = PaddedKernel.from_dense(randn(3, (k, n)) / np.sqrt(k))
    product, *scales = dense_product(x, weight)
    for kernel in kernels(accumulation):
        options = dict(kernel=kernel, activation="silu", out_dtype=out_dtype)
        y = direct_calls.dense(x, weight, bias, residual=residual, **options)[0]
        with naming(kernel):
            product.check(y, *scales, bias, residual, activation="silu", kind=accumulation)


@accumulations
@pytest.mark.parametrize("k", [48, 256])
def test_many_tiles_of_few_steps_along_k(k, accumulation):
    """The residual of a tile is asked for while the one before is still being stored."""
    lhs, rhs, *rest, product = scaled_operands(4096, 3424, k)
    residual = randn(1, (4096, 3424), jnp.bfloat16)
    for kernel in kernels(accumulation):
        y = direct_calls.matmul(lhs, rhs, *rest, residual=residual, kernel=kernel)
        with naming(kernel):
            product.check(y, *rest, residual, kind=accumulation)


@out_dtypes
@accumulations
def test_rows_do_not_depend_on_batch_kernel_or_position(accumulation, out_dtype):
    """Bitwise, as without a residual (invariant 4)."""
    n, k, total = 3424, 1283, max(ROWS) + OFFSET
    x, bias = randn(3, (total, k), jnp.bfloat16), randn(4, (n,))
    residual = randn(6, (total, n), out_dtype)
    weight = PaddedKernel.from_dense(randn(5, (k, n)) / np.sqrt(k))
    options = dict(activation="gelu", promoted=accumulation == "promoted", out_dtype=out_dtype)

    def f(x, residual, weight, bias, kernel):
        return direct_calls.dense(x, weight, bias, residual=residual, kernel=kernel, **options)[0]

    check_rows(f, [*kernels(accumulation), FROM_TABLE], (x, residual), (weight, bias))


@out_dtypes
def test_what_xla_adds(out_dtype):
    """Rows that TMA does not address, and float32: the bits of the epilogue's sum of 3424."""
    x, residual = randn(0, (300, 512), out_dtype), randn(1, (300, 3424), out_dtype)
    w = randn(2, (512, 3424)) / 20
    f = functools.partial(fp8_dense, activation="silu", implementation="cutlass")
    kernel = PaddedKernel.from_dense(w)
    want = f(x, kernel, residual=residual)
    for n in (3421, 3422, 3420):
        got = f(x, PaddedKernel.from_dense(w[:, :n]), residual=residual[:, :n])
        np.testing.assert_array_equal(bits(got), bits(want[:, :n]))
    wide = f(x, kernel, residual=residual.astype(jnp.float32), out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(bits(wide.astype(out_dtype)), bits(want))
