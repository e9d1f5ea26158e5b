"""calibrate: the largest |x| of every layer, in whatever module, scan or transform it is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_update_linen import Model
from update_cases import assert_same_bits, mesh_devices, weight

from jaxfp8 import (
    PaddedFP8Dense,
    PaddedKernel,
    calibrate,
    quantize_input,
    reload_params,
    update_params,
    with_x_scales,
)
from jaxfp8.quantize import INV_FP8_MAX


def scale_of(*arrays) -> np.ndarray:
    """By the definition: the largest magnitude times float32(1/448)."""
    amax = max(np.abs(np.asarray(a, np.float32)).max() for a in arrays)
    return np.float32(amax) * INV_FP8_MAX


def equal(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


class Seen(nn.Module):
    """Layers whose inputs are known without running the layers before them."""

    static_x_scale: bool = False

    def setup(self):
        self.first = PaddedFP8Dense(5, static_x_scale=self.static_x_scale)
        self.narrow = PaddedFP8Dense(
            7, dtype=jnp.bfloat16, use_bias=False, static_x_scale=self.static_x_scale
        )
        self.plain = nn.Dense(3)

    def __call__(self, x, times=1.0):
        return self.plain(x).sum() + self.first(3 * x).sum() + self.narrow(x * times).sum()

    def other(self, x, *, flip: bool):
        return self.first(-x if flip else 100 * x)


def batches(count: int = 3, rows: int = 4) -> list[np.ndarray]:
    return [weight(rows, 18, seed=seed) for seed in range(count)]


def variables(model, *args):
    return model.init(jax.random.key(0), *args)


def test_the_largest_magnitude_over_all_batches_by_the_constant_of_quantize():
    model, data = Seen(), batches()
    x_scales = calibrate(model, variables(model, data[0]), data, progress=False)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in data]  # As the layer casts it.
    threefold = [np.float32(3) * x for x in data]
    equal(
        x_scales,
        {
            "params": {
                "first": {"x_scale": scale_of(*threefold)},
                "narrow": {"x_scale": scale_of(*narrow)},
            }
        },
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(x_scales))
    # The order of batches, and their shapes, do not matter.
    again = calibrate(model, variables(model, data[0]), data[::-1] + [data[0][:1]], progress=False)
    equal(again, x_scales)


def test_the_scales_are_used_by_the_static_model():
    """Then quantizing x by the static scale equals the dynamic one of the row with that maximum."""
    model, static, x = Model(), Model(static_x_scale=True), weight(3, 18)
    params = variables(model, x)
    x_scales = calibrate(model, params, [x], progress=False)
    served = with_x_scales(params, x_scales)
    assert jax.tree.structure(served) == jax.tree.structure(variables(static, x))
    y = static.apply(served, x)
    # One more rounding to e4m3 (2^-4) of every x, by a larger scale; four layers deep.
    dynamic = model.apply(params, x)
    assert np.linalg.norm(y - dynamic) <= 0.15 * np.linalg.norm(dynamic)
    fresh = variables(static, x)
    by_update = update_params(
        update_params(fresh, params), {"params": x_scales["params"]}, partial=True
    )
    assert_same_bits(by_update, served)
    assert_same_bits(reload_params(fresh, {**by_update}), served)


def test_scanned_layers_have_a_scale_each_and_static_models_run_dynamically():
    """The scales of a static model are those of the dynamic one, whatever it holds."""
    x = weight(3, 18)
    params = variables(Model(), x)
    x_scales = calibrate(Model(), params, [x, 2 * x], progress=False)
    blocks = x_scales["params"]["blocks"]["dense"]["x_scale"]
    assert blocks.shape == (2,) and blocks[0] != blocks[1]
    # Block by block: what goes into the second is what the first gives.
    seen = []
    one = PaddedFP8Dense(20)
    kernel = params["params"]["blocks"]["dense"]
    h = nn.LayerNorm().apply(
        {"params": params["params"]["LayerNorm_0"]},
        one.apply({"params": params["params"]["first"]}, jnp.concatenate([x, 2 * x])),
    )
    for layer in range(2):
        seen.append(scale_of(h))
        h = h + one.apply({"params": jax.tree.map(lambda a, i=layer: a[i], kernel)}, h)
    np.testing.assert_allclose(blocks, seen, rtol=1e-5)
    static = Model(static_x_scale=True)
    wrong = update_params(variables(static, x), params)
    equal(calibrate(static, wrong, [x, 2 * x], progress=False), x_scales)


def test_a_bare_collection_and_the_trainers_tree():
    x = weight(3, 18)
    params = variables(Model(), x)
    x_scales = calibrate(Model(), params, [x], progress=False)
    bare = calibrate(Model(), params["params"], [x], progress=False)
    equal(bare, x_scales["params"])
    trainer = Model(param_dtype=jnp.float32)
    trained = calibrate(trainer, variables(trainer, x), [x], progress=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), trained, x_scales)
    assert jax.tree.structure(trained) == jax.tree.structure(x_scales)
    boxed = Model(boxed=True)
    equal(calibrate(boxed, variables(boxed, x), [x], progress=False), x_scales)


def test_tuples_options_and_methods():
    model, x = Seen(), weight(4, 18)
    params = variables(model, x)
    times = calibrate(model, params, [(x, jnp.float32(50))], progress=False)["params"]
    np.testing.assert_array_equal(
        times["narrow"]["x_scale"], scale_of(jnp.asarray(np.float32(50) * x, jnp.bfloat16))
    )
    other = calibrate(
        model, params, iter([x]), method="other", flip=True, ignore="narrow", progress=False
    )
    equal(other, {"params": {"first": {"x_scale": scale_of(x)}}})


def test_the_model_and_the_tree_are_unchanged():
    model, x = Seen(), weight(4, 18)
    params = variables(model, x)
    copy = jax.tree.map(jnp.copy, params)
    calibrate(model, params, [x], progress=False)
    assert_same_bits(params, copy)
    assert not model.static_x_scale


class Shared(nn.Module):
    """Mapped, rematerialized, conditional, and called twice."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            PaddedFP8Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
        )(6, name="mapped")
        y = mapped(jnp.stack([x, 2 * x]))
        alike = nn.vmap(
            PaddedFP8Dense, variable_axes={"params": None}, split_rngs={"params": False}
        )
        z = alike(6, name="alike")(jnp.stack([x, -5 * x]))
        again = nn.remat(PaddedFP8Dense)(4, name="again")
        once = again(x) + again(7 * x)
        sometimes = PaddedFP8Dense(4, name="sometimes")
        w = nn.cond(x[0, 0] > 0, lambda m, x: m(x), lambda m, x: m(9 * x), sometimes, x)
        return y.sum() + z.sum() + once.sum() + w.sum()


