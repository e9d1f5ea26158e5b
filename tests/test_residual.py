"""What is added to a layer's result in its own kernel: values, derivatives, batches, errors.

On a mesh: test_residual_mesh.py; in every kernel: test_gpu_residual.py.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    CLOSE,
    accumulation,
    bits,
    cuda_text,
    dense_product,
    implementations,
    randn,
)

from jaxfp8 import PaddedFP8Dense, PaddedKernel, fp8_dense, quantize_input
from jaxfp8.dense_float import fp8_dense_float
from jaxfp8.nnx import PaddedFP8Linear


M, K, N = 12, 33, 50
X, W, BIAS = randn(0, (M, K)), randn(1, (K, N)) / 6, randn(2, (N,))
RESIDUAL = randn(3, (M, N))
KERNEL = PaddedKernel.from_dense(W)


@implementations
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: d.__name__
)
def test_is_added_behind_the_activation_and_before_the_rounding(
    dtype, activation, quantized, implementation
):
    """The residual almost cancels the result, so that a rounding of it alone would show."""
    x = X.astype(dtype)
    options = dict(activation=activation, implementation=implementation)
    given = quantize_input(x) if quantized else x
    f = functools.partial(fp8_dense, given, KERNEL, BIAS, out_dtype=dtype, **options)
    residual = -f() + (randn(4, (M, N)) / 1000).astype(dtype)
    product, *scales = dense_product(x, KERNEL)
    product.check(
        *(f(residual=residual), *scales, BIAS, residual),
        activation=activation,
        kind=accumulation(implementation, promoted=False),
    )


@implementations
def test_leading_axes_and_float64_and_no_rows(implementation):
    f = functools.partial(fp8_dense, kernel=KERNEL, bias=BIAS, implementation=implementation)
    y = f(X.reshape(3, 4, K), residual=RESIDUAL.reshape(3, 4, N))
    np.testing.assert_array_equal(y.reshape(M, N), f(X, residual=RESIDUAL))
    np.testing.assert_array_equal(f(X[0], residual=RESIDUAL[0]), f(X, residual=RESIDUAL)[0])
    assert f(X[:0], residual=RESIDUAL[:0]).shape == (0, N)
    with pytest.warns(UserWarning, match="truncated to dtype float32"):  # JAX's own
        narrow = f(X, residual=RESIDUAL, out_dtype=np.float64)
    np.testing.assert_array_equal(narrow, f(X, residual=RESIDUAL))
    with jax.enable_x64(True):
        wide = f(X.astype(jnp.float64), residual=RESIDUAL.astype(jnp.float64))
        assert wide.dtype == jnp.float64
        np.testing.assert_array_equal(np.asarray(wide, np.float32), f(X, residual=RESIDUAL))


@implementations
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_derivatives(activation, implementation):
    """The residual's is the cotangent itself; those of x and bias are what they are without it."""
    options = dict(activation=activation, implementation=implementation)

    def f(x, bias, residual):
        return fp8_dense(x, KERNEL, bias, residual=residual, **options)

    cotangent = randn(5, (M, N))
    y, vjp = jax.vjp(f, X, BIAS, RESIDUAL)
    np.testing.assert_allclose(y, fp8_dense(X, KERNEL, BIAS, **options) + RESIDUAL, **CLOSE)
    *got, of_residual = vjp(cotangent)
    np.testing.assert_array_equal(of_residual, cotangent)
    want = jax.vjp(lambda x, bias: fp8_dense(x, KERNEL, bias, **options), X, BIAS)[1](cotangent)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), tuple(got), want)
    alone = jax.grad(lambda r: jnp.sum(f(X, BIAS, r) * cotangent))(RESIDUAL)
    np.testing.assert_array_equal(alone, cotangent)
    _, tangent = jax.jvp(f, (X, BIAS, RESIDUAL), (0 * X, 0 * BIAS, cotangent))
    np.testing.assert_array_equal(tangent, cotangent)
    # Of a quantized input, too.
    q = quantize_input(X)
    g = functools.partial(fp8_dense, q, KERNEL, BIAS, out_dtype=jnp.float32, **options)
    _, vjp = jax.vjp(lambda r: g(residual=r), RESIDUAL)
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)
    # Of the residual alone no other tangent is formed: 0 times infinity would be NaN.
    infinite = BIAS.at[0].set(-jnp.inf)
    for given in (X, q):
        h = functools.partial(fp8_dense, given, KERNEL, infinite, out_dtype=jnp.float32, **options)
        _, tangent = jax.jvp(lambda r, h=h: h(residual=r), (RESIDUAL,), (cotangent,))
        np.testing.assert_array_equal(tangent, cotangent)


