"""reload_params: same buffers, avals and shardings, no recompilation, the same bits."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import (
    addresses,
    assert_padding_holds,
    assert_same_bits,
    devices,
    host_bits,
    owned,
    served_tree,
    trainer_tree,
    weight,
)

from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.quantize import quantize
from jaxfp8.update import reload_params, update_params


@contextlib.contextmanager
def count_compilations():
    """A list that grows by one for each program that XLA compiles."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def identity_of(tree) -> list[tuple]:
    """All that a compiled caller, or a captured graph, depends on."""
    return [
        (a.shape, a.dtype, jax.typeof(a).weak_type, a.sharding, a.committed)
        for a in jax.tree.leaves(tree)
    ]


def serve(tree) -> jax.Array:
    """Reads every leaf."""
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree))


def out_in(tree):
    """The same weights as torch would hold them."""
    return jax.tree.map(lambda a: DenseWeight(a.T, "out_in") if a.ndim == 2 else a, tree)


def fp8(tree):
    """The same weights, quantized as a checkpoint holds them."""

    def leaf(a):
        if a.ndim < 2:
            return a
        value, scale = quantize(a.T, axis=-1, keepdims=False)
        return FP8Weight(value, scale, "out_in")

    return jax.tree.map(leaf, tree)


KINDS = {
    "numpy": lambda tree: tree,
    "uncommitted": lambda tree: jax.tree.map(jnp.array, tree),
    "committed": lambda tree: jax.device_put(tree, jax.devices()[0]),
    "other device": lambda tree: jax.device_put(tree, devices()[1]),
    "bfloat16": lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree),
    "numpy bfloat16": lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree),
    "out_in": out_in,
    "fp8": fp8,
    "padded": lambda tree: update_params(served_tree(), tree),
}


@pytest.mark.parametrize("committed", [False, True])
def test_a_hundred_reloads_move_and_recompile_nothing(committed):
    """Invariant 7, with every kind of input in turn; each result also has the right bits."""
    params = served_tree()
    if committed:
        params = jax.device_put(params, jax.devices()[0])
    served = jax.jit(lambda tree: serve(tree))  # A new function: jit's cache is by identity.
    trees = [make(trainer_tree(seed)) for seed, make in enumerate(KINDS.values(), start=1)]
    expected = [host_bits(update_params(served_tree(), tree)) for tree in trees]
    where, what = addresses(params), identity_of(params)
    served(params)
    for tree in trees:  # Each kind compiles its own programs, once.
        params = reload_params(params, tree)
        served(params)
    with count_compilations() as compiled:
        for turn in range(100):
            params = reload_params(params, trees[turn % len(trees)])
            served(params)
            assert addresses(params) == where
            assert identity_of(params) == what
            if turn >= 100 - len(trees):
                for now, then in zip(host_bits(params), expected[turn % len(trees)], strict=True):
                    np.testing.assert_array_equal(now, then)
    assert compiled == [] and served._cache_size() == 1


def test_the_counter_counts():
    with count_compilations() as compiled:
        jax.jit(lambda x: x * 41.5)(jnp.ones(7))
    assert compiled


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_is_alive_and_unchanged(kind):
    """The trainer's LayerNorm has the dtype and shape of ours: the case that astype would share."""
    loaded = KINDS[kind](trainer_tree())
    params = served_tree()
    params["LayerNorm_0"] = jax.tree.map(
        lambda a: a.astype(jnp.asarray(loaded["LayerNorm_0"]["scale"]).dtype), params["LayerNorm_0"]
    )
    before = host_bits(loaded)
    for _ in range(3):
        params = reload_params(params, loaded)
        for now, then in zip(host_bits(loaded), before, strict=True):
            np.testing.assert_array_equal(now, then)


def test_params_is_consumed():
    params = served_tree()
    updated = reload_params(params, trainer_tree())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(updated))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("stack", [(), (2, 3)])
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_reload_equals_update_and_rewrites_the_padding(per_channel, stack, layout):
    w = weight(*stack, 18, 20)
    kernel = PaddedKernel.from_dense(weight(*stack, 18, 20, seed=1), per_channel=per_channel)
    qvalue = kernel.qvalue.at[..., 20:, :].set(jnp.nan).at[..., 18:].set(jnp.nan)
    scale = kernel.scale.at[..., 20:].set(jnp.nan) if per_channel else kernel.scale
    kernel = PaddedKernel(qvalue, scale, 18, 20)
    where = addresses(kernel)
    loaded = DenseWeight(w if layout == "in_out" else np.swapaxes(w, -1, -2), layout)
    kernel = reload_params(kernel, loaded)
    assert addresses(kernel) == where
    assert_padding_holds(kernel)
    assert_same_bits(kernel, PaddedKernel.from_dense(w, per_channel=per_channel))


