"""PaddedFP8Linear: bit for bit PaddedFP8Dense, with nnx.Linear's arguments and Variables of NNX."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_cases import inputs
from update_cases import assert_same_bits, weight

from jaxfp8 import PaddedFP8Dense, PaddedKernel, QuantizedInput, quantize_input, update_params
from jaxfp8.nnx import ActivationScale, FP8Param, PaddedFP8Linear


FLOAT = jnp.float32


def pair(k: int, n: int, **options):
    """A Linen and an NNX layer of the same weights, and the Linen layer's parameters."""
    loaded = {"kernel": weight(k, n), "bias": weight(n)}
    if options.get("static_x_scale") and "param_dtype" not in options:
        loaded["x_scale"] = np.float32(0.02)
    dense = PaddedFP8Dense(n, **options)
    abstract = jax.eval_shape(dense.init, jax.random.key(0), jnp.ones((1, k)))["params"]
    linear = PaddedFP8Linear(k, n, rngs=nnx.Rngs(0), **options)
    nnx.update(linear, update_params(nnx.state(linear), loaded))
    return dense, {"params": update_params(abstract, loaded)}, linear


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 32), (33, 100), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gelu"},
        {"activation": "silu", "static_x_scale": True},
        {"per_channel": False, "dtype": jnp.float16},
        {"param_dtype": FLOAT, "activation": "relu"},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_gives_the_bits_of_linen(dtype, sizes, options):
    dense, params, linear = pair(*sizes, **options)
    x = inputs(5, sizes[0], dtype=dtype)
    got = nnx.jit(lambda layer, x: layer(x))(linear, x)
    want = jax.jit(dense.apply)(params, x)
    assert got.dtype == options.get("dtype", dtype)
    assert_same_bits(got, want)
    # Both layers run the same kernels, so a fault of both is only seen from outside.
    z = np.asarray(x, np.float32) @ weight(*sizes) + weight(sizes[1])
    reference = {None: lambda z: z, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
    far = np.asarray(reference[options.get("activation")](z) - got.astype(FLOAT))
    # e4m3 rounds x and w by 2^-4 each; a sum of K of them is off by sqrt(K) of that, times 4.
    assert np.abs(far).max() <= 4 * 2**-3 * np.sqrt(sizes[0])


def test_the_variables_of_a_served_layer():
    layer = PaddedFP8Linear(20, 30, static_x_scale=True, rngs=nnx.Rngs(0))
    assert type(layer.kernel) is FP8Param and not issubclass(FP8Param, nnx.Param)
    assert type(layer.x_scale) is ActivationScale and not issubclass(ActivationScale, nnx.Param)
    assert type(layer.bias) is nnx.Param
    assert isinstance(layer.kernel.get_value(), PaddedKernel)
    assert layer.kernel.shape == (32, 32) and layer.kernel.dtype == jnp.float8_e4m3fn
    assert list(nnx.state(layer, nnx.Param)) == ["bias"]
    assert sorted(nnx.state(layer)) == ["bias", "kernel", "x_scale"]
    bare = PaddedFP8Linear(20, 30, use_bias=False, rngs=nnx.Rngs(0))
    assert list(nnx.state(bare)) == ["kernel"]
    assert_same_bits(bare(inputs(2, 20)), PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0))(inputs(2, 20)))


def test_one_seed_gives_both_modes_and_nnx_linear_the_same_weights():
    options = {"bias_init": nnx.initializers.normal(), "rngs": nnx.Rngs(3)}
    stock = nnx.Linear(20, 30, bias_init=options["bias_init"], rngs=nnx.Rngs(3))
    trained = PaddedFP8Linear(20, 30, param_dtype=FLOAT, static_x_scale=True, **options)
    options["rngs"] = nnx.Rngs(3)
    served = PaddedFP8Linear(20, 30, static_x_scale=True, **options)
    assert_same_bits(nnx.state(trained), nnx.state(stock))
    assert_same_bits(served.bias[...], stock.bias[...])
    assert_same_bits(served.kernel.get_value(), PaddedKernel.from_dense(stock.kernel[...]))
    assert_same_bits(served.x_scale[...], jnp.float32(1))


def test_a_trained_layer_gives_what_its_served_form_gives():
    trained = PaddedFP8Linear(20, 30, param_dtype=FLOAT, activation="gelu", rngs=nnx.Rngs(0))
    served = PaddedFP8Linear(20, 30, activation="gelu", rngs=nnx.Rngs(1))
    nnx.update(served, update_params(nnx.state(served), nnx.state(trained)))
    x = inputs(3, 20)
    assert_same_bits(served(x), trained(x))


def test_takes_the_arguments_of_nnx_linear_in_their_meaning():
    ours = inspect.signature(PaddedFP8Linear.__init__).parameters
    stock = inspect.signature(nnx.Linear.__init__).parameters
    assert set(stock) <= set(ours)
    for name in ("in_features", "out_features", "use_bias", "dtype", "precision", "rngs"):
        assert (ours[name].kind, ours[name].default) == (stock[name].kind, stock[name].default)
    for name in ("kernel_init", "bias_init", "kernel_metadata", "bias_metadata"):
        assert ours[name].default == stock[name].default
    defaults = {
        name: stock[name].default
        for name in ("dot_general", "promote_dtype", "preferred_element_type")
    }
    layer = PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0), **defaults)
    assert layer(inputs(2, 20), None).shape == (2, 30)


