"""What cannot run on padded kernels is refused by name, when it is chosen and when it runs."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from ptq_models import KEY, WIDTH, Mlp, inputs

from jaxfp8 import (
    PaddedFP8Dense,
    PaddedKernel,
    QuantizedModel,
    fp8_dense_interceptor,
    quantize_dense_params,
    quantize_input,
)


X = inputs(4, WIDTH)


def padded(k=WIDTH, n=WIDTH, **rest):
    """A layer's tree, made by hand: nothing has looked at its model."""
    return {"kernel": PaddedKernel.from_dense(inputs(k, n)), **rest}


def asked(model, x=X, select=None):
    """`quantize_dense_params` with the model asked."""
    return quantize_dense_params(model.init(KEY, x), select, apply=lambda p: model.apply(p, x))


OPTIONS = {
    "dot_general": (jax.lax.dot_general, TypeError, "`dot_general` of the nn.Dense at "),
    "dot_general_cls": (nn.Fp8DirectDotGeneralOp, TypeError, "`dot_general_cls` of the nn.Dense"),
    "promote_dtype": (
        lambda *args, dtype: nn.dtypes.promote_dtype(*args, dtype=dtype),
        TypeError,
        "`promote_dtype` of the nn.Dense at ",
    ),
    "dtype": (jnp.complex64, TypeError, "`dtype` of the nn.Dense at `(the model itself)` must be"),
    "precision": (jax.lax.DotAlgorithmPreset.F32_F32_F32, ValueError, "`precision` must be None"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_a_selected_layer(option):
    value, error, says = OPTIONS[option]
    model = nn.Dense(10, use_bias=False, **{option: value})
    with pytest.raises(error, match=r"nn.Dense at `\(the model itself\)`") as caught:
        QuantizedModel(model).apply({"params": padded(n=10)}, X)
    assert says in str(caught.value)
    if option != "precision":
        # The float model runs; the choice of the layer is refused.
        with pytest.raises(error) as caught:
            asked(model)
        assert says in str(caught.value)


def test_options_of_other_layers_do_not_matter():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(20, dot_general=jax.lax.dot_general, name="custom")(x)
            return nn.Dense(10, name="plain")(x)

    served = asked(Model(), select="plain")
    assert isinstance(served["params"]["custom"]["kernel"], jax.Array)
    QuantizedModel(Model()).apply(served, X)
    with pytest.raises(TypeError, match="`dot_general` of the nn.Dense at `custom`"):
        asked(Model())


def test_all_that_is_refused_is_listed_at_once():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(20, dot_general=jax.lax.dot_general, name="one")(x)
            return nn.Dense(10, dtype="complex64", name="two")(x)

    with pytest.raises(TypeError, match=r"hits 2 layers(.|\n)*`one`(.|\n)*`two`"):
        asked(Model())


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
@pytest.mark.parametrize("use_scale", [True, False])
def test_weights_that_are_normalised_at_every_call(wrapper, use_scale):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(10, name="layer")
            if wrapper is nn.WeightNorm:
                return wrapper(layer, use_scale=use_scale)(x)
            return wrapper(layer)(x, update_stats=False)

    variables = Model().init(KEY, X)
    with pytest.raises(TypeError, match="read by other code"):
        quantize_dense_params(variables, "layer", apply=lambda p: Model().apply(p, X))
    variables["params"]["layer"] = padded(n=10, bias=jnp.zeros(10))
    with pytest.raises(TypeError, match=f"The layer in the {wrapper.__name__} at "):
        QuantizedModel(Model()).apply(variables, X)


def test_weights_that_are_mapped():
    def halved(tree):
        return jax.tree.map(lambda leaf: leaf / 2, tree)

    model = nn.map_variables(nn.Dense, "params", trans_in_fn=halved)(10)
    params = {"params": {"kernel": inputs(WIDTH, 10), "bias": jnp.zeros(10)}}
    with pytest.raises(TypeError, match="read by other code"):
        quantize_dense_params(params, apply=lambda tree: model.apply(tree, X))


@pytest.mark.parametrize("size", [10, WIDTH])
def test_weights_that_are_transposed_on_their_way(size):
    def turned(tree):
        return jax.tree.map(lambda leaf: leaf.T, tree)

    model = nn.map_variables(nn.Dense, "params", trans_in_fn=turned)(size, use_bias=False)
    params = {"params": {"kernel": inputs(size, WIDTH)}}
    with pytest.raises(TypeError, match="came to nn.Dense at"):
        quantize_dense_params(params, apply=lambda tree: model.apply(tree, X))


def test_weights_tied_to_other_code():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(WIDTH, use_bias=False, name="layer")
            y = layer(x)
            return y @ nn.meta.unbox(layer.variables["params"]["kernel"]).T

    with pytest.raises(TypeError, match="tied weights"):
        asked(Tied())
    with pytest.raises(AttributeError, match="'T'"):  # made by hand: it is no array
        QuantizedModel(Tied()).apply({"params": {"layer": padded()}}, X)


def test_weights_tied_beside_the_selected_layer():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(WIDTH, use_bias=False, name="tied")
            x = layer(x) @ layer.variables["params"]["kernel"].T
            return nn.WeightNorm(nn.Dense(WIDTH, name="normed"))(nn.Dense(WIDTH, name="plain")(x))

    served = asked(Tied(), select="plain")
    assert isinstance(served["params"]["plain"]["kernel"], PaddedKernel)
    QuantizedModel(Tied()).apply(served, X)
    with pytest.raises(TypeError, match="tied weights"):
        asked(Tied(), select=["plain", "tied"])


def test_an_error_of_the_model_itself_comes_through():
    model, params = Mlp(), Mlp().init(KEY, X)
    with pytest.raises(errors.ScopeParamShapeError):
        quantize_dense_params(params, apply=lambda tree: model.apply(tree, X[:, :7]))


# Modules that are no nn.Dense


@pytest.mark.parametrize(
    "layer",
    [nn.DenseGeneral(WIDTH), nn.Conv(WIDTH, (3,)), nn.Einsum((WIDTH, WIDTH), "...a,ab->...b")],
)
def test_flax_layers_that_are_no_dense(layer):
    with pytest.raises(TypeError, match=f"but {type(layer).__name__} is no nn.Dense"):
        QuantizedModel(layer).apply({"params": padded()}, X)


@pytest.mark.parametrize("size", [16, WIDTH])
def test_own_layers_that_read_a_kernel(size):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (size, size))

    class Other(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return inputs @ self.param("kernel", self.kernel_init, (size, size))

    for layer in (Own(), Other(size, use_bias=False)):
        tree = {"params": padded(size, size)}
        with pytest.raises(Exception) as caught:
            QuantizedModel(layer).apply(tree, inputs(4, size))
        (note,) = [n for n in caught.value.__notes__ if "PaddedKernel" in n]
        assert f"{type(layer).__name__} is no nn.Dense" in note and "pass `apply`" in note


@pytest.mark.parametrize("size", [16, WIDTH])
def test_the_served_tree_without_the_interceptor_is_an_error(size):
    # Where both sizes are multiples of 16, Flax's check of shapes passes.
    with pytest.raises((TypeError, errors.ScopeParamShapeError)):
        nn.Dense(size, use_bias=False).apply({"params": padded(size, size)}, inputs(4, size))


# What does not fit


def test_a_kernel_of_another_size():
    tree = {"params": {"up": padded(n=99, bias=jnp.zeros(100)), "down": padded()}}
    with pytest.raises(ValueError, match="`up/kernel` has in_features=36 and out_features=99"):
        QuantizedModel(Mlp()).apply(tree, X)
    with pytest.raises(ValueError, match=r"needs in_features=7 \(the last axis of `inputs`\)"):
        QuantizedModel(nn.Dense(36, use_bias=False)).apply({"params": padded()}, X[:, :7])


def test_a_stack_without_a_scan():
    kernel = PaddedKernel.from_dense(inputs(3, WIDTH, 10))
    with pytest.raises(ValueError, match="`kernel` must be one layer's PaddedKernel"):
        QuantizedModel(nn.Dense(10, use_bias=False)).apply({"params": {"kernel": kernel}}, X)


def test_a_tree_that_was_cast():
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), padded(n=10))
    with pytest.raises(TypeError, match="`kernel` must hold a float8_e4m3fn `qvalue`"):
        QuantizedModel(nn.Dense(10, use_bias=False)).apply({"params": cast}, X)


