"""What calibrate refuses, by the layer's name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_update_linen import Model
from update_cases import weight

from jaxfp8 import PaddedFP8Dense, PaddedKernel, calibrate, with_x_scales


class Branches(nn.Module):
    """A layer for each of two answers, and one behind them."""

    @nn.compact
    def __call__(self, x, left: bool = True):
        a, b = PaddedFP8Dense(18, name="zeta"), PaddedFP8Dense(18, name="beta")
        y = a(x) if left else b(x)
        if self.is_initializing():
            b(x)
        return PaddedFP8Dense(3, name="alpha")(y)


def variables(model, x):
    return model.init(jax.random.key(0), x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_batch_that_is_not_finite(value):
    x = weight(3, 18)
    params = variables(Branches(), x)
    bad = x.copy()
    bad[1, 2] = value
    # The layers in the order in which they are called, not of their names.
    with pytest.raises(ValueError, match=r"batch 1 of `batches` .* to zeta, alpha \(in the order"):
        calibrate(Branches(), params, [x, bad, x], ignore="beta", progress=False)


def test_a_scanned_layer_is_named_with_its_index():
    x = weight(3, 18)
    params = variables(Model(), x)
    kernel = params["params"]["blocks"]["dense"]["kernel"]
    scale = kernel.scale.at[0, 3].set(jnp.inf)
    params["params"]["blocks"]["dense"]["kernel"] = PaddedKernel(kernel.qvalue, scale, 20, 20)
    with pytest.raises(ValueError, match=r"batch 0 .* to blocks/dense\[1\], head \("):
        calibrate(Model(), params, [x], progress=False)


def test_a_layer_that_is_never_reached():
    x = weight(3, 18)
    params = variables(Branches(), x)
    with pytest.raises(ValueError, match="no batch reaches 1 PaddedFP8Dense layers: beta"):
        calibrate(Branches(), params, [x], progress=False)
    both = [(x,), (2 * x,)]
    found = calibrate(Branches(), params, both, ignore=("be*",), progress=False)
    assert list(found["params"]) == ["alpha", "zeta"]


@pytest.mark.parametrize("empty", [[], iter(()), np.zeros((0, 3, 18), np.float32)])
def test_no_batches(empty):
    with pytest.raises(ValueError, match="`batches` is empty"):
        calibrate(Model(), variables(Model(), weight(3, 18)), empty, progress=False)


def test_a_model_without_such_layers():
    model = nn.Dense(4)
    with pytest.raises(ValueError, match="calls no PaddedFP8Dense"):
        calibrate(model, variables(model, weight(3, 18)), [weight(3, 18)], progress=False)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="must be a flax.linen Module, but it is a function"):
        calibrate(lambda x: x, {}, [weight(3, 18)])


def test_errors_of_the_model_are_its_own():
    x = weight(3, 18)
    params = variables(Model(), x)
    with pytest.raises(ValueError, match="in_features=18"):
        calibrate(Model(), params, [weight(3, 17)], progress=False)
    with pytest.raises(TypeError, match="must be a real float array"):
        calibrate(Model(), params, [np.ones((3, 18), np.int32)], progress=False)


@pytest.mark.parametrize(
    ("x_scales", "error", "pattern"),
    [
        ({"a": {"x_scale": 0.0}}, ValueError, "a/x_scale: it is not positive"),
        ({"a": {"x_scale": np.nan}}, ValueError, "a/x_scale: it is not positive"),
        ({"a": {"x_scale": np.ones(2)}}, ValueError, r"a/x_scale: its shape is \(2,\)"),
        ({"b": {"x_scale": 1.0}}, ValueError, "b/x_scale: `params` has no PaddedKernel"),
        ({"params": {"a": {"x_scale": 1.0}}}, ValueError, "params/a/x_scale: `params` has no"),
        ({"a": {"kernel": weight(18, 20)}}, TypeError, "a/kernel. Load weights with"),
    ],
)
def test_scales_that_do_not_fit(x_scales, error, pattern):
    params = {"a": {"kernel": PaddedKernel.from_dense(weight(18, 20))}, "b": {"bias": jnp.ones(2)}}
    with pytest.raises(error, match=pattern):
        with_x_scales(params, x_scales)
