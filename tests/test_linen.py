"""PaddedFP8Dense: its parameter trees, its values, and that it means what nn.Dense means."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from update_cases import assert_same_bits

from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import PaddedKernel


KEY = jax.random.key(0)
FLOAT = jnp.float32


def inputs(*shape: int, seed: int = 1, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def rounded(a: np.ndarray, scale) -> np.ndarray:
    """`a` rounded to e4m3 under `scale`, in float64."""
    codes = np.clip(a * (np.float32(1) / scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * scale.astype(np.float64)


def reference(x, w, bias, *, x_scale=None, per_channel=True):
    """The layer before its activation in float64, and the error float32 sums may make of it."""
    inverse = np.float32(1) / np.float32(448)
    if x_scale is None:
        x_scale = np.abs(x).max(-1, keepdims=True, initial=0) * inverse
        x_scale = np.where(x_scale < 2.0**-126, np.float32(1), x_scale)
    x = rounded(x, np.asarray(x_scale))
    w = rounded(w, np.abs(w).max(axis=0 if per_channel else None) * inverse)
    # A float32 sum of K products is off by at most K·2^-24 of the sum of their sizes; the two
    # scales, the bias and the activation add a few roundings more.
    slack = (w.shape[0] + 16) * 2.0**-24 * (np.abs(x) @ np.abs(w) + np.abs(bias))
    return x @ w + bias, slack


@pytest.mark.parametrize("k,n", [(64, 100), (33, 10), (1, 1)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_values_and_tree(k, n, per_channel):
    layer = PaddedFP8Dense(n, per_channel=per_channel, bias_init=nn.initializers.normal())
    x = inputs(7, k)
    params = layer.init(KEY, x)["params"]
    assert set(params) == {"kernel", "bias"}
    assert (params["bias"].shape, params["bias"].dtype) == ((n,), jnp.float32)
    assert (params["kernel"].in_features, params["kernel"].out_features) == (k, n)
    dense = nn.Dense(n, bias_init=nn.initializers.normal()).init(KEY, x)["params"]
    assert_same_bits(
        params["kernel"], PaddedKernel.from_dense(dense["kernel"], per_channel=per_channel)
    )
    w, bias = np.asarray(dense["kernel"]), np.asarray(params["bias"])
    want, slack = reference(x, w, bias, per_channel=per_channel)
    got = np.asarray(layer.apply({"params": params}, x))
    assert (got.shape, got.dtype) == ((7, n), np.float32)
    assert (np.abs(got - want) <= slack).all()


@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("param_dtype", ["float8_e4m3fn", "float32"])
def test_any_leading_axes(lead, param_dtype):
    layer = PaddedFP8Dense(10, param_dtype=param_dtype)
    params = layer.init(KEY, inputs(1, 33))
    x = inputs(*lead, 33)
    y = layer.apply(params, x)
    assert (y.shape, y.dtype) == ((*lead, 10), jnp.float32)
    w = np.asarray(nn.Dense(10).init(KEY, x)["params"]["kernel"])
    want, slack = reference(x, w, np.zeros(10, np.float32))
    assert (np.abs(np.asarray(y) - want) <= slack).all()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", lambda z: np.maximum(z, 0)),
        ("gelu", lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))),
        ("silu", lambda z: z / (1 + np.exp(-z))),
    ],
)
@pytest.mark.parametrize("param_dtype", ["float8_e4m3fn", "float32"])
def test_activation(name, function, param_dtype):
    layer = PaddedFP8Dense(50, activation=name, param_dtype=param_dtype)
    x = inputs(9, 33)
    params = layer.init(KEY, x)
    w = np.asarray(nn.Dense(50).init(KEY, x)["params"]["kernel"])
    z, slack = reference(x, w, np.zeros(50, np.float32))
    # No slope of the three exceeds 1.13; the functions themselves are good to a few float32 ulps.
    bound = 1.13 * slack + 2.0**-20 * np.maximum(np.abs(z), 1e-3)
    assert (np.abs(np.asarray(layer.apply(params, x)) - function(z)) <= bound).all()


@pytest.mark.parametrize("param_dtype", ["float8_e4m3fn", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "out"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("float32", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtype_casts_the_input_and_names_the_result(param_dtype, x_dtype, dtype, out):
    layer = PaddedFP8Dense(10, dtype=dtype, param_dtype=param_dtype)
    x = jnp.asarray(inputs(4, 33)).astype(x_dtype)
    params = layer.init(KEY, x)
    y = layer.apply(params, x)
    assert y.dtype == out
    # The same sums in float32, rounded once.
    wide = PaddedFP8Dense(10, dtype=jnp.float32, param_dtype=param_dtype)
    assert_same_bits(y, wide.apply(params, x.astype(dtype or x_dtype)).astype(out))


@pytest.mark.parametrize("param_dtype", ["float8_e4m3fn", "float32"])
def test_float64_computes_in_float32(param_dtype):
    layer = PaddedFP8Dense(10, param_dtype=param_dtype)
    x = inputs(4, 33)
    params = layer.init(KEY, x)
    narrow = layer.apply(params, x)
    with jax.enable_x64(True):
        wide = layer.apply(params, jnp.asarray(x, jnp.float64))
        named = PaddedFP8Dense(10, dtype=jnp.float64, param_dtype=param_dtype).apply(params, x)
    assert wide.dtype == named.dtype == jnp.float64
    np.testing.assert_array_equal(np.asarray(wide, np.float32), narrow)
    np.testing.assert_array_equal(np.asarray(named, np.float32), narrow)


class Net(nn.Module):
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        options = dict(param_dtype=self.param_dtype, bias_init=nn.initializers.normal())
        x = nn.LayerNorm()(PaddedFP8Dense(50, static_x_scale=True, **options)(x))
        return PaddedFP8Dense(10, **options)(x)


def test_one_key_gives_both_modes_and_nn_dense_the_same_weights():
    x = inputs(4, 33)
    trained = Net(FLOAT).init(KEY, x)["params"]
    served = Net(jnp.float8_e4m3fn).init(KEY, x)["params"]
    for name in ("PaddedFP8Dense_0", "PaddedFP8Dense_1"):
        assert set(trained[name]) == {"kernel", "bias"}
        assert_same_bits(served[name]["kernel"], PaddedKernel.from_dense(trained[name]["kernel"]))
        assert_same_bits(served[name]["bias"], trained[name]["bias"])
    assert served["PaddedFP8Dense_0"]["x_scale"] == 1.0
    assert "x_scale" not in served["PaddedFP8Dense_1"]
    single = PaddedFP8Dense(50, param_dtype=FLOAT, bias_init=nn.initializers.normal())
    dense = nn.Dense(50, bias_init=nn.initializers.normal())
    assert_same_bits(single.init(KEY, x), dense.init(KEY, x))


def test_both_modes_give_the_same_result():
    x = inputs(4, 33)
    trained = PaddedFP8Dense(50, param_dtype=FLOAT, activation="gelu")
    served = PaddedFP8Dense(50, activation="gelu")
    assert_same_bits(trained.apply(trained.init(KEY, x), x), served.apply(served.init(KEY, x), x))


def test_float_gradients_are_those_of_nn_dense():
    # With a fixed cotangent nothing but the straight-through rule is left in the gradients.
    x, cotangent = inputs(7, 33), inputs(7, 10, seed=2)
    params = nn.Dense(10).init(KEY, x)

    def loss(params, x, layer):
        return (layer.apply(params, x) * cotangent).sum()

    grad = jax.grad(loss, argnums=(0, 1))
    got = grad(params, x, PaddedFP8Dense(10, param_dtype=FLOAT))
    want = grad(params, x, nn.Dense(10))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_fp8_parameters_cannot_be_trained_by_accident():
    x = inputs(7, 33)
    layer = PaddedFP8Dense(10)
    params = layer.init(KEY, x)
    with pytest.raises(TypeError, match="float `param_dtype`.*stop_gradient"):
        jax.grad(lambda p: layer.apply(p, x).sum(), allow_int=True)(params)
    through = jax.grad(lambda x: layer.apply(jax.lax.stop_gradient(params), x).sum())(x)
    want = np.asarray(params["params"]["kernel"].dequantize()).sum(-1)
    np.testing.assert_allclose(through, np.tile(want, (7, 1)), rtol=1e-5, atol=1e-5)


def test_static_x_scale():
    layer = PaddedFP8Dense(10, static_x_scale=True)
    x = inputs(4, 33)
    params = layer.init(KEY, x)["params"]
    assert (params["x_scale"].shape, params["x_scale"].dtype) == ((), jnp.float32)
    w = np.asarray(nn.Dense(10).init(KEY, x)["params"]["kernel"])
    for scale in (1.0, 0.01, 2.0**-10):  # the last one saturates x at ±0.4375
        served = {"params": {**params, "x_scale": jnp.float32(scale)}}
        want, slack = reference(x, w, np.zeros(10, np.float32), x_scale=np.float32(scale))
        assert (np.abs(np.asarray(layer.apply(served, x)) - want) <= slack).all()


def test_without_a_bias():
    layer, x = PaddedFP8Dense(10, use_bias=False), inputs(4, 33)
    params = layer.init(KEY, x)
    assert set(params["params"]) == {"kernel"}
    zero = {"params": {**params["params"], "bias": jnp.zeros(10)}}
    assert_same_bits(layer.apply(params, x), PaddedFP8Dense(10).apply(zero, x))


@pytest.mark.parametrize("precision", [None, "default", "highest", jax.lax.Precision.HIGH])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_precision_and_implementation_pass_through(precision, implementation):
    layer, x = PaddedFP8Dense(10, precision=precision, implementation=implementation), inputs(4, 33)
    params = layer.init(KEY, x)
    np.testing.assert_allclose(layer.apply(params, x), PaddedFP8Dense(10).apply(params, x), 1e-6)


def test_tabulate_shows_the_padded_parameters():
    table = nn.tabulate(PaddedFP8Dense(100), KEY, console_kwargs={"width": 200})(inputs(4, 64))
    assert "float8_e4m3fn[112,64]" in table.replace("\x1b[2m", "").replace("\x1b[0m", "")