@implementations
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_sixteen_bits_that_a_kernel_adds(dtype, activation, implementation):
    """Values, derivatives and batches where the epilogue adds: 56 features are 112 bytes."""
    n, options = 56, dict(activation=activation, implementation=implementation)
    kernel, bias = PaddedKernel.from_dense(randn(1, (K, n)) / 6), randn(2, (n,))
    x, residual = randn(0, (3, M, K), dtype), randn(3, (3, M, n), dtype)

    def f(x, residual):
        return fp8_dense(x, kernel, bias, residual=residual, **options)

    y, vjp = jax.vjp(f, x, residual)
    product, scale, channels = dense_product(x, kernel)
    product.check(
        *(y.reshape(-1, n), scale, channels, bias, residual.reshape(-1, n)),
        activation=activation,
        kind=accumulation(implementation, promoted=False),
    )
    np.testing.assert_array_equal(bits(jax.vmap(f)(x, residual)), bits(y))
    cotangent = randn(4, y.shape, dtype)
    of_x, of_residual = vjp(cotangent)
    np.testing.assert_array_equal(bits(of_residual), bits(cotangent))
    (want,) = jax.vjp(lambda x: fp8_dense(x, kernel, bias, **options), x)[1](cotangent)
    np.testing.assert_array_equal(bits(of_x), bits(want))
    layer = PaddedFP8Dense(n, **options)
    params = {"params": {"kernel": kernel, "bias": bias}}
    np.testing.assert_array_equal(bits(layer.apply(params, x, residual=residual)), bits(y))


@implementations
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_weight_in_floats(activation, implementation):
    options = dict(activation=activation, implementation=implementation)
    y = fp8_dense_float(X, W, BIAS, residual=RESIDUAL, **options)
    np.testing.assert_array_equal(y, fp8_dense(X, KERNEL, BIAS, residual=RESIDUAL, **options))
    cotangent = randn(5, (M, N))

    def vjp(residual):
        def f(x, w, bias, *r):
            return fp8_dense_float(x, w, bias, residual=r[0] if r else None, **options)

        return jax.vjp(f, X, W, BIAS, *residual)[1](cotangent)

    *got, of_residual = vjp((RESIDUAL,))
    np.testing.assert_array_equal(of_residual, cotangent)
    jax.tree.map(np.testing.assert_array_equal, tuple(got), vjp(()))
    # Of the residual alone no other tangent is formed: 0 times infinity would be NaN.
    infinite = BIAS.at[0].set(-jnp.inf)
    f = functools.partial(fp8_dense_float, X, W, infinite, **options)
    _, tangent = jax.jvp(lambda r: f(residual=r), (RESIDUAL,), (cotangent,))
    np.testing.assert_array_equal(tangent, cotangent)


@implementations
def test_vmap(implementation):
    """Of x and the residual together, of either alone, and of a stack of kernels."""
    f = functools.partial(fp8_dense, bias=BIAS, implementation=implementation)

    def one(x, kernel, residual):
        return f(x, kernel, residual=residual)

    xs, residuals = randn(6, (3, M, K)), randn(7, (3, M, N))
    stack = PaddedKernel.from_dense(randn(8, (3, K, N)))
    for axes in ((0, None, 0), (0, None, None), (None, None, 0), (0, 0, 0), (None, 0, None)):
        own = (xs, stack, residuals), (X, KERNEL, RESIDUAL)
        args = [own[0][i] if axis == 0 else own[1][i] for i, axis in enumerate(axes)]
        got = jax.vmap(one, in_axes=axes)(*args)
        for i in range(3):
            picked = [
                jax.tree.map(lambda a, i=i: a[i], a) if axis == 0 else a
                for a, axis in zip(args, axes, strict=True)
            ]
            np.testing.assert_allclose(got[i], one(*picked), **CLOSE)


