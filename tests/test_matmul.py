"""`scaled_matmul` and `fp8_dense`: what they compute, on both implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Product,
    accumulation,
    activate,
    bits,
    dense_product,
    implementations,
    quantized_randn,
    randn,
    random_scales,
)

from jaxfp8 import PaddedKernel, fp8_dense, scaled_matmul
from jaxfp8.dense_float import fp8_dense_float
from jaxfp8.quantize import FP8_DTYPE, INV_FP8_MAX


OUT_DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
ACTIVATIONS = [None, "relu", "gelu", "silu"]


def one_hot_kernel(n: int, per_channel: bool = True) -> PaddedKernel:
    """The identity of size n: its result is the quantized x itself."""
    return PaddedKernel.from_dense(np.eye(n, dtype=np.float32), per_channel=per_channel)


@implementations
@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=lambda d: d.__name__)
def test_scaled_matmul_to_every_dtype(out_dtype, activation, precision, implementation):
    rng = np.random.default_rng(0)
    m, n, k = 37, 208, 336
    lhs, rhs = quantized_randn(rng, (m, k)), quantized_randn(rng, (n, k))
    # Results of about 1, where the activations bend and half precision is fine.
    lhs_scale, rhs_scale = random_scales(rng, (m, 1)), random_scales(rng, (n,))
    bias = rng.standard_normal(n, np.float32)
    product = Product.of(lhs, rhs)
    for scales in [(lhs_scale, rhs_scale), (lhs_scale[0, 0], rhs_scale[0])]:
        y = scaled_matmul(
            jnp.asarray(lhs),
            jnp.asarray(rhs),
            *scales,
            bias,
            activation=activation,
            out_dtype=out_dtype,
            precision=precision,
            implementation=implementation,
        )
        assert y.dtype == out_dtype
        kind = accumulation(implementation, precision == "highest")
        product.check(y, *scales, bias, activation=activation, kind=kind)


@implementations
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 4)], ids=str)
def test_dense_of_every_rank_and_dtype(lead, dtype, implementation):
    k, n = 130, 45
    x = randn(0, (*lead, k), dtype)
    kernel = PaddedKernel.from_dense(randn(1, (k, n)) / 11)
    bias = randn(2, (n,))
    y = fp8_dense(x, kernel, bias, implementation=implementation)
    assert (y.shape, y.dtype) == ((*lead, n), dtype)
    product, lhs_scale, rhs_scale = dense_product(x, kernel)
    kind = accumulation(implementation, False)
    product.check(y.reshape(-1, n), lhs_scale, rhs_scale, bias, kind=kind)


@implementations
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)], ids=str)
def test_scaled_matmul_folds_leading_axes(lead, implementation):
    rng = np.random.default_rng(1)
    m, n, k = int(np.prod(lead)), 32, 48
    lhs, rhs = quantized_randn(rng, (m, k)), jnp.asarray(quantized_randn(rng, (n, k)))
    lhs_scale, rhs_scale = random_scales(rng, (*lead, 1)), random_scales(rng, (n,))
    y = scaled_matmul(
        jnp.asarray(lhs).reshape(*lead, k),
        rhs,
        lhs_scale,
        rhs_scale,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    assert y.shape == (*lead, n)
    kind = accumulation(implementation, False)
    Product.of(lhs, rhs).check(y.reshape(m, n), lhs_scale.reshape(m, 1), rhs_scale, kind=kind)


@implementations
def test_result_dtype_is_x_s_unless_asked_for(implementation):
    kernel = one_hot_kernel(20)
    x = randn(3, (4, 20), jnp.float16)
    assert fp8_dense(x, kernel, implementation=implementation).dtype == jnp.float16
    wide = fp8_dense(x, kernel, out_dtype=jnp.float32, implementation=implementation)
    assert wide.dtype == jnp.float32
    # float64 computes in float32 and casts back, in and out.
    with jax.enable_x64(True):
        x64 = jnp.asarray(np.asarray(x), jnp.float64)
        y64 = fp8_dense(x64, kernel, implementation=implementation)
        narrow = fp8_dense(x64, kernel, out_dtype=jnp.float16, implementation=implementation)
        asked = fp8_dense(x, kernel, out_dtype=jnp.float64, implementation=implementation)
    assert (y64.dtype, narrow.dtype, asked.dtype) == (jnp.float64, jnp.float16, jnp.float64)
    for y in (y64, asked):
        np.testing.assert_array_equal(np.asarray(y), np.asarray(wide, np.float64))
    np.testing.assert_array_equal(np.asarray(narrow), np.asarray(wide).astype(np.float16))


@implementations
def test_exact_values(implementation):
    # Small integers are e4m3 numbers and so are their sums, until 16: nothing is rounded.
    x = np.array([[448.0, -2, 0, 1, 3], [448.0, 0, 16, -16, 7]], np.float32)
    w = np.zeros((5, 3), np.float32)
    w[:, 0] = [0, 448, 1, 2, 3]
    w[:, 1] = [448, 0, 0, 0, 0]
    w[:, 2] = [0, 0, -448, 448, 0]
    y = fp8_dense(x, PaddedKernel.from_dense(w), implementation=implementation)
    np.testing.assert_array_equal(np.asarray(y), x @ w)


@implementations
def test_one_rounding_after_the_bias(implementation):
    # 257 lies between the bfloat16 numbers 256 and 258 and ties down to 256; with a little more it
    # rounds up. 449 alone rounds to 448: rounded before the bias, every one of these is off.
    lhs = jnp.zeros((1, 16), FP8_DTYPE).at[0, :2].set(jnp.array([448, 1], FP8_DTYPE))
    bias = np.zeros(16, np.float32)
    bias[:4] = [-192, -192 + 2**-7, -448, -448.5]
    y = scaled_matmul(
        lhs, jnp.ones((16, 16), FP8_DTYPE), 1.0, 1.0, bias, implementation=implementation
    )
    np.testing.assert_array_equal(np.asarray(y, np.float32)[0, :4], [256, 258, 1, 0.5])


@implementations
def test_the_bias_is_float32(implementation):
    # 1 + 2^-20 is no bfloat16; against -1 only its tail is left.
    bias = np.full(16, 1 + 2.0**-20, np.float32)
    x = np.full((1, 16), -1.0, jnp.bfloat16)
    y = fp8_dense(x, one_hot_kernel(16), bias, out_dtype=jnp.float32, implementation=implementation)
    np.testing.assert_allclose(np.asarray(y), 2.0**-20, rtol=0.2)


@implementations
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_values(activation, implementation):
    # x = 0, so that the bias is what the activation sees. Steps of 1/64 over the whole bend.
    z = np.arange(-12, 12, 1 / 64, np.float32)
    kernel = PaddedKernel(
        jnp.zeros((len(z), 16), FP8_DTYPE), jnp.ones(len(z)), in_features=16, out_features=len(z)
    )
    y = fp8_dense(
        np.zeros((1, 16), np.float32),
        kernel,
        z,
        activation=activation,
        implementation=implementation,
    )
    want = activate(z.astype(np.float64), activation)
    # 1 + tanh and 1/(1 + exp) to a few float32 units of 1, so of |z|. An approximate tanh (2^-11)
    # is 20 % off at z = -3, where this allows 4e-4.
    allowed = 2.0**-22 * np.abs(want) + 8 * 2.0**-24 * np.abs(z)
    error = np.abs(np.asarray(y, np.float64)[0] - want)
    assert (error <= allowed).all(), f"off at z = {z[(error / allowed).argmax()]}"
    if activation == "gelu":
        assert np.asarray(y)[0, z == -3][0] == pytest.approx(-0.0036374, rel=4e-4)


@implementations
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_not_finite(activation, implementation):
    z = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e20, -1e20] + 9 * [0], np.float32)
    x = np.zeros((1, 16), np.float32)
    y = fp8_dense(x, one_hot_kernel(16), z, activation=activation, implementation=implementation)
    # gelu and silu of -inf are -inf * 0.
    minus = {None: -np.inf, "relu": 0.0}.get(activation, np.nan)
    big = {None: -1.0}.get(activation, 0.0)
    want = np.array([np.nan, np.inf, minus, 3e38, big * 3e38, 1e20, big * 1e20], np.float32)
    # A division on the GPU is good to two units; equal_nan, and infinities must be the same.
    np.testing.assert_allclose(np.asarray(y)[0, :7], want, rtol=2**-21)


@implementations
@pytest.mark.parametrize("static", [False, True], ids=["per-token", "static"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_nan_and_touches_no_other(poison, static, implementation):
    x = np.array(randn(4, (35, 50)))
    kernel = PaddedKernel.from_dense(randn(5, (50, 70)))
    options = dict(x_scale=jnp.float32(0.01) if static else None, implementation=implementation)
    clean = fp8_dense(x, kernel, **options)
    x[17, 49] = poison
    y = np.asarray(fp8_dense(x, kernel, **options))
    assert np.isnan(y[17]).all()
    others = np.arange(35) != 17
    np.testing.assert_array_equal(bits(y)[others], bits(clean)[others])


@implementations
def test_static_scale_saturates(implementation):
    x = np.array([[3.0, 1e30, -1e30, 448, -500, 0.25] + 10 * [0]], np.float32)
    for scale in (1.0, 0.5, 2.0**-30):
        y = fp8_dense(x, one_hot_kernel(16), x_scale=scale, implementation=implementation)
        want = np.clip(x, -448 * scale, 448 * scale)
        # The identity is 448 on the scale f32(1/448), whose product is 1 to two roundings.
        np.testing.assert_allclose(np.asarray(y), want, rtol=2**-22)


@implementations
def test_rows_of_zeros_give_the_bias(implementation):
    bias = np.array(randn(6, (33,)))
    kernel = PaddedKernel.from_dense(randn(7, (40, 33)))
    for tiny in (0.0, 5e-37):
        x = np.full((3, 40), tiny, np.float32)
        y = fp8_dense(x, kernel, bias, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(y), np.broadcast_to(bias, (3, 33)))


@implementations
def test_no_rows(implementation):
    kernel = one_hot_kernel(20)
    for shape in [(0, 20), (3, 0, 20)]:
        y = fp8_dense(jnp.zeros(shape, jnp.bfloat16), kernel, implementation=implementation)
        assert (y.shape, y.dtype) == (shape, jnp.bfloat16)
    empty = jnp.zeros((0, 32), FP8_DTYPE)
    y = scaled_matmul(
        empty,
        jnp.zeros((16, 32), FP8_DTYPE),
        jnp.ones((0, 1)),
        jnp.ones(()),
        implementation=implementation,
    )
    assert (y.shape, y.dtype) == ((0, 16), jnp.bfloat16)


@implementations
def test_scale_kind_is_told_by_shape_where_m_is_one(implementation):
    rng = np.random.default_rng(2)
    lhs, rhs = (jnp.asarray(quantized_randn(rng, s)) for s in ((1, 32), (16, 32)))
    options = dict(implementation=implementation, out_dtype=jnp.float32)
    per_token = scaled_matmul(lhs, rhs, jnp.full((1, 1), 0.5), jnp.float32(2), **options)
    per_tensor = scaled_matmul(lhs, rhs, jnp.float32(0.5), jnp.full((16,), 2.0), **options)
    np.testing.assert_array_equal(np.asarray(per_token), np.asarray(per_tensor))
    with pytest.raises(ValueError, match=r"`lhs_scale` must have shape \[\] or \[1, 1\]"):
        scaled_matmul(lhs, rhs, jnp.ones((1,)), jnp.float32(2), **options)


@implementations
def test_float_weights_give_the_result_of_the_padded_kernel(implementation):
    x, w, bias = randn(8, (9, 33)), randn(9, (33, 50)), randn(10, (50,))
    options = dict(activation="silu", out_dtype=jnp.bfloat16, implementation=implementation)
    got = jax.jit(lambda *a: fp8_dense_float(*a, **options))(x, w, bias)
    want = fp8_dense(x, PaddedKernel.from_dense(w), bias, **options)
    np.testing.assert_array_equal(bits(got), bits(want))


def test_the_equivalent_expression():
    """The docstrings' expressions, on the values themselves: e4m3 of x is where they part."""
    x, w, bias = randn(11, (64, 300)), randn(12, (300, 80)) / 17, randn(13, (80,))
    kernel = PaddedKernel.from_dense(w)
    y = np.asarray(fp8_dense(x, kernel, bias, implementation="xla"))
    want = np.asarray(x @ kernel.dequantize() + bias)
    # x is rounded to a relative 2^-4 at most, with an rms near 0.026 for normal numbers.
    relative = np.linalg.norm(y - want) / np.linalg.norm(want)
    assert 0.01 < relative < 0.04
    scaled = np.asarray(x) * (np.float32(1) / (np.abs(x).max(-1, keepdims=True) * INV_FP8_MAX))
    rounded = np.asarray(jnp.asarray(scaled).astype(FP8_DTYPE), np.float64)
    rounded *= np.abs(np.asarray(x)).max(-1, keepdims=True) / 448
    exact = rounded @ np.asarray(kernel.dequantize(), np.float64) + np.asarray(bias)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
