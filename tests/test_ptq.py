"""A model written without FP8, run on padded kernels: its values, beside three references."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import accumulation, bits, cuda_text, dense_product, implementations
from ptq_models import HIDDEN, KEY, TOKENS, WIDTH, Mlp, Transformer, inputs

from jaxfp8 import (
    PaddedFP8Dense,
    PaddedKernel,
    QuantizedModel,
    fp8_dense,
    fp8_dense_interceptor,
    quantize_dense_params,
)


MODEL = Transformer()
# Half a step of e4m3 is at most 2^-4 of a value; evenly spread, that is 2^-4/sqrt(3) rms. Errors of
# x and of the kernel are independent, and so are those of the K products, so this bounds the error
# of a dense layer's result in norm, whatever its size.
DENSE_ERROR = np.sqrt(2) * 2.0**-4 / np.sqrt(3)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(KEY, TOKENS)


@pytest.fixture(scope="module")
def served(params):
    return quantize_dense_params(params, apply=lambda tree: MODEL.apply(tree, TOKENS))


def test_three_lines():
    model, x = Mlp(), inputs(4, WIDTH)
    params = model.init(KEY, x)
    served = quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))
    y = jax.jit(QuantizedModel(model).apply)(served, x)
    assert served["params"]["up"]["kernel"].out_features == HIDDEN
    padded = Mlp(PaddedFP8Dense)
    np.testing.assert_array_equal(y, jax.jit(padded.apply)(served, x))


def test_the_tree_holds_the_same_bits_as_a_padded_models(params, served):
    for layer in (("mlp", "up"), ("mlp", "down"), ("logits",)):
        got, dense = served["params"], params["params"]
        for name in layer:
            got, dense = got[name], dense[name]
        want = PaddedKernel.from_dense(dense["kernel"])
        assert jax.tree.structure(got["kernel"]) == jax.tree.structure(want)
        np.testing.assert_array_equal(bits(got["kernel"].qvalue), bits(want.qvalue))
        np.testing.assert_array_equal(got["kernel"].scale, want.scale)
        if "bias" in dense:
            np.testing.assert_array_equal(got["bias"], dense["bias"])
    for name in ("embed", "before_attention", "attention", "before_mlp"):
        jax.tree.map(np.testing.assert_array_equal, served["params"][name], params["params"][name])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["op by op", "jit"])
def test_bitwise_a_padded_model_with_the_same_weights(served, wrap):
    want = wrap(Transformer(PaddedFP8Dense).apply)(served, TOKENS)
    np.testing.assert_array_equal(
        bits(wrap(QuantizedModel(MODEL).apply)(served, TOKENS)), bits(want)
    )
    with nn.intercept_methods(fp8_dense_interceptor()):
        np.testing.assert_array_equal(bits(wrap(MODEL.apply)(served, TOKENS)), bits(want))


@implementations
def test_every_layer_is_the_float64_product_of_its_codes(served, implementation):
    calls = {}

    def record(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if type(context.module) is nn.Dense:
            calls[context.module.path] = (args[0], y)
        return y

    with nn.intercept_methods(record):
        QuantizedModel(MODEL, implementation).apply(served, TOKENS)
    assert set(calls) == {("mlp", "up"), ("mlp", "down"), ("logits",)}
    for path, (x, y) in calls.items():
        layer = functools.reduce(lambda tree, name: tree[name], path, served["params"])
        product, *scales = dense_product(x, layer["kernel"])
        y = y.reshape(-1, y.shape[-1])
        product.check(y, *scales, layer.get("bias"), kind=accumulation(implementation, False))


def relative(got, want):
    return np.linalg.norm(np.float64(got) - np.float64(want)) / np.linalg.norm(np.float64(want))


def test_near_the_float_model(params, served):
    got, want = QuantizedModel(MODEL).apply(served, TOKENS), MODEL.apply(params, TOKENS)
    # Logits of a stream that carries the MLP's error besides: two layers one after the other, the
    # first one's error grown by gelu's largest slope, 1.13.
    assert 0.005 < relative(got, want) < DENSE_ERROR * (1 + 1 + 1.13)


@pytest.mark.parametrize("shape", [(1, 1), (33, 10), (1280, 3420)])
def test_one_layer_near_the_float_one(shape):
    k, n = shape
    x, model = inputs(64, k), nn.Dense(n)
    params = model.init(KEY, x)
    got = QuantizedModel(model).apply(quantize_dense_params(params), x)
    bound = DENSE_ERROR if k > 1 else 2.0**-3
    assert relative(got, model.apply(params, x)) < bound


def test_unselected_layers_keep_their_bits(params):
    apply = QuantizedModel(MODEL).apply
    np.testing.assert_array_equal(bits(apply(params, TOKENS)), bits(MODEL.apply(params, TOKENS)))
    # Only the logits are FP8: what goes into them is what it was.
    served = quantize_dense_params(params, "logits")
    seen = []
    for model, tree in ((QuantizedModel(MODEL), served), (MODEL, params)):
        _, state = model.apply(tree, TOKENS, capture_intermediates=True)
        seen.append(state["intermediates"])
    assert not np.array_equal(seen[0].pop("__call__")[0], seen[1].pop("__call__")[0])
    assert not np.array_equal(*(s.pop("logits")["__call__"][0] for s in seen))
    assert seen[0]["mlp"]["up"]["__call__"][0].shape == (3, 7, HIDDEN)
    jax.tree.map(np.testing.assert_array_equal, *seen)


# nn.Dense's attributes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_dtype_and_bias_are_those_of_a_padded_layer(dtype, use_bias):
    x = inputs(5, 33)
    fields = dict(features=10, use_bias=use_bias, dtype=dtype)
    bias_init = nn.initializers.normal()
    model = nn.Dense(**fields, bias_init=bias_init)
    served = quantize_dense_params(model.init(KEY, x))
    got = QuantizedModel(model).apply(served, x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(bits(got), bits(PaddedFP8Dense(**fields).apply(served, x)))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32", "int32", "bool"])
def test_without_dtype_the_result_is_of_nn_denses(x_dtype, param_dtype, use_bias):
    x = inputs(5, 33).astype(x_dtype)
    model = nn.Dense(10, use_bias=use_bias, param_dtype=param_dtype)
    params = model.init(KEY, x)
    served = quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))
    got, want = QuantizedModel(model).apply(served, x), model.apply(params, x)
    assert got.dtype == want.dtype
    kernel = served["params"]["kernel"]
    plain = fp8_dense(x.astype(want.dtype), kernel, served["params"].get("bias"))
    np.testing.assert_array_equal(bits(got), bits(plain))


def test_a_cast_tree_decides_the_dtype_as_it_did():
    x, model = inputs(5, 33, dtype=jnp.bfloat16), nn.Dense(10)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.init(KEY, x))
    served = quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))
    assert served["params"]["bias"].dtype == jnp.bfloat16
    got = QuantizedModel(model).apply(served, x)
    assert got.dtype == model.apply(params, x).dtype == jnp.bfloat16


def test_float64():
    with jax.enable_x64(True):
        x, model = inputs(5, 33, dtype=jnp.float64), nn.Dense(10, param_dtype=jnp.float64)
        served = quantize_dense_params(model.init(KEY, x))
        got = QuantizedModel(model).apply(served, x)
        assert got.dtype == jnp.float64
        want = fp8_dense(x.astype(jnp.float32), served["params"]["kernel"]).astype(jnp.float64)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("precision", [None, "highest", jax.lax.Precision.DEFAULT])
def test_precision_reaches_the_product(precision):
    x, model = inputs(5, 33), nn.Dense(10, precision=precision)
    served = quantize_dense_params(model.init(KEY, x))
    promoted = int(precision == "highest")
    assert f"promoted = {promoted} : i32" in cuda_text(QuantizedModel(model).apply, served, x)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3, 4)])
def test_leading_axes(lead):
    model, x = nn.Dense(10), inputs(*lead, 33)
    served = quantize_dense_params(model.init(KEY, jnp.ones((1, 33))))
    want = PaddedFP8Dense(10).apply(served, x)
    got = QuantizedModel(model).apply(served, x)
    assert got.shape == (*lead, 10)
    np.testing.assert_array_equal(got, want)


def test_per_tensor_scales():
    model, x = nn.Dense(10), inputs(5, 33)
    served = quantize_dense_params(model.init(KEY, x), per_channel=False)
    assert served["params"]["kernel"].scale.shape == ()
    want = PaddedFP8Dense(10, per_channel=False).apply(served, x)
    np.testing.assert_array_equal(QuantizedModel(model).apply(served, x), want)


def test_a_static_scale_beside_the_kernel_is_used():
    model, x = nn.Dense(10), inputs(5, 33)
    served = quantize_dense_params(model.init(KEY, x))
    served["params"]["x_scale"] = jnp.float32(0.25)
    want = PaddedFP8Dense(10, static_x_scale=True).apply(served, x)
    np.testing.assert_array_equal(QuantizedModel(model).apply(served, x), want)


def test_a_padded_layer_of_the_model_stays_itself():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = PaddedFP8Dense(20, activation="gelu", name="fused")(x)
            return nn.Dense(10, name="plain")(h)

    model, x = Mixed(), inputs(5, 33)
    params = model.init(KEY, x)
    served = quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))
    got = QuantizedModel(model).apply(served, x)
    inside = PaddedFP8Dense(20, activation="gelu").apply({"params": params["params"]["fused"]}, x)
    want = PaddedFP8Dense(10).apply({"params": served["params"]["plain"]}, inside)
    np.testing.assert_array_equal(got, want)