@pytest.mark.parametrize("param_dtype", [jnp.float8_e4m3fn, jnp.float32])
def test_layers(param_dtype):
    """A block of a transformer, in Linen and in NNX, under `jit`."""
    options = dict(param_dtype=param_dtype, activation="silu")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = PaddedFP8Dense(N, **options, name="up")(x)
            return PaddedFP8Dense(K, param_dtype=param_dtype, name="down")(h, residual=x)

    params = Block().init(jax.random.key(0), X)
    up, down = (params["params"][name] for name in ("up", "down"))
    dense = fp8_dense if param_dtype == jnp.float8_e4m3fn else fp8_dense_float
    h = dense(X, up["kernel"], up["bias"], activation="silu")
    want = dense(h, down["kernel"], down["bias"], residual=X)
    assert not np.allclose(want, dense(h, down["kernel"], down["bias"]), atol=0.1)
    np.testing.assert_allclose(jax.jit(Block().apply)(params, X), want, **CLOSE)

    layer = PaddedFP8Linear(K, N, **options, rngs=nnx.Rngs(0))
    kernel, bias = (v.get_value() for v in (layer.kernel, layer.bias))
    want = dense(X, kernel, bias, activation="silu", residual=RESIDUAL)
    np.testing.assert_allclose(nnx.jit(layer)(X, residual=RESIDUAL), want, **CLOSE)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("n", "dtype", "inside"),
    [
        (64, jnp.bfloat16, True),
        (56, jnp.float16, True),
        (50, jnp.bfloat16, False),
        (52, jnp.float16, False),
        (64, jnp.float32, False),
    ],
)
def test_is_part_of_the_custom_call(n, dtype, inside, quantized):
    """For 16 bits, where TMA addresses the rows; else XLA adds it in float32, and rounds once."""
    kernel = PaddedKernel.from_dense(randn(1, (K, n)))

    def f(x, residual):
        x = quantize_input(x) if quantized else x
        return fp8_dense(x, kernel, activation="gelu", residual=residual, out_dtype=dtype)

    text = cuda_text(f, X.astype(jnp.bfloat16), randn(2, (M, n), dtype))
    call = [line for line in text.splitlines() if re.search("@jaxfp8_(dense|scaled_mat)", line)]
    assert len(call) == 1
    result = re.search(rf"-> \(?tensor<{M}x{n}x(\w+)>", call[0])
    assert result is not None
    assert result[1] == ("f32" if not inside else "bf16" if dtype == jnp.bfloat16 else "f16")
    assert text.count("stablehlo.add") == (0 if inside else 1)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, r"`residual` must have the dtype of the result, float32, but it is bfloat16",
         {"residual": RESIDUAL.astype(jnp.bfloat16)}),
        (TypeError, r"the result, bfloat16, but it is float32",
         {"residual": RESIDUAL, "out_dtype": jnp.bfloat16}),
        (TypeError, r"the result, float32, but it is int32",
         {"residual": RESIDUAL.astype(jnp.int32)}),
        (TypeError, r"`residual` must be an array of float32, .* but it is a list\. Convert it",
         {"residual": RESIDUAL.tolist()}),
        (ValueError, r"`residual` must have the shape of the result, \(12, 50\), .*\(50,\)",
         {"residual": RESIDUAL[0]}),
        (ValueError, r"the shape of the result, \(12, 50\), but its shape is \(12, 64\)",
         {"residual": jnp.zeros((12, 64))}),
        (ValueError, r"`residual` must be None with an `out_scale`",
         {"residual": RESIDUAL, "out_scale": 0.1}),
    ],
)  # fmt: skip
def test_a_wrong_one(error, match, options):
    with pytest.raises(error, match=match):
        fp8_dense(X, KERNEL, BIAS, **options)
