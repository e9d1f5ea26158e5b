"""update_params over trees: containers, boxes, abstract and partial trees, traces, sharing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from update_cases import (
    addresses,
    assert_same_bits,
    devices,
    host_bits,
    served_tree,
    trainer_tree,
    weight,
)

from jaxfp8.padded import DenseWeight, PaddedKernel
from jaxfp8.quantize import FP8_DTYPE
from jaxfp8.update import update_params


def boxed_kernel(k: int, n: int, seed: int = 0) -> PaddedKernel:
    """A kernel with the boxes that `nn.with_partitioning` leaves on its arrays."""
    kernel = PaddedKernel.from_dense(weight(k, n, seed=seed))
    return PaddedKernel(
        nn.Partitioned(kernel.qvalue, ("out", "in")), nn.Partitioned(kernel.scale, ("out",)), k, n
    )


def test_containers_match_by_path():
    w, b = weight(18, 20), weight(20)
    kernel = PaddedKernel.from_dense(weight(18, 20, seed=5))
    params = FrozenDict({"a": ({"kernel": kernel}, [jnp.zeros(20)]), "b": {"c": jnp.zeros(20)}})
    fresh = PaddedKernel.from_dense(w)
    for loaded in (
        {"a": [{"kernel": w}, (b,)], "b": FrozenDict({"c": 2 * b})},
        {"a": {"0": {"kernel": w}, "1": {"0": b}}, "b": {"c": 2 * b}},
    ):
        updated = update_params(params, loaded)
        assert isinstance(updated, FrozenDict) and isinstance(updated["a"], tuple)
        assert_same_bits(updated["a"][0]["kernel"], fresh)
        np.testing.assert_array_equal(updated["a"][1][0], b)
        np.testing.assert_array_equal(updated["b"]["c"], 2 * b)


def test_a_whole_variables_dict_is_a_deeper_tree():
    updated = update_params({"params": served_tree()}, {"params": trainer_tree()})
    assert_same_bits(updated["params"], update_params(served_tree(), trainer_tree()))


@pytest.mark.parametrize("with_mesh", [False, True])
def test_boxes_of_params_stay_and_those_of_loaded_go(with_mesh):
    """Also under a mesh with other axis names, where `Partitioned.unbox()` would constrain."""
    w, b = weight(18, 20), weight(20)
    params = {"kernel": boxed_kernel(18, 20), "bias": nn.Partitioned(jnp.zeros(20), ("out",))}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    box = nn.LogicallyPartitioned
    for loaded in (
        {"kernel": w, "bias": b},
        {"kernel": nn.Partitioned(w, ("i", "o")), "bias": box(b, ("o",))},
        {"kernel": nn.Partitioned(DenseWeight(w.T, "out_in"), ("o", "i")), "bias": b},
        {"kernel": DenseWeight(box(w, ("i", "o"))), "bias": nn.Partitioned(box(b, ("o",)), ())},
        {"kernel": PaddedKernel.from_dense(w), "bias": b},
    ):
        with jax.set_mesh(mesh) if with_mesh else jax.default_device(None):
            updated = update_params(params, loaded)
        assert updated["kernel"].qvalue.names == ("out", "in")
        assert updated["kernel"].scale.names == updated["bias"].names == ("out",)
        assert_same_bits(nn.unbox(updated["kernel"]), PaddedKernel.from_dense(w))
        np.testing.assert_array_equal(updated["bias"].value, b)


@pytest.mark.parametrize("boxed", [False, True])
def test_abstract_params_give_concrete_arrays(boxed):
    concrete = {"kernel": boxed_kernel(18, 20) if boxed else nn.unbox(boxed_kernel(18, 20))}
    abstract = jax.eval_shape(lambda: concrete)
    loaded = {"kernel": weight(18, 20, seed=3)}
    assert_same_bits(update_params(abstract, loaded), update_params(concrete, loaded))


def test_partial_keeps_what_is_missing():
    params = served_tree()
    loaded = {"Dense_1": {"bias": weight(10, seed=7)}}
    updated = update_params(params, loaded, partial=True)
    np.testing.assert_array_equal(updated["Dense_1"]["bias"], weight(10, seed=7))
    assert updated["LayerNorm_0"]["scale"] is params["LayerNorm_0"]["scale"]
    updated["Dense_1"]["bias"] = params["Dense_1"]["bias"]
    assert_same_bits(updated, params)
    assert_same_bits(update_params(params, {}, partial=True), params)


def test_partial_accepts_abstract_params_whose_values_all_come():
    abstract = jax.eval_shape(served_tree)
    updated = update_params(abstract, trainer_tree(), partial=True)
    assert_same_bits(updated, update_params(served_tree(), trainer_tree()))


@pytest.mark.parametrize(
    "ignore",
    [
        "value_head",
        ("value_head",),
        ["value_head/*"],
        ("value_*/*",),
        ("*/extra", "*/kernel2", "no"),
    ],
)
def test_ignore_leaves_out_unexpected_paths(ignore):
    loaded = trainer_tree()
    loaded["value_head"] = {"kernel2": weight(3, 4), "deep": {"extra": weight(2)}}
    updated = update_params(served_tree(), loaded, ignore=ignore)
    assert_same_bits(updated, update_params(served_tree(), trainer_tree()))


def test_ignore_does_not_hold_back_what_params_has():
    updated = update_params(served_tree(), trainer_tree(), ignore=("*",))
    assert_same_bits(updated, update_params(served_tree(), trainer_tree()))


def test_a_static_activation_scale_is_kept_unless_it_comes():
    kernel = PaddedKernel.from_dense(weight(18, 20, seed=1))
    params = {"layer": {"kernel": kernel, "x_scale": jnp.float32(0.25)}}
    w = weight(18, 20)
    kept = update_params(params, {"layer": {"kernel": w}})
    assert kept["layer"]["x_scale"] == 0.25
    assert_same_bits(kept["layer"]["kernel"], PaddedKernel.from_dense(w))
    for scale in (0.5, np.float32(0.5), jnp.bfloat16(0.5)):
        updated = update_params(params, {"layer": {"kernel": w, "x_scale": scale}})
        assert updated["layer"]["x_scale"] == 0.5
        assert updated["layer"]["x_scale"].dtype == jnp.float32


def test_an_x_scale_without_a_padded_kernel_is_an_ordinary_leaf():
    params = {"kernel": jnp.zeros((2, 2)), "x_scale": jnp.float32(1.0)}
    with pytest.raises(ValueError, match=r"Missing in `loaded` \(1\): x_scale"):
        update_params(params, {"kernel": weight(2, 2)})
    assert update_params(params, {"kernel": weight(2, 2), "x_scale": -1.0})["x_scale"] == -1.0


def test_traced_updates_give_the_same_bits():
    params, loaded = served_tree(), jax.tree.map(jnp.asarray, trainer_tree())
    eager = update_params(params, loaded)
    assert_same_bits(jax.jit(update_params)(params, loaded), eager)
    assert_same_bits(jax.jit(lambda new: update_params(params, new))(loaded), eager)
    assert_same_bits(jax.jit(lambda: update_params(params, loaded))(), eager)
    shapes = jax.eval_shape(update_params, params, loaded)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)


def test_vmap_over_several_trainers():
    loaded = [{"kernel": weight(18, 20, seed=s), "bias": weight(20, seed=s)} for s in range(3)]
    params = {"kernel": PaddedKernel.from_dense(weight(18, 20)), "bias": jnp.zeros(20)}
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *loaded)
    batched = jax.vmap(update_params, in_axes=(None, 0))(params, stacked)
    for index, one in enumerate(loaded):
        assert_same_bits(jax.tree.map(lambda a, i=index: a[i], batched), update_params(params, one))


def test_a_traced_nan_follows_the_rule_of_quantize():
    w = jnp.asarray(weight(18, 20)).at[4, 7].set(jnp.nan)
    params = {"kernel": PaddedKernel.from_dense(weight(18, 20))}
    traced = jax.jit(update_params)(params, {"kernel": w})
    assert_same_bits(traced["kernel"], PaddedKernel.from_dense(w))
    assert np.isnan(traced["kernel"].scale).nonzero()[0].tolist() == [7]


@pytest.mark.parametrize("disable_jit", [False, True])
def test_no_result_shares_a_buffer_with_loaded(disable_jit):
    """Invariant 9, where nothing had to be computed: same dtype, no padding, no transpose."""
    loaded = {
        "kernel": PaddedKernel.from_dense(weight(32, 16)),
        "scale": jnp.ones(16),
        "tied": (twice := jnp.ones(5)),
        "tied_too": twice,
        "step": jnp.int32(3),
        "raw": jnp.ones(16, FP8_DTYPE),
    }
    before = host_bits(loaded)
    params = jax.tree.map(jnp.copy, loaded)
    with jax.disable_jit(disable_jit):
        updated = update_params(params, loaded)
    assert not set(addresses(updated)) & set(addresses(loaded) + addresses(params))
    assert len(set(addresses(updated))) == len(addresses(updated))
    for leaf in jax.tree.leaves(updated):
        leaf.delete()
    for now, then in zip(host_bits(loaded), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_numpy_arrays_may_be_overwritten_after_the_call():
    """On CPU a numpy array is read where it lies; 64-byte alignment makes that certain."""
    size = 512
    memory = np.empty(size * size + 16, np.float32)
    start = (-memory.ctypes.data % 64) // 4
    w = memory[start : start + size * size].reshape(size, size)
    w[:] = weight(size, size)
    params = {"kernel": PaddedKernel.from_dense(w), "plain": jnp.array(w)}
    for _ in range(5):
        updated = update_params(params, {"kernel": w, "plain": w})
        w[:] = np.nan
        assert_same_bits(updated, params)
        w[:] = weight(size, size)


def test_results_are_placed_like_a_committed_template():
    device = devices()[1]
    params = jax.device_put(served_tree(), device)
    updated = update_params(params, trainer_tree())
    assert {leaf.device for leaf in jax.tree.leaves(updated)} == {device}
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), params
    )
    updated = update_params(abstract, trainer_tree())
    assert {leaf.device for leaf in jax.tree.leaves(updated)} == {device}
    assert not any(
        a.committed for a in jax.tree.leaves(update_params(served_tree(), trainer_tree()))
    )