@pytest.mark.parametrize(
    "name,value",
    [
        ("dot_general", lambda *args: None),
        ("promote_dtype", lambda *args, dtype: args),
        ("preferred_element_type", jnp.float32),
    ],
)
def test_refuses_by_name_what_it_cannot_honour(name, value):
    with pytest.raises(TypeError, match=f"`{name}` of nnx.Linear cannot be given.*nnx.Linear for"):
        PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0), **{name: value})


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"in_features": 0}, ValueError, "`in_features` must be at least 1"),
        ({"out_features": 0}, ValueError, "`out_features` must be at least 1"),
        ({"param_dtype": jnp.float8_e5m2}, TypeError, "`param_dtype` must be float8_e4m3fn"),
        ({"param_dtype": jnp.int8}, TypeError, "`param_dtype` must be float8_e4m3fn"),
        ({"dtype": jnp.float8_e4m3fn}, TypeError, "`dtype` must be None"),
        ({"kernel_metadata": {"ref": True}}, TypeError, "`ref` must be False for an FP8Param"),
        ({"kernel_metadata": {"hijax": True}}, TypeError, "`hijax` must be False"),
    ],
)
def test_refuses_bad_options(options, error, says):
    sizes = {"in_features": 20, "out_features": 30}
    with pytest.raises(error, match=says):
        PaddedFP8Linear(rngs=nnx.Rngs(0), **{**sizes, **options})


def test_an_fp8_param_holds_a_padded_kernel_only():
    with pytest.raises(
        TypeError, match="`value` of an FP8Param must be a PaddedKernel.*from_dense"
    ):
        FP8Param(jnp.zeros((20, 30)))


def test_refuses_bad_inputs_and_parameters():
    layer = PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0))
    x = inputs(2, 20)
    with pytest.raises(TypeError, match="`out_sharding` of nnx.Linear.*with_sharding_constraint"):
        layer(x, out_sharding=jax.P("x"))
    for bad in (inputs(2, 30), jnp.float32(1), inputs(2, 0)):
        with pytest.raises(ValueError, match="`inputs` must have shape .*20.*`in_features`"):
            layer(bad)
    with pytest.raises(TypeError, match="`inputs`"):
        layer(jnp.ones((2, 20), jnp.int32))
    other = PaddedFP8Linear(20, 30, per_channel=False, rngs=nnx.Rngs(0))
    for wrong, error, says in (
        (nnx.Param(jnp.zeros((20, 30))), TypeError, "`kernel` must be a PaddedKernel"),
        (PaddedFP8Linear(18, 30, rngs=nnx.Rngs(0)).kernel, ValueError, "in_features=18"),
        (other.kernel, ValueError, "`per_channel`"),
    ):
        broken = nnx.clone(layer)
        broken.kernel = wrong
        with pytest.raises(error, match=says):
            broken(x)
    broken = nnx.clone(layer)
    broken.bias.set_value(jnp.zeros(30, jnp.bfloat16))
    with pytest.raises(TypeError, match="`bias` must be a float32 array"):
        broken(x)
    trained = PaddedFP8Linear(20, 30, param_dtype=FLOAT, rngs=nnx.Rngs(0))
    trained.kernel = layer.kernel
    with pytest.raises(TypeError, match="`kernel` must be a float array.*PaddedKernel"):
        trained(x)


def test_a_donated_layer_says_what_to_do():
    layer = PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0))
    layer.kernel.get_raw_value().qvalue.delete()
    with pytest.raises(
        RuntimeError, match=r"`kernel` has been deleted.*nnx.update\(model, state\)"
    ):
        layer(inputs(2, 20))


def test_quantized_inputs_and_results():
    dense, params, linear = pair(20, 30, activation="relu")
    x = inputs(3, 20, dtype=jnp.bfloat16)
    assert_same_bits(linear(quantize_input(x)), dense.apply(params, quantize_input(x)))
    scale = jnp.float32(0.01)
    got = linear(x, out_scale=scale)
    assert isinstance(got, QuantizedInput)
    assert_same_bits(got, dense.apply(params, x, out_scale=scale))
    trained = PaddedFP8Linear(20, 30, param_dtype=FLOAT, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="PaddedFP8Linear takes `out_scale` only to serve"):
        trained(x, out_scale=scale)
    static = PaddedFP8Linear(20, 30, static_x_scale=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"quantize_input\(x, x_scale=layer.x_scale\[...\]\)"):
        static(quantize_input(x))
    named = PaddedFP8Linear(20, 30, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`dtype` must be None with an `out_scale`"):
        named(x, out_scale=scale)


def test_precision_and_implementation_pass_through():
    for options in ({"precision": "highest"}, {"precision": ["high", "high"]}):
        layer = PaddedFP8Linear(20, 30, implementation="xla", rngs=nnx.Rngs(0), **options)
        assert_same_bits(
            layer(inputs(2, 20)), PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0))(inputs(2, 20))
        )
    with pytest.raises(ValueError, match="`implementation`"):
        PaddedFP8Linear(20, 30, implementation="cublas", rngs=nnx.Rngs(0))(inputs(2, 20))


def test_stands_in_a_linen_model_and_in_a_summary():
    table = nnx.tabulate(PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0)), inputs(2, 20))
    assert "FP8Param" in table
    wrapped = nnx.bridge.ToLinen(PaddedFP8Linear, args=(20, 30))
    variables = wrapped.init(jax.random.key(0), inputs(2, 20))
    assert isinstance(wrapped, nn.Module) and wrapped.apply(variables, inputs(2, 20)).shape == (
        2,
        30,
    )