def test_transforms():
    model, x = Shared(), np.abs(weight(4, 18))
    f = np.float32
    equal(
        calibrate(model, variables(model, x), [x], progress=False)["params"],
        {
            "mapped": {"x_scale": np.stack([scale_of(x), scale_of(2 * x)])},
            "alike": {"x_scale": scale_of(f(5) * x)},
            "again": {"x_scale": scale_of(f(7) * x)},
            "sometimes": {"x_scale": scale_of(x)},
        },
    )
    both = calibrate(model, variables(model, x), [x, -x], progress=False)["params"]
    np.testing.assert_array_equal(both["sometimes"]["x_scale"], scale_of(f(9) * x))


def test_a_layer_alone_zeros_and_a_rank_of_one():
    model = PaddedFP8Dense(5)
    params = variables(model, weight(18))
    assert calibrate(model, params["params"], [weight(18)], progress=False) == {
        "x_scale": scale_of(weight(18))
    }
    zeros = calibrate(model, params, [np.zeros((2, 18), np.float32)], progress=False)
    assert zeros["params"]["x_scale"] == 1.0
    huge = calibrate(model, params, [np.full((2, 18), 3e38, np.float32)], progress=False)
    assert huge["params"]["x_scale"] == scale_of(np.float32(3e38))


class Quantized(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = PaddedFP8Dense(5, name="q", dtype=jnp.float32)(quantize_input(x))
        return PaddedFP8Dense(3, name="out")(y)


def test_a_layer_that_is_given_quantized_inputs_has_no_scale_of_its_own():
    x = weight(4, 18)
    params = variables(Quantized(), x)
    assert list(calibrate(Quantized(), params, [x], progress=False)["params"]) == ["out"]


def test_sharded_params_get_scales_on_their_mesh():
    mesh = Mesh(np.array(mesh_devices(2)), ("x",))
    model, x = PaddedFP8Dense(32), weight(4, 18)
    params = jax.device_put(variables(model, x), NamedSharding(mesh, PartitionSpec()))
    served = with_x_scales(params, calibrate(model, params, [x], progress=False))
    assert served["params"]["x_scale"].sharding == NamedSharding(mesh, PartitionSpec())
    assert served["params"]["kernel"].qvalue is params["params"]["kernel"].qvalue


def test_the_bar(capfd):
    model, x = PaddedFP8Dense(5), weight(4, 18)
    calibrate(model, variables(model, x), [x, x])
    out, err = capfd.readouterr()
    assert out == "" and "calibrate" in err and "2/2 batches" in err
    calibrate(model, variables(model, x), [x, x], progress=False)
    assert capfd.readouterr() == ("", "")


def test_with_x_scales_replaces_and_keeps_frozen_dicts():
    kernel = PaddedKernel.from_dense(weight(18, 20))
    params = nn.FrozenDict({"a": {"kernel": kernel, "x_scale": jnp.float32(9)}, "b": jnp.ones(2)})
    served = with_x_scales(params, {"a": {"x_scale": 0.5}})
    assert isinstance(served, nn.FrozenDict) and served["a"]["x_scale"] == 0.5
    assert served["a"]["x_scale"].dtype == jnp.float32 and served["b"] is params["b"]


@pytest.mark.parametrize("jit", [True, False])
def test_with_or_without_jit(jit):
    model, x = Model(), weight(3, 18)
    params = variables(model, x)
    expected = calibrate(model, params, [x], progress=False)
    with jax.disable_jit(not jit):
        found = calibrate(model, params, [x], progress=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
