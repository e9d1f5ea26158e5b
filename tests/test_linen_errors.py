"""What PaddedFP8Dense refuses: arguments, inputs, and parameter trees that are not its own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.quantize import quantize


KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 18)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(18, 20)).astype(np.float32)


class Net(nn.Module):
    """Two layers, so that a path has two parts."""

    param_dtype: Any = jnp.float8_e4m3fn

    @nn.compact
    def __call__(self, x):
        x = PaddedFP8Dense(20, param_dtype=self.param_dtype, name="first")(x)
        return PaddedFP8Dense(10, param_dtype=self.param_dtype, name="second")(x)


def tree(param_dtype=jnp.float8_e4m3fn, **first) -> dict:
    """Net's parameters, with some of the first layer's replaced."""
    params = Net(param_dtype).init(KEY, X)["params"]
    return {"params": {**params, "first": {**params["first"], **first}}}


def padded(*shape: int, **options) -> PaddedKernel:
    return PaddedKernel.from_dense(np.ones(shape, np.float32), **options)


# Arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dot_general", jax.lax.dot_general),
        ("dot_general_cls", nn.Fp8DirectDotGeneralOp),
        ("promote_dtype", nn.dtypes.promote_dtype),
    ],
)
def test_hooks_of_nn_dense_are_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"`{name}` of nn.Dense cannot be given.*Leave it out"):
        PaddedFP8Dense(10, **{name: value})


@pytest.mark.parametrize("features", [16.0, "16", (16,)])
def test_features_that_are_no_integer(features):
    with pytest.raises(TypeError, match=r"`features` must be an integer, but it is"):
        PaddedFP8Dense(features)
    assert PaddedFP8Dense(np.int64(16)).features == 16


@pytest.mark.parametrize("features", [0, -3])
def test_features_of_zero(features):
    with pytest.raises(ValueError, match=f"`features` must be at least 1, but it is {features}"):
        PaddedFP8Dense(features)


@pytest.mark.parametrize(
    "dtype", [jnp.float8_e5m2, jnp.float8_e4m3fnuz, jnp.int8, jnp.complex64, None], ids=str
)
def test_other_param_dtypes(dtype):
    name = "None" if dtype is None else jnp.dtype(dtype).name
    with pytest.raises(TypeError, match=f"`param_dtype` must be float8_e4m3fn.*but it is {name}"):
        PaddedFP8Dense(10, param_dtype=dtype)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int32", "complex64"])
def test_other_result_dtypes(dtype):
    with pytest.raises(TypeError, match=f"`dtype` must be None.*but it is {dtype}"):
        PaddedFP8Dense(10, dtype=dtype)


@pytest.mark.parametrize("param_dtype", ["float8_e4m3fn", "float32"])
@pytest.mark.parametrize(
    ("option", "names"),
    [
        ({"activation": "tanh"}, "`activation`.*tanh"),
        ({"implementation": "triton"}, "`implementation`.*triton"),
        ({"precision": "sloppy"}, "`precision`.*sloppy"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_unknown_options(param_dtype, option, names):
    with pytest.raises(ValueError, match=names):
        PaddedFP8Dense(10, param_dtype=param_dtype, **option).init(KEY, X)


# Inputs


@pytest.mark.parametrize("param_dtype", ["float8_e4m3fn", "float32"])
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"])
def test_inputs_that_are_no_wide_float(param_dtype, dtype):
    # With a `dtype` too: a cast must not make an integer or an FP8 array without a scale pass.
    for layer in (
        PaddedFP8Dense(10, param_dtype=param_dtype),
        PaddedFP8Dense(10, param_dtype=param_dtype, dtype=jnp.bfloat16),
    ):
        with pytest.raises(TypeError, match=f"`inputs` must be a real float.*but it is {dtype}"):
            layer.init(KEY, jnp.ones((4, 18), dtype))


@pytest.mark.parametrize("shape", [(), (0,), (4, 0)], ids=str)
def test_inputs_without_features(shape):
    with pytest.raises(ValueError, match=r"`inputs` must have shape \[\*lead, in_features\]"):
        PaddedFP8Dense(10).init(KEY, jnp.ones(shape))


@pytest.mark.parametrize("width", [17, 20, 32])
def test_inputs_of_another_width(width):
    # 20 pads to the same 32 as 18, and 32 is the padded size itself.
    params = tree()
    message = f"`first/kernel` has in_features=18.*needs in_features={width} .the last axis"
    with pytest.raises(ValueError, match=message):
        Net().apply(params, jnp.ones((4, width)))
    with pytest.raises(ValueError, match=rf"`first/kernel` must have shape \({width}, 20\)"):
        Net(jnp.float32).apply(tree(jnp.float32), jnp.ones((4, width)))


# Parameter trees given to an FP8 module


@pytest.mark.parametrize("k,n", [(20, 20), (18, 18), (20, 18), (18, 40), (5, 20)])
def test_a_kernel_of_other_logical_size(k, n):
    message = f"`first/kernel` has in_features={k} and out_features={n}, but the layer needs "
    for apply in (Net().apply, jax.jit(Net().apply)):
        with pytest.raises(ValueError, match=message + "in_features=18 .* out_features=20"):
            apply(tree(kernel=padded(k, n)), X)


@pytest.mark.parametrize(
    "kernel",
    [
        jnp.asarray(W),
        W.astype(jnp.bfloat16),
        DenseWeight(W.T, "out_in"),
        FP8Weight(*quantize(W)),
        quantize(W)[0],
        {"qvalue_18x20": np.ones((32, 32)), "scale_18x20": np.ones(32)},
    ],
    ids=["f32", "bf16", "DenseWeight", "FP8Weight", "fp8 without a scale", "Orbax's dict"],
)
def test_a_tree_that_is_not_padded(kernel):
    message = r"`first/kernel` must be a PaddedKernel.*`update_params\(params, loaded\)`"
    with pytest.raises(TypeError, match=message):
        Net().apply(tree(kernel=kernel), X)


def test_a_float_tree_given_to_an_fp8_module():
    with pytest.raises(TypeError, match="`first/kernel` must be a PaddedKernel.*dtype float32"):
        Net().apply(tree(jnp.float32), X)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=str)
def test_a_padded_tree_cast_by_tree_map(dtype):
    cast = jax.tree.map(lambda a: a.astype(dtype), tree())
    with pytest.raises(TypeError, match="`first/kernel` must hold a float8_e4m3fn.*A cast over"):
        Net().apply(cast, X)


def test_a_stack_given_to_one_layer():
    with pytest.raises(ValueError, match=r"`first/kernel` must be one layer's.*stack of .*\(3,\)"):
        Net().apply(tree(kernel=padded(3, 18, 20)), X)


def test_a_scale_of_the_other_kind():
    with pytest.raises(ValueError, match=r"`first/kernel` has a scale of shape \(\), but `per_ch"):
        Net().apply(tree(kernel=padded(18, 20, per_channel=False)), X)


@pytest.mark.parametrize(
    "scale", [jnp.ones(20), jnp.ones((32, 1)), jnp.ones(16)], ids=["logical", "column", "short"]
)
def test_a_scale_of_the_wrong_shape(scale):
    with pytest.raises(ValueError, match="`first/kernel` has in_features=18.*`scale`"):
        Net().apply(tree(kernel=PaddedKernel(padded(18, 20).qvalue, scale, 18, 20)), X)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (jnp.zeros(32), ValueError, r"logical shape \(20,\), but its shape is \(32,\)"),
        (jnp.zeros(()), ValueError, r"logical shape \(20,\), but its shape is \(\)"),
        (
            jnp.zeros(20, jnp.bfloat16),
            TypeError,
            "float32 array.*but it is an array of dtype bfloat16",
        ),
        (jnp.zeros(20, jnp.int32), TypeError, "float32 array.*but it is an array of dtype int32"),
    ],
    ids=["padded", "scalar", "bf16", "int"],
)
def test_a_wrong_bias(bias, error, message):
    with pytest.raises(error, match=f"`first/bias` must .*{message}"):
        Net().apply(tree(bias=bias), X)


@pytest.mark.parametrize("x_scale", [jnp.ones(1), jnp.ones((), jnp.bfloat16)], ids=str)
def test_a_wrong_x_scale(x_scale):
    layer = PaddedFP8Dense(20, static_x_scale=True)
    params = layer.init(KEY, X)["params"]
    with pytest.raises((TypeError, ValueError), match="Parameter `x_scale` must "):
        layer.apply({"params": {**params, "x_scale": x_scale}}, X)


# Parameter trees given to a float module


def test_a_padded_tree_given_to_a_float_module():
    message = r"`first/kernel` must be a float array.*`dequantize_params\(params\)`"
    with pytest.raises(TypeError, match=message):
        Net(jnp.float32).apply(tree(), X)


@pytest.mark.parametrize(
    "kernel",
    [quantize(W)[0], W.astype(np.int32), W.astype(np.complex64), DenseWeight(W), FP8Weight(W, 1)],
    ids=["fp8", "int", "complex", "DenseWeight", "FP8Weight"],
)
def test_a_kernel_that_is_no_float_array(kernel):
    with pytest.raises(TypeError, match="`first/kernel` must be a float array of 16 bits or more"):
        Net(jnp.float32).apply(tree(jnp.float32, kernel=kernel), X)


def test_a_transposed_float_kernel():
    with pytest.raises(ValueError, match=r"\(18, 20\).*\(20, 18\)\. It looks transposed"):
        Net(jnp.float32).apply(tree(jnp.float32, kernel=W.T), X)


def test_a_wrong_float_bias():
    with pytest.raises(ValueError, match=r"`first/bias` must have shape \(20,\)"):
        Net(jnp.float32).apply(tree(jnp.float32, bias=jnp.zeros(32)), X)


# Initializers


def test_boxes_whose_names_cannot_be_moved():
    named = nn.with_partitioning(nn.initializers.ones, ("a", "b", "c"))
    with pytest.raises(ValueError, match="at most two axes, .in, out., but it names .'a', 'b'"):
        PaddedFP8Dense(20, kernel_init=named).init(KEY, X)


@pytest.mark.parametrize("param_dtype", ["float8_e4m3fn", "float32"])
def test_a_donated_tree(param_dtype):
    params = tree(param_dtype)
    for leaf in jax.tree.leaves(params["params"]["first"]["kernel"]):
        leaf.delete()
    with pytest.raises(RuntimeError, match="`first/kernel` has been deleted.*`reload_params`"):
        Net(param_dtype).apply(params, X)
    with pytest.raises(RuntimeError, match="has been deleted"):  # JAX's own, before our code
        jax.jit(Net(param_dtype).apply)(params, X)


def test_a_tree_left_alone_by_an_error():
    params = tree(kernel=padded(20, 20))
    before = jax.device_get(params)
    with pytest.raises(ValueError):
        Net().apply(params, X)
    assert jax.tree.structure(before) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        assert a.tobytes() == np.asarray(b).tobytes()
