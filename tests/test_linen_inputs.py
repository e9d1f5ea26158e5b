"""PaddedFP8Dense: inputs that are quantized already, and results for the next layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_quantized, cuda_text, randn
from update_cases import assert_same_bits

from jaxfp8 import PaddedFP8Dense, QuantizedInput, fp8_dense, quantize, quantize_input
from jaxfp8.dense_float import fp8_dense_float


KEY = jax.random.key(0)
K, N = 33, 50
X = randn(0, (2, 5, K))
QX = quantize_input(X)
PAIR = quantize(X, axis=-1)
SCALE = np.float32(0.02)
options = dict(bias_init=nn.initializers.normal(), activation="relu")
quantized = pytest.mark.parametrize("inputs", [QX, PAIR], ids=["QuantizedInput", "pair"])


@quantized
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_a_quantized_input_is_the_input(inputs, dtype):
    layer = PaddedFP8Dense(N, dtype=dtype, **options)
    params = layer.init(KEY, X)
    # Initialised by either, the parameters are the same.
    assert_same_bits(layer.init(KEY, inputs), params)
    y = layer.apply(params, inputs)
    assert y.dtype == (dtype or "bfloat16")
    wide = PaddedFP8Dense(N, **options).apply(params, X)
    assert wide.dtype == jnp.float32
    assert_same_bits(y, wide.astype(y.dtype))


def test_out_scale_quantizes_the_result():
    layer = PaddedFP8Dense(N, **options)
    params = layer.init(KEY, X)
    y = layer.apply(params, X)
    for inputs in (X, QX, PAIR):
        hidden = layer.apply(params, inputs, out_scale=SCALE)
        assert (hidden.shape, hidden.features, hidden.scale) == ((2, 5, N), N, SCALE)
        check_quantized(hidden.qvalue, y, SCALE)
    # Of a static x_scale, which is about the input, an out_scale is independent.
    static = PaddedFP8Dense(N, static_x_scale=True, **options)
    own = {"params": {**params["params"], "x_scale": jnp.float32(0.01)}}
    check_quantized(static.apply(own, X, out_scale=SCALE).qvalue, static.apply(own, X), SCALE)


def test_float64_by_name():
    layer = PaddedFP8Dense(N, dtype=jnp.float64, **options)
    params = layer.init(KEY, X)
    with jax.enable_x64(True):
        y = layer.apply(params, QX)
    assert y.dtype == jnp.float64
    np.testing.assert_array_equal(np.asarray(y, np.float32), layer.apply(params, QX))


class Attention(nn.Module):
    """What q, k and v share, and what an MLP hands on."""

    @nn.compact
    def __call__(self, x, out_scale):
        qx = quantize_input(x)
        q, k, v = (PaddedFP8Dense(N, name=name)(qx) for name in "qkv")
        hidden = PaddedFP8Dense(3 * N, activation="silu", name="up")(q * k * v, out_scale=out_scale)
        return PaddedFP8Dense(K, dtype=x.dtype, name="down")(hidden)


def test_a_block_shares_and_hands_on():
    model = Attention()
    params = jax.jit(model.init)(KEY, X, SCALE)
    tree = params["params"]
    assert tree["down"]["kernel"].in_features == 3 * N
    text = cuda_text(model.apply, params, X, SCALE)
    calls = [text.count(f"custom_call @jaxfp8_{name}_v1") for name in ("quantize", "dense")]
    assert calls == [1, 1] and text.count("custom_call @jaxfp8_scaled_matmul_v1") == 4

    def dense(name, x, **options):
        return fp8_dense(x, tree[name]["kernel"], tree[name]["bias"], **options)

    q, k, v = (dense(name, X, out_dtype=jnp.bfloat16) for name in "qkv")
    hidden = dense("up", q * k * v, activation="silu", out_scale=SCALE)
    assert_same_bits(model.apply(params, X, SCALE), dense("down", hidden, out_dtype=jnp.float32))


class Block(nn.Module):
    """A layer that takes and gives quantized values, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, hidden, _):
        return PaddedFP8Dense(K, activation="gelu")(hidden, out_scale=SCALE), None


def test_a_scan_carries_quantized_values():
    model = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    first = quantize_input(X[0], x_scale=SCALE)
    params = jax.jit(model.init)(KEY, first, None)
    got, _ = jax.jit(model.apply)(params, first, None)
    assert isinstance(got, QuantizedInput) and got.shape == (5, K)
    want, (stack,) = first, params["params"].values()
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], stack)
        want = fp8_dense(want, one["kernel"], one["bias"], activation="gelu", out_scale=SCALE)
    # Sums of another order may be rounded to the next code, which is an eighth at most.
    np.testing.assert_allclose(got.dequantize(), want.dequantize(), rtol=0.15, atol=SCALE / 64)


