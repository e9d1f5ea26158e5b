"""Under jax's stricter settings the layers do what they do without, as nn.Dense does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOSE, bits, randn

from jaxfp8 import (
    PaddedFP8Dense,
    PaddedKernel,
    dequantize_params,
    fp8_dense,
    quantize,
    quantize_input,
    reload_params,
)


X, W, BIAS = randn(0, (5, 20)), randn(1, (20, 37)), randn(2, (37,))
KERNEL = PaddedKernel.from_dense(W)
SETTINGS = {
    "jax_numpy_dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "jax_numpy_rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "jax_debug_nans": lambda: jax.debug_nans(True),
    "jax_debug_infs": lambda: jax.debug_infs(True),
    "jax_disable_jit": jax.disable_jit,
    "jax_check_tracer_leaks": jax.checking_leaks,
}
settings = pytest.mark.parametrize("setting", SETTINGS)


def serve(x):
    """What a server does, from initialising a layer to reloading it, and a gradient of x."""
    layer = PaddedFP8Dense(37, activation="gelu")
    params = layer.init(jax.random.key(0), x)
    params = reload_params(params, {"params": {"kernel": W, "bias": BIAS}})

    def total(x, bias):
        y = fp8_dense(x, params["params"]["kernel"], bias, activation="silu")
        return jnp.sum(y.astype(jnp.float32))

    return (
        layer.apply(params, x),
        fp8_dense(quantize_input(x), KERNEL, BIAS, out_dtype=jnp.float32),
        jax.grad(total, (0, 1))(x, BIAS),
        dequantize_params(params),
    )


def train(x):
    """A gradient step's part: bfloat16 activations on float32 weights, and the other way round."""
    grads = []
    for dtype, param_dtype in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        layer = PaddedFP8Dense(37, dtype=dtype, param_dtype=param_dtype, activation="gelu")
        params = layer.init(jax.random.key(0), x)

        def total(params, x, layer=layer):
            return jnp.sum(layer.apply(params, x).astype(jnp.float32))

        grads.append(jax.grad(total, (0, 1))(params, x))
    return grads


@settings
@pytest.mark.parametrize("f", [serve, train])
def test_results_are_the_same(setting, f):
    want = f(X)
    with SETTINGS[setting]():
        got = f(X)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # bfloat16 rounds by 2^-8, and what is compiled apart may round otherwise.
        np.testing.assert_allclose(
            a, b, rtol=2**-7, atol=max(2**-7 * np.abs(b).max(), CLOSE["atol"])
        )


def test_quantizing_numbers_is_no_nan_under_debug_nans():
    """Eager, so that each constant of the code is looked at; rows of zeros among them."""
    x = X.at[0].set(0.0)
    want = quantize(x, axis=-1)
    with jax.debug_nans(True):
        got = quantize(x, axis=-1)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_a_nan_is_still_found_by_debug_nans():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        fp8_dense(X.at[1, 2].set(jnp.nan), KERNEL)
