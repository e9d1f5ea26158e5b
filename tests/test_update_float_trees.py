"""dequantize_params and trainable_mask: the way back to a trainer's tree, and into optax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from update_cases import assert_same_bits, host_bits, served_tree, trainer_tree, weight

from jaxfp8.padded import DenseWeight, PaddedKernel
from jaxfp8.update import dequantize_params, trainable_mask, update_params


def test_dequantize_gives_the_tree_of_the_trainer():
    params = update_params(served_tree(), trainer_tree())
    floats = dequantize_params(params)
    assert jax.tree.structure(floats) == jax.tree.structure(trainer_tree())
    for name in ("Dense_0", "Dense_1"):
        kernel, w = floats[name]["kernel"], trainer_tree()[name]["kernel"]
        assert kernel.dtype == jnp.float32 and kernel.shape == w.shape
        np.testing.assert_array_equal(kernel, params[name]["kernel"].dequantize())
        largest = np.abs(w).max(0)
        assert (np.abs(kernel - w) <= 2.0**-4 * np.abs(w) + largest / 448 * 2.0**-10).all()
    assert floats["LayerNorm_0"]["scale"] is params["LayerNorm_0"]["scale"]
    assert_same_bits(params, update_params(served_tree(), trainer_tree()))


def test_a_dequantized_tree_goes_back_without_a_change():
    """448 times the old scale is the new maximum, so the codes come out as they were."""
    params = update_params(served_tree(), trainer_tree())
    again = update_params(params, dequantize_params(params))
    for name in ("Dense_0", "Dense_1"):
        codes = [
            np.array(jnp.copy(t[name]["kernel"].qvalue)).view(np.uint8) for t in (params, again)
        ]
        np.testing.assert_array_equal(*codes)
        np.testing.assert_allclose(
            again[name]["kernel"].scale, params[name]["kernel"].scale, rtol=2.0**-22
        )


def test_containers_stacks_and_activation_scales():
    stacked = PaddedKernel.from_dense(weight(2, 3, 18, 20))
    params = FrozenDict(
        {
            "a": ({"kernel": stacked, "x_scale": jnp.float32(2), "bias": jnp.ones(20)}, [stacked]),
            "b": {"kernel": jnp.ones((2, 2)), "x_scale": jnp.float32(3)},
        }
    )
    floats = dequantize_params(params)
    assert isinstance(floats, FrozenDict) and isinstance(floats["a"], tuple)
    assert set(floats["a"][0]) == {"kernel", "bias"}
    for kernel in (floats["a"][0]["kernel"], floats["a"][1][0]):
        np.testing.assert_array_equal(kernel, stacked.dequantize())
    assert floats["b"]["x_scale"] == 3.0
    np.testing.assert_array_equal(dequantize_params(stacked), stacked.dequantize())
    assert set(params["a"][0]) == {"kernel", "bias", "x_scale"}


def test_boxes_name_the_axes_of_the_float_weight():
    kernel = PaddedKernel.from_dense(weight(2, 18, 20))
    params = {
        "kernel": PaddedKernel(
            nn.Partitioned(kernel.qvalue, ("layers", "out", "in")),
            nn.Partitioned(kernel.scale, ("layers", "out")),
            18,
            20,
        ),
        "bias": nn.Partitioned(jnp.ones((2, 20)), ("layers", "out")),
        "x_scale": nn.Partitioned(jnp.ones(2), ("layers",)),
    }
    floats = dequantize_params(params)
    assert set(floats) == {"kernel", "bias"}
    assert floats["kernel"].names == ("layers", "in", "out")
    assert floats["bias"].names == ("layers", "out")
    np.testing.assert_array_equal(floats["kernel"].value, kernel.dequantize())
    assert_same_bits(
        update_params(params, floats)["kernel"].qvalue.value, params["kernel"].qvalue.value
    )


def test_dequantize_is_traceable():
    params = served_tree()
    traced = jax.jit(dequantize_params)(params)
    assert_same_bits(traced, dequantize_params(params))


def test_dequantize_refuses_a_cast_tree():
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), served_tree())
    with pytest.raises(TypeError, match="tree.map"):
        dequantize_params(cast)


def test_the_mask_has_the_structure_of_params():
    params = served_tree()
    params["Dense_1"]["x_scale"] = jnp.float32(1)
    params["boxed"] = {
        "kernel": jax.tree.map(lambda a: nn.Partitioned(a, ("o",)), params["Dense_0"]["kernel"]),
        "bias": nn.Partitioned(jnp.ones(3), ("o",)),
        "x_scale": nn.Partitioned(jnp.float32(1), ()),
    }
    params["other"] = (jnp.int32(1), jnp.zeros(2, bool), jnp.zeros(2, jnp.float8_e4m3fn))
    params["floats"] = {"kernel": jnp.ones((2, 2)), "x_scale": jnp.float32(1)}
    mask = trainable_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(mask))
    true = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_flatten_with_path(mask)[0]
        if leaf
    }
    assert true == {
        "Dense_0/bias",
        "Dense_1/bias",
        "LayerNorm_0/scale",
        "LayerNorm_0/bias",
        "boxed/bias/value",
        "floats/kernel",
        "floats/x_scale",
    }


def test_the_mask_of_abstract_and_of_traced_params():
    expected = jax.tree.leaves(trainable_mask(served_tree()))
    assert jax.tree.leaves(trainable_mask(jax.eval_shape(served_tree))) == expected
    seen = []
    jax.jit(lambda p: seen.append(trainable_mask(p)))(served_tree())
    assert jax.tree.leaves(seen[0]) == expected


def test_adam_trains_the_rest_and_leaves_the_kernels():
    """optax.masked over a served tree: moments for LayerNorm and biases only."""
    params = {
        "norm": {"scale": jnp.ones(18)},
        "dense": {
            "kernel": PaddedKernel.from_dense(weight(18, 20)),
            "bias": jnp.zeros(20),
            "x_scale": jnp.float32(1),
        },
    }
    mask = trainable_mask(params)
    frozen = jax.tree.map(lambda trained: not trained, mask)
    optimizer = optax.chain(
        optax.masked(optax.adam(1e-2), mask), optax.masked(optax.set_to_zero(), frozen)
    )
    x, y = weight(64, 18), weight(64, 20, seed=1)

    def loss(params):
        kernel = jax.lax.stop_gradient(params["dense"]["kernel"]).dequantize()
        prediction = (x * params["norm"]["scale"]) @ kernel + params["dense"]["bias"]
        return jnp.mean((prediction - y) ** 2)

    state = optimizer.init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "ndim", 0)]
    assert sorted(leaf.shape for leaf in moments) == [(18,), (18,), (20,), (20,)]
    kernel, first = host_bits(params["dense"]["kernel"]), loss(params)
    for _ in range(20):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.99 * first
    assert not (params["dense"]["bias"] == 0).any() and not (params["norm"]["scale"] == 1).any()
    for now, then in zip(host_bits(params["dense"]["kernel"]), kernel, strict=True):
        np.testing.assert_array_equal(now, then)
    assert params["dense"]["x_scale"] == 1


def test_loaded_weights_in_a_tree_are_left_alone():
    tree = {"kernel": DenseWeight(jnp.ones((2, 2)), "out_in")}
    assert dequantize_params(tree)["kernel"].layout == "out_in"