# Errors


@quantized
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_quantized_values_in_training(inputs, param_dtype):
    layer = PaddedFP8Dense(N, param_dtype=param_dtype)
    params = layer.init(KEY, X)
    remedy = rf"only to serve, but its `param_dtype` is {param_dtype}.*`param_dtype=jnp.float8_e4m3"
    for call in (layer.init, lambda key, *args: layer.apply(params, *args)):
        with pytest.raises(TypeError, match=f"takes a quantized `inputs` {remedy}"):
            call(KEY, inputs)
    with pytest.raises(TypeError, match=f"takes `out_scale` {remedy}"):
        layer.apply(params, X, out_scale=SCALE)
    with pytest.raises(TypeError, match="takes a quantized `inputs`"):
        layer.apply(params, inputs, out_scale=SCALE)
    with pytest.raises(TypeError, match="but it is a QuantizedInput"):
        fp8_dense_float(QX, params["params"]["kernel"])


@quantized
def test_a_static_x_scale_beside_the_scale_of_the_input(inputs):
    layer = PaddedFP8Dense(N, static_x_scale=True)
    params = layer.init(KEY, X)
    message = r"`static_x_scale` must be False.*has its own scale.*`quantize_input\(x, x_scale=par"
    for call in (layer.init, lambda key, x: layer.apply(params, x)):
        with pytest.raises(ValueError, match=message):
            call(KEY, inputs)
    # The remedy gives what the layer itself gives.
    own = {"params": {**params["params"], "x_scale": jnp.float32(0.01)}}
    qx = quantize_input(X, x_scale=own["params"]["x_scale"])
    got = PaddedFP8Dense(N, dtype=jnp.float32).apply(own, qx)
    assert_same_bits(got, layer.apply(own, X))


@pytest.mark.parametrize("inputs", [X, QX], ids=["float", "quantized"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dtype_beside_an_out_scale(dtype, inputs):
    layer = PaddedFP8Dense(N, dtype=dtype)
    params = layer.init(KEY, X)
    with pytest.raises(ValueError, match=rf"`dtype` must be None with an `out_scale`.*is {dtype}"):
        layer.apply(params, inputs, out_scale=SCALE)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (quantize_input(X[..., :32]), ValueError, r"`kernel` has in_features=33 .*in_features=32 "),
        ((PAIR[0][..., :32], PAIR[1]), ValueError, r"`kernel` has in_features=33 .*in_features=32"),
        ((QX.qvalue, QX.scale), ValueError, r"`kernel` has in_features=33 .*in_features=48 "),
        (QuantizedInput(QX.qvalue, QX.scale[..., 0], K), ValueError,
         r"`inputs\.scale` must have shape \[\] or \[2, 5, 1\].*\(2, 5\)"),
        ((PAIR[0], np.ones(1)), ValueError, r"`inputs\[1\]` must have shape.*\(1,\)"),
        (PAIR[:1], TypeError, r"`inputs` must be a float array, a QuantizedInput.*tuple of 1"),
        ((X, PAIR[1]), TypeError, r"`inputs\[0\]` must be float8_e4m3fn.*float32"),
        (PAIR[0], TypeError, r"`inputs` must be a real float.*float8_e4m3fn"),
    ],
    ids=["QuantizedInput", "pair", "padded pair", "scale", "scale of a pair", "triple", "float",
         "no scale"],
)  # fmt: skip
def test_other_inputs(inputs, error, message):
    layer = PaddedFP8Dense(N)
    with pytest.raises(error, match=message):
        layer.apply(layer.init(KEY, X), inputs)


def test_a_wrong_out_scale():
    layer = PaddedFP8Dense(N)
    params = layer.init(KEY, X)
    with pytest.raises(ValueError, match=r"`out_scale` must have shape \[\].*\(50,\)"):
        layer.apply(params, X, out_scale=np.ones(N))


def test_quantized_values_have_no_gradient():
    layer = PaddedFP8Dense(N)
    params = jax.lax.stop_gradient(layer.init(KEY, X))
    for f in (
        lambda x: layer.apply(params, quantize_input(x)).astype(jnp.float32),
        lambda x: layer.apply(params, x, out_scale=SCALE).dequantize(),
    ):
        with pytest.raises(TypeError, match="quantized .*cannot be differentiated"):
            jax.grad(lambda x, f=f: f(x).sum())(X)
