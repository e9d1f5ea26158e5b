"""jaxfp8.nnx.calibrate: the largest |x| of every PaddedFP8Linear, and a module made static."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_cases import Net, inputs, served
from update_cases import assert_same_bits, weight

from jaxfp8 import fp8_dense, quantize_input, reload_params
from jaxfp8.nnx import (
    ActivationScale,
    FP8Param,
    PaddedFP8Linear,
    calibrate,
    quantize_linears,
    reload_model,
    set_x_scales,
)
from jaxfp8.quantize import INV_FP8_MAX


K = 18
DATA = [weight(4, K, seed=seed) for seed in range(3)]


def linear(n=5, seed=0, **options):
    return PaddedFP8Linear(K, n, rngs=nnx.Rngs(seed), **options)


def scale_of(*arrays) -> np.ndarray:
    """By the definition: the largest magnitude times float32(1/448)."""
    return np.float32(max(np.abs(np.asarray(a, np.float32)).max() for a in arrays)) * INV_FP8_MAX


class Seen(nnx.Module):
    """Layers whose inputs are known: twice, narrow, float, quantized, static."""

    def __init__(self):
        self.twice, self.narrow = linear(), linear(dtype=jnp.bfloat16)
        self.trained, self.given = linear(param_dtype=jnp.float32), linear()
        self.static = nnx.List([linear(static_x_scale=True)])
        self.twice_too = self.twice  # of two paths the first, by name
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x, *, by=1.0):
        self.calls[...] += 1
        y = self.twice(x) + self.twice_too(-3 * x) + self.narrow(by * x).astype(x.dtype)
        return y + self.trained(5 * x) + self.given(quantize_input(x)) + self.static[0](7 * x)

    def other(self, x):
        return self.twice(x)


def test_the_largest_magnitude_of_every_layer():
    model = Seen()
    before = nnx.split(model)
    x_scales = calibrate(model, DATA, progress=False, by=np.float32(2))
    assert set(x_scales) == {"twice", "narrow", "trained", "static"}
    assert x_scales["twice"]["x_scale"] == scale_of(*[3 * x for x in DATA])
    assert x_scales["narrow"]["x_scale"] == scale_of(*[jnp.bfloat16(2 * x) for x in DATA])
    assert x_scales["trained"]["x_scale"] == scale_of(*[5 * x for x in DATA])
    assert x_scales["static"]["0"]["x_scale"] == scale_of(*[7 * x for x in DATA])
    # The module is as it was: layers, Variables, counters.
    after = nnx.split(model)
    assert after[0] == before[0]
    assert_same_bits(after[1], before[1])
    assert type(model.twice) is PaddedFP8Linear and model.twice_too is model.twice


def test_a_module_is_made_static():
    model, x = served(), inputs(6, 20)
    want = model(x)
    x_scales = calibrate(model, [x], progress=False)
    set_x_scales(model, x_scales)
    layer = model.layers[0].up
    assert layer.static_x_scale and isinstance(layer.x_scale, ActivationScale)
    scale = x_scales["layers"]["0"]["up"]["x_scale"]
    assert layer.x_scale[...] == scale == scale_of(x)
    kernel, bias = layer.kernel.get_value(), layer.bias[...]
    np.testing.assert_array_equal(layer(x), fp8_dense(x, kernel, bias, x_scale=scale))
    y = nnx.jit(lambda model, x: model(x))(model, x)
    # One more rounding to e4m3 (2^-4) of every x, by a larger scale; four layers deep.
    assert 0 < np.linalg.norm(y - want) <= 0.15 * np.linalg.norm(want)
    # Again, of the static module, the same; and a reload keeps the constants.
    assert_same_bits(calibrate(model, [x], progress=False), x_scales)
    reload_model(model, Net(seed=3))
    assert layer.x_scale[...] == scale


def test_a_module_made_with_static_scales_takes_them_by_a_reload():
    x = inputs(6, 20)
    net = Net()
    x_scales = calibrate(quantize_linears(net, "*"), [x], progress=False)
    static = quantize_linears(net, "*", static_x_scale=True)
    state = reload_params(nnx.state(static, ActivationScale), x_scales, partial=True)
    nnx.update(static, state)
    by_hand = quantize_linears(net, "*")
    set_x_scales(by_hand, x_scales)
    np.testing.assert_array_equal(static(x), by_hand(x))


def test_a_stack_under_scan_has_a_scale_each():
    @nnx.vmap(in_axes=0)
    def make(key):
        return PaddedFP8Linear(K, K, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self, axes):
            self.layers = make(jax.random.split(jax.random.key(0), 2))
            self.axes = axes

        def __call__(self, x):
            step = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry
            )
            return step(x, self.layers)

    by_type = nnx.StateAxes({(nnx.Param, FP8Param): 0})
    for axes in (0, by_type):
        model = Stack(axes)
        x_scales = calibrate(model, DATA, progress=False)["layers"]["x_scale"]
        kernel = jax.tree.map(lambda a: a[0], model.layers.kernel.get_value())
        hidden = [fp8_dense(x, kernel, model.layers.bias[...][0]) for x in DATA]
        np.testing.assert_allclose(x_scales, [scale_of(*DATA), scale_of(*hidden)], rtol=1e-6)
    set_x_scales(model, {"layers": {"x_scale": x_scales}})
    assert model.layers.x_scale[...].shape == (2,)


def test_what_is_wrong_is_named():
    model = Seen()
    with pytest.raises(TypeError, match="must be an nnx.Module, but it is a function"):
        calibrate(lambda x: x, DATA)
    with pytest.raises(ValueError, match="`batches` is empty"):
        calibrate(model, [], progress=False)
    with pytest.raises(ValueError, match="no batch reaches .* PaddedFP8Linear layers: .*static/0"):
        calibrate(model, DATA, progress=False, method="other")
    left = ["narrow", "given", "static*"]
    assert set(calibrate(model, DATA, progress=False, method="other", ignore=left)) == {"twice"}
    bad = DATA[0].copy()
    bad[0, 0] = np.nan
    with pytest.raises(
        ValueError, match="batch 1 of `batches` gives a NaN or an infinity to twice"
    ):
        calibrate(model, [DATA[0], bad], progress=False)
    with pytest.raises(ValueError, match="`model` calls no PaddedFP8Linear layer"):
        calibrate(nnx.Linear(K, 3, rngs=nnx.Rngs(0)), DATA, progress=False)


def test_scales_that_do_not_fit_change_nothing():
    model = Seen()
    scale = np.float32(1)
    wrong = {
        "twice": {"x_scale": scale},
        "narrow": {"x_scale": np.float32(0)},
        "given": {"x_scale": np.ones(3, np.float32)},
        "trained": {"x_scale": scale},
        "nowhere": {"x_scale": scale},
        "static": {"0": {"kernel": scale}},
    }
    with pytest.raises(ValueError) as caught:
        set_x_scales(model, wrong)
    lines = str(caught.value).splitlines()
    assert "`x_scales` does not fit `model`" in lines[0]
    said = {line.split(":")[0].strip(): line for line in lines[1:]}
    none = "no PaddedFP8Linear in FP8 there"
    assert set(said) == {
        "narrow/x_scale",
        "given/x_scale",
        "trained/x_scale",
        "nowhere/x_scale",
        "static/0/kernel",
    }
    assert "not positive" in said["narrow/x_scale"] and "stack is ()" in said["given/x_scale"]
    assert none in said["trained/x_scale"] and none in said["nowhere/x_scale"]
    assert model.twice.x_scale is None and not model.twice.static_x_scale
