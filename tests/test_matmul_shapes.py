"""vLLM's shape matrices, with every combination of scale kinds and bias, to a derived tolerance."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import (
    ALIGNED,
    COMBINATIONS,
    UNALIGNED,
    Product,
    accumulation,
    implementations,
    quantized_randn,
    random_scales,
)

from jaxfp8 import PaddedKernel, fp8_dense, quantize, scaled_matmul
from jaxfp8.padded import padded_size


SMALL_M = range(1, 128)
SMALL_SIDES = (32, 64, 96)
# Without a GPU: half a second for each, and all eight combinations where they cost nothing.
CI_LARGEST_WEIGHT = 2**24
CI_LARGEST_RESULT = 2**20


def aligned_case(implementation, shape):
    for_gpu = implementation == "cutlass" or shape[1] * shape[2] > CI_LARGEST_WEIGHT
    name = f"{implementation}-{'x'.join(map(str, shape))}"
    return pytest.param(implementation, shape, marks=[pytest.mark.gpu] * for_gpu, id=name)


def combinations_for(m, n, implementation):
    """All eight, or, in CI for a large result, the two that differ in everything."""
    if implementation == "cutlass" or m * n <= CI_LARGEST_RESULT:
        return COMBINATIONS
    return [(True, True, True), (False, False, False)]


def precisions(implementation):
    return ("default", "highest") if implementation == "cutlass" else ("default",)


@functools.lru_cache(maxsize=2)
def operands(m, n, k):
    """e4m3 operands, scales of every kind, a bias and the reference: of one shape, made once.

    The scales differ from row to row, so that a scale taken from another one shows.
    """
    rng = np.random.default_rng(0)
    lhs, rhs = quantized_randn(rng, (m, k)), quantized_randn(rng, (n, k))
    per_token = random_scales(rng, (m, 1))
    per_channel = random_scales(rng, (n,))
    bias = rng.standard_normal(n, np.float32) * np.sqrt(k, dtype=np.float32) * np.float32(0.1)
    product = Product.of(lhs, rhs)
    return *map(jnp.asarray, (lhs, rhs)), per_token, per_channel, bias, product


def check_scaled_matmul(shapes, implementation, combinations=COMBINATIONS):
    """Every combination on every shape, compiled as one program: compilation costs most."""
    made = [operands(*shape) for shape in shapes]
    chosen = [
        (
            per_token if token else per_token[0, 0],
            per_channel if channel else per_channel[0],
            bias if biased else None,
        )
        for _, _, per_token, per_channel, bias, _ in made
        for token, channel, biased in combinations
    ]
    names = precisions(implementation)

    @jax.jit
    def every(pairs, chosen):
        repeated = [pair for pair in pairs for _ in combinations]
        return [
            [
                scaled_matmul(lhs, rhs, *rest, precision=name, implementation=implementation)
                for (lhs, rhs), rest in zip(repeated, chosen, strict=True)
            ]
            for name in names
        ]

    results = every([m[:2] for m in made], chosen)
    products = [m[-1] for m in made for _ in combinations]
    for name, ys in zip(names, results, strict=True):
        kind = accumulation(implementation, name == "highest")
        for y, product, (lhs_scale, rhs_scale, bias) in zip(ys, products, chosen, strict=True):
            assert y.dtype == jnp.bfloat16
            product.check(y, lhs_scale, rhs_scale, bias, kind=kind)


@pytest.mark.parametrize(
    ("implementation", "shape"),
    [aligned_case(i, shape) for i in ("xla", "cutlass") for shape in ALIGNED],
)
def test_aligned(implementation, shape):
    combinations = combinations_for(*shape[:2], implementation)
    check_scaled_matmul([shape], implementation, combinations)


@implementations
@pytest.mark.parametrize("first", range(1, 128, 16))
def test_every_small_m(implementation, first):
    for m in range(first, min(first + 16, 128)):
        shapes = [(m, side, side) for side in SMALL_SIDES]
        if implementation == "cutlass" or m in (1, 2, 15, 16, 17, 33, 64, 127):
            check_scaled_matmul(shapes, implementation)
        else:
            # In CI the combinations take turns, one for each M.
            check_scaled_matmul(shapes, implementation, [COMBINATIONS[m % 8]])


@implementations
@pytest.mark.parametrize("shape", UNALIGNED, ids=str)
def test_unaligned_padded_by_hand(implementation, shape):
    """`scaled_matmul` on arrays padded with zeros: the logical part is the unpadded product."""
    m, n, k = shape
    lhs, rhs, per_token, per_channel, bias, product = operands(m, n, k)
    n_pad, k_pad = padded_size(n), padded_size(k)
    lhs = jnp.asarray(np.pad(lhs, [(0, 0), (0, k_pad - k)]))
    rhs = jnp.asarray(np.pad(rhs, [(0, n_pad - n), (0, k_pad - k)]))
    # Whatever stands beside the padding must not reach the logical part.
    padded_scale = np.pad(per_channel, (0, n_pad - n), constant_values=np.nan)
    padded_bias = np.pad(bias, (0, n_pad - n), constant_values=np.inf)

    @jax.jit
    def every(lhs, rhs):
        return [
            scaled_matmul(
                lhs,
                rhs,
                per_token if token else per_token[0, 0],
                padded_scale if channel else per_channel[0],
                padded_bias if biased else None,
                implementation=implementation,
            )[:, :n]
            for token, channel, biased in COMBINATIONS
        ]

    for y, (token, channel, biased) in zip(every(lhs, rhs), COMBINATIONS, strict=True):
        product.check(
            y,
            per_token if token else per_token[0, 0],
            per_channel if channel else per_channel[0],
            bias if biased else None,
            kind=accumulation(implementation, False),
        )


@implementations
@pytest.mark.parametrize("shape", UNALIGNED, ids=str)
def test_unaligned_dense(implementation, shape):
    """`fp8_dense` on logical sizes: x per token or by a static scale, weights of both kinds."""
    m, n, k = shape
    rng = np.random.default_rng(1)
    x = rng.standard_normal((m, k), np.float32).astype(jnp.bfloat16)
    w = rng.standard_normal((k, n), np.float32) / np.sqrt(k, dtype=np.float32)
    bias = rng.standard_normal(n, np.float32)
    static = np.float32(1 / 128)  # saturates what lies beyond 3.5; x / static is exact
    clipped = np.clip(x.astype(np.float32) / static, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    quantized = {True: jax.jit(lambda x: quantize(x, axis=-1))(x), False: (clipped, static)}
    kernels = jax.jit(
        lambda w: {channel: PaddedKernel.from_dense(w, per_channel=channel) for channel in (0, 1)}
    )(w)
    products = {
        (token, channel): Product.of(qx, kernels[channel].qvalue[:n, :k])
        for token, (qx, _) in quantized.items()
        for channel in (False, True)
    }

    @jax.jit
    def every(x, kernels):
        return [
            [
                fp8_dense(
                    x,
                    kernels[channel],
                    bias if biased else None,
                    x_scale=None if token else static,
                    precision=precision,
                    implementation=implementation,
                )
                for token, channel, biased in COMBINATIONS
            ]
            for precision in precisions(implementation)
        ]

    for precision, ys in zip(precisions(implementation), every(x, kernels), strict=True):
        for y, (token, channel, biased) in zip(ys, COMBINATIONS, strict=True):
            assert (y.shape, y.dtype) == ((m, n), jnp.bfloat16)
            scale = np.asarray(kernels[channel].scale)
            products[token, channel].check(
                y,
                quantized[token][1],
                scale[:n] if channel else scale,
                bias if biased else None,
                kind=accumulation(implementation, precision == "highest"),
            )
