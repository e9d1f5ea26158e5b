"""Inputs quantized once, by themselves or by the layer before: the values, to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Product,
    accumulation,
    check_quantized,
    dense_product,
    implementations,
    randn,
)
from update_cases import assert_same_bits

from jaxfp8 import PaddedKernel, QuantizedInput, fp8_dense, quantize, quantize_input
from jaxfp8._cutlass import cuda_devices
from jaxfp8.padded import padded_size
from jaxfp8.quantize import FP8_DTYPE, cast_to_fp8


K, N = 33, 50
W, BIAS = randn(0, (K, N)) / 6, randn(1, (N,))
KERNEL = PaddedKernel.from_dense(W)
STATIC = np.float32(0.01)  # saturates what lies beyond 4.48
ACTIVATIONS = (None, "relu", "gelu", "silu")

dtypes = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
leads = pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)], ids=str)
statics = pytest.mark.parametrize("x_scale", [None, STATIC], ids=["per-token", "static"])


@implementations
@statics
@leads
@dtypes
def test_quantized_once_is_quantized_by_the_layer(dtype, lead, x_scale, implementation):
    x = randn(2, (*lead, K), dtype)
    options = dict(activation="gelu", implementation=implementation)
    want = fp8_dense(x, KERNEL, BIAS, x_scale=x_scale, **options)
    qx = quantize_input(x, x_scale=x_scale, implementation=implementation)
    assert_same_bits(fp8_dense(qx, KERNEL, BIAS, out_dtype=dtype, **options), want)


@implementations
@statics
@pytest.mark.parametrize("k", [1, 100])
def test_several_kernels_share_an_input_under_jit(k, x_scale, implementation):
    x = randn(3, (7, k), jnp.bfloat16)
    kernels = [PaddedKernel.from_dense(randn(i, (k, n))) for i, n in enumerate((96, 31, 31))]

    @jax.jit
    def shared(x, kernels):
        qx = quantize_input(x, x_scale=x_scale, implementation=implementation)
        return [fp8_dense(qx, kernel, implementation=implementation) for kernel in kernels]

    @jax.jit
    def each(x, kernels):
        options = dict(x_scale=x_scale, implementation=implementation)
        return [fp8_dense(x, kernel, **options) for kernel in kernels]

    # The default dtype of the result is bfloat16, here also that of x.
    got, want = shared(x, kernels), each(x, kernels)
    if implementation == "xla" and cuda_devices():  # which chooses a product for each program
        got, want = (jax.tree.map(lambda y: np.asarray(y, np.float32), ys) for ys in (got, want))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-2), got, want)
    else:
        assert_same_bits(got, want)


@implementations
@leads
@dtypes
def test_the_values_are_those_of_quantize(dtype, lead, implementation):
    x = randn(4, (*lead, K), dtype)
    qvalue, scale = quantize(x, axis=-1)
    for x_scale in (None, STATIC):
        qx = quantize_input(x, x_scale=x_scale, implementation=implementation)
        if x_scale is not None:
            qvalue, scale = cast_to_fp8(x, x_scale), jnp.asarray(x_scale)
        padded = jnp.pad(qvalue, [(0, 0)] * len(lead) + [(0, padded_size(K) - K)])
        if 0 not in lead:  # the scales of no rows are nobody's business
            assert_same_bits(qx, QuantizedInput(padded, scale, K))
        assert (qx.shape, qx.ndim) == ((*lead, K), len(lead) + 1)
        assert (qx.qvalue.shape, qx.scale.shape) == (padded.shape, scale.shape)
        want = np.asarray(qvalue, np.float32) * np.asarray(scale)
        np.testing.assert_array_equal(np.asarray(qx.dequantize()), want)


@implementations
def test_a_static_scale_saturates_and_a_bad_row_is_nan_alone(implementation):
    x = np.array(randn(5, (6, K)))
    x[0], x[1] = 1e30, -1e30
    x[2, 3], x[3, 32], x[4, 0] = np.nan, np.inf, -np.inf
    for x_scale in (None, STATIC):
        qx = quantize_input(x, x_scale=x_scale, implementation=implementation)
        value = np.asarray(qx.dequantize())
        if x_scale is not None:
            np.testing.assert_array_equal(value[0], np.full(K, 448 * STATIC))
            np.testing.assert_array_equal(value[1], np.full(K, -448 * STATIC))
            bad = ~np.isfinite(x)
        else:
            bad = np.broadcast_to(~np.isfinite(x).all(-1, keepdims=True), x.shape)
        np.testing.assert_array_equal(np.isnan(value), bad)
        y = fp8_dense(qx, KERNEL, out_dtype=jnp.float32, implementation=implementation)
        want = fp8_dense(x, KERNEL, x_scale=x_scale, implementation=implementation)
        assert np.isnan(y[2:5]).all() and not np.isnan(y[jnp.array([0, 1, 5])]).any()
        np.testing.assert_array_equal(np.asarray(y), np.asarray(want))


@implementations
def test_a_pair_of_logical_width_is_padded(implementation):
    x = randn(6, (2, 5, K))
    f = functools.partial(
        fp8_dense, kernel=KERNEL, bias=BIAS, out_dtype=jnp.float32, implementation=implementation
    )
    assert_same_bits(f(quantize(x, axis=-1)), f(x))
    # One scale for all of x: the same values as under that static scale.
    qvalue, scale = quantize(x)
    assert_same_bits(f((qvalue, scale)), f(x, x_scale=scale))
    assert_same_bits(f((qvalue, float(scale))), f(x, x_scale=scale))
    assert_same_bits(f((np.asarray(qvalue), np.asarray(scale))), f(x, x_scale=scale))


def test_float64_is_float32_on_the_way_in():
    x = randn(7, (4, K))
    narrow = quantize_input(x)
    with jax.enable_x64(True):
        wide = quantize_input(x.astype(jnp.float64), x_scale=None)
        y = fp8_dense(wide, KERNEL, out_dtype=jnp.float64)
        out = fp8_dense(x.astype(jnp.float64), KERNEL, out_scale=np.float64(0.1))
    assert_same_bits(wide, narrow)
    assert y.dtype == jnp.float64
    np.testing.assert_array_equal(np.asarray(y), fp8_dense(x, KERNEL))
    assert_same_bits(out, fp8_dense(x, KERNEL, out_scale=0.1))


def slack_of(y, activation, implementation):
    """What two kernels that store other types may differ by: without an activation nothing."""
    if implementation == "xla" or activation is None:
        return None
    return 2.0**-20 * np.abs(np.asarray(y))


@implementations
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_out_scale_is_the_cast_of_the_float32_result(activation, per_channel, implementation):
    for (m, k, n), bias in [((7, K, N), BIAS), ((65, 100, 261), None), ((1, 16, 32), None)]:
        kernel = PaddedKernel.from_dense(randn(8, (k, n)) / np.sqrt(k), per_channel=per_channel)
        x = randn(9, (m, k), jnp.bfloat16)
        f = functools.partial(
            fp8_dense, x, kernel, bias, activation=activation, implementation=implementation
        )
        y = f(out_dtype=jnp.float32)
        # The largest result is near 448 steps, then near 300, and then most are beyond.
        for out_scale in (2.0**-7, np.float32(0.0123), np.float32(1e-5)):
            got = f(out_scale=out_scale)
            assert got.features == n and got.shape == (m, n)
            assert (got.scale.dtype, got.scale.shape) == (jnp.float32, ())
            assert got.scale == np.float32(out_scale)
            check_quantized(got.qvalue, y, out_scale, slack_of(y, activation, implementation))
        assert (np.abs(np.asarray(got.qvalue, np.float32)) == 448).mean() > 0.3
        # The dtype may be said, and a quantized x gives the same.
        assert_same_bits(f(out_scale=out_scale, out_dtype=FP8_DTYPE), got)
        qx = quantize_input(x, implementation=implementation)
        options = dict(activation=activation, implementation=implementation)
        assert_same_bits(fp8_dense(qx, kernel, bias, out_scale=out_scale, **options), got)


@implementations
@leads
def test_out_scale_over_any_leading_axes(lead, implementation):
    x = randn(10, (*lead, K))
    y = fp8_dense(x, KERNEL, BIAS, implementation=implementation)
    got = fp8_dense(x, KERNEL, BIAS, out_scale=0.02, implementation=implementation)
    assert got.shape == (*lead, N)
    check_quantized(got.qvalue, y, np.float32(0.02))


@implementations
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_quantized_result_that_is_not_finite(activation, implementation):
    """NaN, never ±448, and only where the float32 result is not finite."""
    x, bias = np.array(randn(11, (5, K))), np.array(BIAS)
    x[1, 32], x[2, 0] = np.nan, np.inf
    bias[7:11] = np.nan, np.inf, -np.inf, 3e38
    f = functools.partial(
        fp8_dense, x, KERNEL, bias, activation=activation, implementation=implementation
    )
    got, y = f(out_scale=0.01), np.asarray(f(out_dtype=jnp.float32))
    check_quantized(got.qvalue, y, np.float32(0.01), slack_of(y, activation, implementation))
    codes = np.asarray(got.qvalue, np.float32)
    assert np.isnan(codes[1:3]).all()
    np.testing.assert_array_equal(np.isnan(codes[:, :N]), ~np.isfinite(y))
    assert (codes[[0, 3, 4], 10] == 448).all()


def test_the_check_sees_a_code_that_is_off():
    """Broken on purpose: one step up in one code, and a padding that is not zero."""
    y = fp8_dense(randn(12, (7, K)), KERNEL)
    q = np.array(cast_to_fp8(jnp.pad(y, [(0, 0), (0, 14)]), np.float32(0.02)))
    for slack in (None, 2.0**-20 * np.abs(np.asarray(y))):
        check_quantized(q, y, np.float32(0.02), slack)
        for column, code in ((N - 1, 1), (N, 1)):
            wrong = q.copy()
            wrong.view(np.uint8)[6, column] += code
            with pytest.raises(AssertionError):
                check_quantized(wrong, y, np.float32(0.02), slack)


@implementations
@pytest.mark.parametrize("x_scale", [None, np.float32(1 / 128)], ids=["per-token", "static"])
@pytest.mark.parametrize("sizes", [(64, 3420, 40), (33, 100, 17)], ids=str)
def test_a_chain_of_two_layers(sizes, x_scale, implementation):
    """Against float64, each layer from the codes that it was given."""
    first, second = (
        PaddedKernel.from_dense(randn(i, shape) / np.sqrt(shape[0]))
        for i, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    )
    biases = [randn(3, (sizes[1],)), randn(4, (sizes[2],))]
    x, out_scale = randn(5, (9, sizes[0]), jnp.bfloat16), np.float32(0.01)

    def chain(x):
        options = dict(implementation=implementation)
        hidden = fp8_dense(
            x, first, biases[0], activation="gelu", x_scale=x_scale, out_scale=out_scale, **options
        )
        return hidden, fp8_dense(hidden, second, biases[1], out_dtype=jnp.float32, **options)

    kind = accumulation(implementation, promoted=False)
    for hidden, y in (chain(x), jax.jit(chain)(x)):
        product, lhs_scale, rhs_scale = dense_product(x, first)
        if x_scale is not None:
            codes = cast_to_fp8(x, x_scale)
            product = Product.of(codes, first.qvalue[: sizes[1], : sizes[0]])
            lhs_scale = x_scale
        want, slack = product.expected(
            lhs_scale, rhs_scale, biases[0], activation="gelu", kind=kind
        )
        check_quantized(hidden.qvalue, np.asarray(want), out_scale, np.asarray(slack))
        logical = hidden.qvalue[:, : sizes[1]], second.qvalue[: sizes[2], : sizes[1]]
        product = Product.of(*logical)
        product.check(y, out_scale, second.scale[: sizes[2]], biases[1], kind=kind)
    # And the float layers themselves: x, the hidden values and both weights rounded to e4m3, each
    # to a relative rms near 0.026 (hidden ones below 64 steps of the static scale to more).
    z = np.asarray(x, np.float64) @ np.asarray(randn(0, sizes[:2]), np.float64)
    z = z / np.sqrt(sizes[0]) + np.asarray(biases[0])
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    exact = gelu @ np.asarray(randn(1, sizes[1:]), np.float64) / np.sqrt(sizes[1])
    exact += np.asarray(biases[1])
    assert 0.01 < np.linalg.norm(np.asarray(y) - exact) / np.linalg.norm(exact) < 0.08