def test_weak_types_stay():
    """`x_scale` may come from a Python float; a served function compiles again if that changes."""
    kernel = PaddedKernel.from_dense(weight(18, 20))
    params = {"kernel": kernel, "x_scale": jnp.asarray(0.25) * 2}
    assert jax.typeof(params["x_scale"]).weak_type
    what, where = identity_of(params), addresses(params)
    for scale in (0.5, jnp.float32(0.75), jnp.asarray(1.5)):
        params = reload_params(params, {"kernel": weight(18, 20), "x_scale": scale})
        assert identity_of(params) == what and addresses(params) == where
        assert params["x_scale"].unsafe_buffer_pointer() and jnp.copy(params["x_scale"]) == scale


def test_committed_and_uncommitted_leaves_in_one_kernel():
    kernel = PaddedKernel.from_dense(weight(18, 20))
    kernel = PaddedKernel(owned(jax.device_put(kernel.qvalue, devices()[2])), kernel.scale, 18, 20)
    what, where = identity_of(kernel), addresses(kernel)
    for make in (np.asarray, jnp.asarray, lambda w: jax.device_put(w, devices()[1])):
        kernel = reload_params(kernel, make(weight(18, 20, seed=3)))
        assert identity_of(kernel) == what and addresses(kernel) == where
    fresh = PaddedKernel.from_dense(weight(18, 20, seed=3))
    np.testing.assert_array_equal(np.array(kernel.qvalue), np.array(fresh.qvalue))


def test_uncommitted_params_on_another_device():
    with jax.default_device(devices()[3]):
        params = served_tree()
    what, where = identity_of(params), addresses(params)
    for make in (KINDS["numpy"], KINDS["uncommitted"], KINDS["committed"]):
        params = reload_params(params, make(trainer_tree()))
        assert identity_of(params) == what and addresses(params) == where


def test_boxes_stay():
    kernel = PaddedKernel.from_dense(weight(18, 20))
    boxed = PaddedKernel(
        nn.Partitioned(kernel.qvalue, ("o", "i")), nn.Partitioned(kernel.scale, ("o",)), 18, 20
    )
    structure, where = jax.tree.structure(boxed), addresses(boxed)
    updated = reload_params(boxed, nn.Partitioned(weight(18, 20, seed=2), ("i", "o")))
    assert jax.tree.structure(updated) == structure and addresses(updated) == where


def test_partial_hands_on_what_it_keeps():
    params = served_tree()
    kept = params["Dense_0"]["kernel"].qvalue
    where = addresses(params)
    params = reload_params(params, {"Dense_1": trainer_tree()["Dense_1"]}, partial=True)
    assert addresses(params) == where and params["Dense_0"]["kernel"].qvalue is kept
    assert reload_params(params, {}, partial=True)["Dense_0"]["kernel"].qvalue is kept


def test_ignored_paths_are_left_out():
    loaded = trainer_tree() | {"value_head": {"kernel": np.full((2, 2), np.nan)}}
    updated = reload_params(served_tree(), loaded, ignore=("value_head",))
    assert_same_bits(updated, update_params(served_tree(), trainer_tree()))


def test_allow_nonfinite_poisons_the_slices_that_are_not_finite_and_no_other():
    """64·100 elements: from 4096 on, XLA's CPU maximum drops NaN (jax 0.10.2)."""
    loaded = trainer_tree()
    clean = PaddedKernel.from_dense(loaded["Dense_0"]["kernel"]).dequantize()
    loaded["Dense_0"]["kernel"][3, 5] = np.nan
    loaded["Dense_0"]["kernel"][4, 6] = -np.inf
    loaded["Dense_1"]["bias"][2] = -np.inf
    updated = reload_params(served_tree(), loaded, allow_nonfinite=True)
    kernel = updated["Dense_0"]["kernel"]
    assert np.isnan(kernel.scale[5]) and np.isposinf(kernel.scale[6])
    got = np.array(kernel.dequantize())
    assert np.isnan(got[:, 5]).all() and np.isnan(got[:, 6]).all()
    rest = np.delete(np.arange(100), [5, 6])
    np.testing.assert_array_equal(got[:, rest], clean[:, rest])
    assert_padding_holds(kernel)
    assert updated["Dense_1"]["bias"][2] == -np.inf


def test_without_jit():
    """`jax.disable_jit` is for debugging; the programs compiled ahead of time stay compiled."""
    params, loaded = served_tree(), trainer_tree()
    where = addresses(params)
    with jax.disable_jit():
        params = reload_params(params, loaded)
    assert addresses(params) == where
    assert_same_bits(params, update_params(params, loaded))
