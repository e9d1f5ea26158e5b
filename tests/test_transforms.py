"""jit, vmap, scan and shard_map of the operations, and how many custom calls are left of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CLOSE,
    cuda_text,
    implementations,
    quantized_randn,
    randn,
    random_scales,
)

from jaxfp8 import PaddedKernel, _xla, fp8_dense, scaled_matmul
from jaxfp8.dense_float import fp8_dense_float


K, N = 33, 50
KERNEL = PaddedKernel.from_dense(randn(0, (K, N)))
STACK = PaddedKernel.from_dense(randn(1, (3, K, N)))
BIAS = randn(2, (N,))


def layer(stack: PaddedKernel, index: int) -> PaddedKernel:
    return jax.tree.map(lambda a: a[index], stack)


def is_one_product(f, *args) -> bool:
    """Whether a program is one custom call on CUDA and one product elsewhere, and no loop."""
    elsewhere = jax.jit(f).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    texts = cuda_text(f, *args), elsewhere
    counts = texts[0].count("stablehlo.custom_call @jaxfp8_"), texts[1].count("dot_general")
    return counts == (1, 1) and not any("stablehlo.while" in text for text in texts)


@implementations
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_jit_is_eager(activation, implementation):
    x = randn(3, (7, K))
    f = functools.partial(fp8_dense, activation=activation, implementation=implementation)
    np.testing.assert_allclose(jax.jit(f)(x, KERNEL, BIAS), f(x, KERNEL, BIAS), **CLOSE)


def test_same_shapes_do_not_compile_again():
    traced = []

    @jax.jit
    def f(x, kernel, bias):
        traced.append(x.shape)
        return fp8_dense(x, kernel, bias, activation="relu")

    for seed in range(4):
        kernel = PaddedKernel.from_dense(randn(seed, (K, N)))
        f(randn(seed, (7, K)), kernel, randn(seed, (N,)))
    assert traced == [(7, K)]
    assert f._cache_size() == 1
    # Another logical size of the same padded shapes is another program.
    f(randn(0, (7, K + 1)), PaddedKernel.from_dense(randn(0, (K + 1, N))), BIAS)
    assert f._cache_size() == 2


def test_eager_calls_trace_once(monkeypatch):
    calls = []
    monkeypatch.setattr(_xla, "dense", functools.partial(_counted, _xla.dense, calls))
    f = jax.jit(functools.partial(fp8_dense, implementation="xla", activation="silu"))
    for seed in range(3):
        f(randn(seed, (6, K)), KERNEL)
    assert len(calls) == 1


def _counted(f, calls, *args, **options):
    calls.append(args)
    return f(*args, **options)


@implementations
def test_vmap_over_x_is_one_product(implementation):
    x = randn(4, (4, 5, K))
    f = functools.partial(fp8_dense, implementation=implementation)
    batched = jax.vmap(f, in_axes=(0, None, None))
    want = np.stack([f(row, KERNEL, BIAS) for row in x])
    np.testing.assert_allclose(batched(x, KERNEL, BIAS), want, **CLOSE)


NESTED = jax.vmap(jax.vmap(fp8_dense, in_axes=(0, None, None)), in_axes=(1, None, None), out_axes=1)
ROWS = jax.vmap(fp8_dense, in_axes=(0, None, None))


@pytest.mark.parametrize(
    ("f", "shape"),
    [
        (fp8_dense, (6, K)),
        (fp8_dense, (2, 3, K)),
        (ROWS, (4, K)),
        (ROWS, (4, 5, K)),
        (NESTED, (4, 5, K)),
        (NESTED, (4, 5, 6, K)),
        (jax.jit(jax.vmap(jax.jit(fp8_dense), in_axes=(0, None, None))), (4, 5, K)),
    ],
)
def test_batches_of_rows_fold_into_one_call(f, shape):
    x = randn(5, shape)
    assert is_one_product(f, x, KERNEL, BIAS)
    np.testing.assert_allclose(f(x, KERNEL, BIAS), fp8_dense(x, KERNEL, BIAS), **CLOSE)


def test_vmap_over_scaled_matmul_folds_rows_and_their_scales():
    rng = np.random.default_rng(6)
    lhs = jnp.asarray(quantized_randn(rng, (24, 48))).reshape(4, 6, 48)
    rhs = jnp.asarray(quantized_randn(rng, (32, 48)))
    per_token, per_channel = random_scales(rng, (4, 6, 1)), random_scales(rng, (32,))
    f = functools.partial(scaled_matmul, out_dtype=jnp.float32)
    want = f(lhs, rhs, per_token, per_channel)
    folded = jax.vmap(f, in_axes=(0, None, 0, None))
    np.testing.assert_allclose(folded(lhs, rhs, per_token, per_channel), want, **CLOSE)
    assert is_one_product(folded, lhs, rhs, per_token, per_channel)
    # Scales that are shared by the batch fold too: one value, or one for each row.
    shared = jax.vmap(f, in_axes=(0, None, None, None))
    assert is_one_product(shared, lhs, rhs, 2.0, per_channel)
    assert is_one_product(shared, lhs, rhs, per_token[0], per_channel)
    np.testing.assert_allclose(
        shared(lhs, rhs, per_token[0], 1.5),
        f(lhs, rhs, np.broadcast_to(per_token[0], (4, 6, 1)), 1.5),
        **CLOSE,
    )
    # The same rows under several scales.
    rescaled = jax.vmap(f, in_axes=(None, None, 0, None))
    np.testing.assert_allclose(
        rescaled(lhs[0], rhs, per_token, 1.5),
        np.stack([f(lhs[0], rhs, s, 1.5) for s in per_token]),
        **CLOSE,
    )
    # One value for each example of the batch is no row: it stays a loop, of the right values.
    each = jax.vmap(f, in_axes=(0, None, 0, None))
    np.testing.assert_allclose(
        each(lhs, rhs, per_token[:, 0, 0], 1.5),
        np.stack([f(a, rhs, s, 1.5) for a, s in zip(lhs, per_token[:, 0, 0], strict=True)]),
        **CLOSE,
    )


@implementations
@pytest.mark.parametrize(
    ("in_axes", "shape"),
    [((None, 0, None), (5, K)), ((0, 0, None), (3, 5, K)), ((1, 0, 0), (5, 3, K))],
    ids=["kernel", "x and kernel", "all"],
)
def test_vmap_over_stacked_kernels(in_axes, shape, implementation):
    x = randn(7, shape)
    bias = randn(8, (3, N)) if in_axes[2] == 0 else BIAS
    f = functools.partial(fp8_dense, implementation=implementation)
    got = jax.jit(jax.vmap(f, in_axes=in_axes))(x, STACK, bias)
    want = [
        f(
            x if in_axes[0] is None else jnp.take(x, i, axis=in_axes[0]),
            layer(STACK, i),
            bias[i] if in_axes[2] == 0 else bias,
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(got, np.stack(want), **CLOSE)


def test_vmap_over_biases_and_static_scales():
    x, biases, scales = randn(9, (5, K)), randn(10, (4, N)), jnp.array([0.5, 0.01, 0.02, 3.0])
    got = jax.vmap(lambda b, s: fp8_dense(x, KERNEL, b, x_scale=s))(biases, scales)
    want = [fp8_dense(x, KERNEL, b, x_scale=s) for b, s in zip(biases, scales, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), **CLOSE)


def test_vmap_of_vmap_over_rows_and_kernels():
    x = randn(11, (2, 5, K))
    rows = jax.vmap(fp8_dense, in_axes=(0, None))
    got = jax.vmap(rows, in_axes=(None, 0))(x, STACK)
    want = np.stack([fp8_dense(x, layer(STACK, i)) for i in range(3)])
    np.testing.assert_allclose(got, want, **CLOSE)
    # Inside the loop over kernels the rows are still one call, of 2 x 5.
    text = cuda_text(jax.vmap(rows, in_axes=(None, 0)), x, STACK)
    assert text.count("stablehlo.custom_call @jaxfp8_") == 1
    assert f"tensor<10x{N}xf32>" in text and text.count("stablehlo.while") == 1
    swapped = jax.vmap(jax.vmap(fp8_dense, in_axes=(None, 0)), in_axes=(0, None))
    np.testing.assert_allclose(swapped(x, STACK), np.swapaxes(want, 0, 1), **CLOSE)


def test_vmap_of_no_examples():
    y = jax.vmap(fp8_dense, in_axes=(0, None))(jnp.zeros((0, 5, K)), KERNEL)
    assert y.shape == (0, 5, N)


@implementations
def test_scan_over_stacked_kernels(implementation):
    square = PaddedKernel.from_dense(randn(12, (3, K, K)) / 6)
    x = randn(13, (4, K))

    def step(x, kernel):
        return fp8_dense(x, kernel, activation="silu", implementation=implementation), None

    got, _ = jax.jit(lambda x, kernels: jax.lax.scan(step, x, kernels))(x, square)
    want = x
    for i in range(3):
        want, _ = step(want, layer(square, i))
    np.testing.assert_allclose(got, want, **CLOSE)


def test_vmap_of_the_float_layer():
    x, w = randn(14, (4, 5, K)), randn(15, (3, K, N))
    rows = jax.vmap(fp8_dense_float, in_axes=(0, None, None))
    assert is_one_product(rows, x, w[0], BIAS)
    np.testing.assert_allclose(rows(x, w[0], BIAS), fp8_dense_float(x, w[0], BIAS), **CLOSE)
    weights = jax.vmap(fp8_dense_float, in_axes=(None, 0))
    want = np.stack([fp8_dense_float(x[0], one) for one in w])
    np.testing.assert_allclose(weights(x[0], w), want, **CLOSE)


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_precision_reaches_the_custom_call(precision):
    promoted = int(precision != "default")
    x = randn(16, (4, K))
    named = cuda_text(functools.partial(fp8_dense, precision=precision), x, KERNEL)
    assert f"promoted = {promoted} : i32" in named
    with jax.default_matmul_precision(precision):
        assert f"promoted = {promoted} : i32" in cuda_text(fp8_dense, x, KERNEL)