def test_a_bias_that_is_missing_or_of_another_shape():
    for bias, error in (({}, "ScopeParamNotFoundError"), ({"bias": jnp.ones(9)}, "ShapeError")):
        with pytest.raises(errors.FlaxError) as caught:
            QuantizedModel(nn.Dense(10)).apply({"params": padded(n=10, **bias)}, X)
        assert error in type(caught.value).__name__


def test_a_deleted_tree():
    tree = padded(n=10)
    tree["kernel"].qvalue.delete()
    with pytest.raises(RuntimeError, match="`kernel` has been deleted"):
        QuantizedModel(nn.Dense(10, use_bias=False)).apply({"params": tree}, X)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (quantize_input(X), "QuantizedInput"),
        (X.astype(jnp.float8_e4m3fn), "float8_e4m3fn"),
        (X.astype(jnp.complex64), "complex64"),
        (jnp.float32(1), "[*lead, in_features]"),
        ([[1.0] * WIDTH], "list"),
    ],
    ids=["quantized", "fp8", "complex", "scalar", "list"],
)
def test_inputs_that_are_no_floats(x, says):
    with pytest.raises((TypeError, ValueError)) as caught:
        QuantizedModel(nn.Dense(10, use_bias=False)).apply({"params": padded(n=10)}, x)
    assert says in str(caught.value) and "inputs" in str(caught.value)


