"""calibrate on models that were quantized after training: their nn.Dense layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import assert_same_bits, weight

from jaxfp8 import (
    PaddedFP8Dense,
    QuantizedModel,
    calibrate,
    dequantize_params,
    fp8_dense,
    quantize_dense_params,
    reload_params,
    with_x_scales,
)
from jaxfp8.quantize import INV_FP8_MAX


K = 18


class Net(nn.Module):
    """Two layers whose inputs are known, one that stays float, one of ours, and a stack."""

    @nn.compact
    def __call__(self, x, times=1.0):
        wide = nn.Dense(K, name="wide")(3 * x)
        half = nn.Dense(5, dtype=jnp.bfloat16, name="half")(x * times)
        kept = nn.Dense(5, name="kept")(7 * x)
        ours = PaddedFP8Dense(5, name="ours")(-2 * x)

        def step(layer, carry, _):
            return layer(carry), None

        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        last, _ = scan(nn.Dense(K, name="stack"), x, None)
        return wide.sum() + half.sum() + kept.sum() + ours.sum() + last.sum()


def scale_of(*arrays) -> np.ndarray:
    """By the definition: the largest magnitude times float32(1/448)."""
    return np.float32(max(np.abs(np.asarray(a, np.float32)).max() for a in arrays)) * INV_FP8_MAX


def served(x, select=("wide", "half", "stack")):
    params = Net().init(jax.random.key(0), x)
    return quantize_dense_params(params, list(select), apply=lambda p: Net().apply(p, x))


DATA = [weight(4, K, seed=seed) for seed in range(3)]


def test_the_largest_magnitude_of_every_layer_in_fp8():
    params = served(DATA[0])
    x_scales = calibrate(QuantizedModel(Net()), params, DATA, progress=False)["params"]
    assert set(x_scales) == {"wide", "half", "ours", "stack"}
    assert x_scales["wide"]["x_scale"] == scale_of(*[np.float32(3) * x for x in DATA])
    assert x_scales["half"]["x_scale"] == scale_of(*[jnp.asarray(x, jnp.bfloat16) for x in DATA])
    assert x_scales["ours"]["x_scale"] == scale_of(*[2 * x for x in DATA])
    # The second of the stack sees what the first gives.
    stack = params["params"]["stack"]
    first = jax.tree.map(lambda a: a[0], stack)
    hidden = [fp8_dense(x, first["kernel"], first["bias"]) for x in DATA]
    want = [scale_of(*DATA), scale_of(*hidden)]
    np.testing.assert_allclose(x_scales["stack"]["x_scale"], want, rtol=1e-6)


def test_the_scales_are_used_and_stay_in_a_reload():
    model, x = nn.Sequential([nn.Dense(20), nn.relu, nn.Dense(5)]), DATA[0]
    dense = model.init(jax.random.key(0), x)
    params = quantize_dense_params(dense, apply=lambda p: model.apply(p, x))
    quantized = QuantizedModel(model)
    x_scales = calibrate(quantized, params, [x], progress=False)
    static = with_x_scales(params, x_scales)
    layers, scales = params["params"], x_scales["params"]

    def layer(name, x):
        own = layers[name]
        return fp8_dense(x, own["kernel"], own["bias"], x_scale=scales[name]["x_scale"])

    want = layer("layers_2", nn.relu(layer("layers_0", x)))
    np.testing.assert_allclose(quantized.apply(static, x), want, rtol=1e-5, atol=1e-6)
    # What a static tree is calibrated to is what a dynamic one is.
    assert_same_bits(calibrate(quantized, static, [x], progress=False), x_scales)
    before = jax.device_get(static)
    again = reload_params(static, dense)
    assert_same_bits(jax.device_get(again), before)
    assert jax.tree.structure(dequantize_params(again)) == jax.tree.structure(dense)


def test_integers_are_seen_as_the_floats_that_a_layer_makes_of_them():
    model, x = nn.Dense(4), np.arange(-12, 6).reshape(1, K)
    params = quantize_dense_params(model.init(jax.random.key(0), x))
    x_scales = calibrate(QuantizedModel(model), params, [jnp.asarray(x)], progress=False)
    assert x_scales["params"]["x_scale"] == np.float32(12) * INV_FP8_MAX


def test_what_is_never_reached_is_named():
    class Two(nn.Module):
        def setup(self):
            self.used, self.idle = nn.Dense(4), nn.Dense(4)

        def __call__(self, x):
            return self.used(x)

        def both(self, x):
            return self.used(x) + self.idle(x)

    model, x = Two(), DATA[0]
    params = model.init(jax.random.key(0), x, method="both")
    params = quantize_dense_params(params)
    with pytest.raises(ValueError, match="no batch reaches 1 FP8 layers: idle"):
        calibrate(QuantizedModel(model), params, [x], progress=False)
    scales = calibrate(QuantizedModel(model), params, [x], progress=False, method="both")
    assert set(scales["params"]) == {"used", "idle"}
    float_tree = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="`model` calls no FP8 layer"):
        calibrate(QuantizedModel(model), float_tree, [x], progress=False)
