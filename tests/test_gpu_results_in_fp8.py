"""Results that the kernels write in e4m3, one by one: their own float32 results, cast."""

import functools

import direct_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from direct_calls import FROM_TABLE, kernels, naming, scaled_operands
from helpers import bits, check_quantized, randn

from jaxfp8 import PaddedKernel, fp8_dense, quantize_input
from jaxfp8.quantize import FP8_DTYPE


pytestmark = pytest.mark.gpu
accumulations = pytest.mark.parametrize("accumulation", ["fast", "promoted"])
SCALE = np.float32(0.005)  # results of about 1: some saturate, at 2.24


def check(q, y, activation):
    """Without an activation bit for bit.

    The two are compiled apart, so an activation may be contracted otherwise: by a few units, and
    the code is another only beside a tie. (The e4m3 codes are 2^-3 apart or less.)
    """
    check_quantized(q, y, SCALE, None if activation is None else 2.0**-20 * np.abs(np.asarray(y)))


@accumulations
@pytest.mark.parametrize("features", [432, 421])
def test_every_kernel_of_scaled_matmul(features, accumulation):
    """Odd M, K past the last whole tile, each activation and each kind of scale and bias."""
    lhs, rhs, per_token, per_channel, bias, _ = scaled_operands(77, 432, 1040)
    rhs, bias = rhs.at[features:].set(0), bias[:features]
    wild = bias.at[jnp.arange(3, 7)].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3e38]))
    epilogues = [((per_token, per_channel, bias), a) for a in (None, "relu", "gelu", "silu")]
    epilogues += [((per_token, per_channel, wild), a) for a in (None, "relu")]
    epilogues += [
        ((lhs_scale, rhs_scale, None), None)
        for lhs_scale in (per_token, per_token[0, 0])
        for rhs_scale in (per_channel, per_channel[0])
    ]
    results = {"float32": dict(out_dtype=jnp.float32)}
    results["e4m3"] = dict(out_dtype=FP8_DTYPE, out_scale=SCALE)

    @functools.partial(jax.jit, static_argnames="kernel")
    def every(lhs, rhs, operands, kernel):
        return [
            {
                name: direct_calls.matmul(
                    lhs,
                    rhs,
                    *rest,
                    kernel=kernel,
                    activation=activation,
                    out_features=features,
                    **options,
                )
                for name, options in results.items()
            }
            for rest, (_, activation) in zip(operands, epilogues, strict=True)
        ]

    for kernel in kernels(accumulation):
        outs = every(lhs, rhs, [rest for rest, _ in epilogues], kernel)
        for out, (_, activation) in zip(outs, epilogues, strict=True):
            with naming(kernel):
                check(out["e4m3"], out["float32"], activation)


@accumulations
@pytest.mark.parametrize("x_scale", [None, np.float32(0.01)], ids=["per-token", "static"])
def test_every_kernel_of_dense(x_scale, accumulation):
    """Logical N and K, neither a multiple of anything; also rows that are not finite."""
    m, n, k = 77, 413, 1037
    x = randn(0, (m, k), jnp.bfloat16)
    x = x.at[5, 3].set(jnp.nan).at[76, 1036].set(jnp.inf)
    w, bias = randn(2, (k, n)) / np.sqrt(k), randn(1, (n,))
    weights = [PaddedKernel.from_dense(w, per_channel=per_channel) for per_channel in (True, False)]

    @functools.partial(jax.jit, static_argnames=("kernel", "activation"))
    def every(x, weights, bias, kernel, activation):
        call = functools.partial(
            direct_calls.dense, x, x_scale=x_scale, kernel=kernel, activation=activation
        )
        return [
            (
                call(weight, b, out_dtype=FP8_DTYPE, out_scale=SCALE)[0],
                call(weight, b, out_dtype=jnp.float32)[0],
            )
            for weight in weights
            for b in (bias, None)
        ]

    for kernel in (*kernels(accumulation), *([FROM_TABLE] if accumulation == "fast" else [])):
        for activation in (None, "gelu"):
            for q, y in every(x, weights, bias, kernel, activation):
                with naming(kernel):
                    check(q, y, activation)
                    assert np.isnan(np.asarray(q, np.float32)[[5, 76]]).all()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("n", [1, 15, 255, 3420, 30522])
@pytest.mark.parametrize("m", [1, 2, 17, 130, 1023, 2050])
def test_the_kernel_of_the_table(m, n, precision, activation):
    """What the table picks for the padded width, against what it picks for the logical one."""
    x = randn(7, (m, 50), jnp.bfloat16)
    weight = PaddedKernel.from_dense(randn(8, (50, n)) / 7)
    options = dict(activation=activation, precision=precision, implementation="cutlass")
    got = fp8_dense(x, weight, out_scale=SCALE, **options)
    check(got.qvalue, fp8_dense(x, weight, out_dtype=jnp.float32, **options), activation)
    qx = quantize_input(x, implementation="cutlass")
    again = fp8_dense(qx, weight, out_scale=SCALE, **options)
    np.testing.assert_array_equal(bits(again.qvalue), bits(got.qvalue))


@pytest.mark.parametrize("m", [1, 16, 300, 1030])
def test_a_chain_again_and_again(m):
    """XLA replays a command buffer from the second run on: new inputs, the same results."""
    sizes = [1280, 3420, 1283, 100, 1280]
    weights = [
        PaddedKernel.from_dense(randn(i, shape) / np.sqrt(shape[0]))
        for i, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    ]
    twin = PaddedKernel.from_dense(randn(5, (sizes[0], sizes[1])) / np.sqrt(sizes[0]))

    def chain(x, weights, twin):
        qx = quantize_input(x)
        hidden = fp8_dense(qx, weights[0], activation="gelu") * fp8_dense(qx, twin)
        for weight in weights[1:-1]:
            hidden = fp8_dense(hidden, weight, activation="gelu", out_scale=SCALE)
        return hidden, fp8_dense(hidden, weights[-1])

    jitted = jax.jit(chain)
    for seed in range(5):
        x = randn(seed, (m, sizes[0]), jnp.bfloat16)
        got, want = jitted(x, weights, twin), chain(x, weights, twin)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