def test_a_result_dtype_that_would_change():
    # A bfloat16 kernel alone gives bfloat16; of an FP8 one only `param_dtype` is known.
    model, x = nn.Dense(10, use_bias=False), X.astype(jnp.bfloat16)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.init(KEY, x))
    with pytest.raises(ValueError, match=r"is bfloat16, but .* would be float32. Set `dtype`"):
        quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))


def test_arguments():
    with pytest.raises(ValueError, match="`implementation` must be"):
        fp8_dense_interceptor(implementation="triton")
    with pytest.raises(ValueError, match="`implementation` must be"):
        QuantizedModel(nn.Dense(1), "triton")
    with pytest.raises(TypeError, match="`model` must be a Linen module"):
        QuantizedModel(nn.Dense)
    params = {"params": {"kernel": np.ones((3, 4), np.float32)}}
    for select in (3, (), [1], b"x"):
        with pytest.raises(TypeError, match="`select` must be a pattern"):
            quantize_dense_params(params, select)
    for tree in ({}, {"params": {}}, {"params": {"scale": np.ones(3)}}):
        with pytest.raises(ValueError, match="Layers with a kernel: none"):
            quantize_dense_params(tree)


def test_features_of_zero():
    with pytest.raises(ValueError, match="at least one feature on each side"):
        quantize_dense_params({"kernel": np.ones((0, 4), np.float32)})


def test_a_padded_layers_own_error_comes_without_a_note():
    with pytest.raises(ValueError, match="out_features=12") as caught:
        QuantizedModel(PaddedFP8Dense(12, use_bias=False)).apply({"params": padded(n=10)}, X)
    assert not any("no nn.Dense" in note for note in getattr(caught.value, "__notes__", ()))
