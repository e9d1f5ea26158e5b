"""reload_stream: any order, the bits and buffers of reload_params, and no second copy."""

import gc
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_reload import KINDS, count_compilations, identity_of, serve
from update_cases import (
    addresses,
    assert_padding_holds,
    assert_same_bits,
    devices,
    mesh_devices,
    owned,
    served_tree,
    trainer_tree,
    weight,
)

import jaxfp8._donate
from jaxfp8 import DenseWeight, PaddedKernel, reload_params, reload_stream, update_params


PATHS = [
    "Dense_0/kernel",
    "Dense_0/bias",
    "Dense_1/kernel",
    "Dense_1/bias",
    "LayerNorm_0/scale",
    "LayerNorm_0/bias",
]


def leaf(tree, path: str):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def streamed(params, loaded, paths=PATHS, **options):
    """`loaded` put leaf by leaf in the order of `paths`."""
    with reload_stream(params, **options) as stream:
        for path in paths:
            stream.put(path, leaf(loaded, path))
        return stream.finish()


@pytest.mark.parametrize(("seed", "kind"), list(enumerate(KINDS)))
def test_any_order_gives_the_bits_of_update_params(seed, kind):
    order = np.random.default_rng(seed).permutation(PATHS).tolist()
    params, loaded = served_tree(), KINDS[kind](trainer_tree(seed))
    expected = update_params(params, loaded)
    where, what = addresses(params), identity_of(params)
    updated = streamed(params, loaded, order)
    assert_same_bits(updated, expected)
    assert addresses(updated) == where and identity_of(updated) == what
    assert all(old.is_deleted() for old in jax.tree.leaves(params))


def test_many_streams_move_and_recompile_nothing():
    params = served_tree()
    served = jax.jit(lambda tree: serve(tree))
    trees = [make(trainer_tree(seed)) for seed, make in enumerate(KINDS.values(), start=1)]
    expected = [update_params(served_tree(), tree) for tree in trees]
    where, what = addresses(params), identity_of(params)
    for tree, fresh in zip(trees, expected, strict=True):
        params = streamed(params, tree)
        served(params)
        assert_same_bits(params, fresh)  # what it compiles, too
    with count_compilations() as compiled:
        for turn in range(4 * len(trees)):
            params = streamed(params, trees[turn % len(trees)])
            served(params)
            assert addresses(params) == where and identity_of(params) == what
            assert_same_bits(params, expected[turn % len(trees)])
    assert compiled == [] and served._cache_size() == 1


def test_layers_of_one_shape_share_a_program():
    layers = {f"layer_{i}": {"kernel": weight(23, 31, seed=i)} for i in range(5)}
    params = jax.tree.map(PaddedKernel.from_dense, layers)
    jaxfp8._donate._compile.cache_clear()
    with reload_stream(params) as stream:
        for name, layer in layers.items():
            stream.put_tree(name, layer)
        params = stream.finish()
    assert jaxfp8._donate._compile.cache_info().misses == 1
    one = {"layer_3": jax.tree.map(jnp.asarray, layers["layer_3"])}
    reload_params(params, one, partial=True)
    assert jaxfp8._donate._compile.cache_info().misses == 1


def test_subtrees_pairs_and_leaves_mixed():
    params, loaded = served_tree(), trainer_tree()
    expected = update_params(params, loaded)
    with reload_stream(params) as stream:
        stream.put_tree("Dense_1", loaded["Dense_1"])
        stream.put("Dense_0/kernel", DenseWeight(loaded["Dense_0"]["kernel"].T, "out_in"))
        stream.put_all(("LayerNorm_0/" + k, v) for k, v in loaded["LayerNorm_0"].items())
        assert stream.missing == ("Dense_0/bias",)
        stream.put_tree(
            "", {"Dense_0": {"bias": nn.Partitioned(loaded["Dense_0"]["bias"], ("o",))}}
        )
        assert stream.missing == ()
        assert stream.updated == (
            *("Dense_1/bias", "Dense_1/kernel", "Dense_0/kernel"),
            *("LayerNorm_0/scale", "LayerNorm_0/bias", "Dense_0/bias"),
        )
        assert_same_bits(stream.finish(), expected)


def test_a_tree_that_is_one_leaf():
    kernel = PaddedKernel.from_dense(weight(18, 20))
    with reload_stream(kernel) as stream:
        assert stream.missing == ("(the tree itself)",)
        stream.put("", weight(18, 20, seed=1))
        updated = stream.finish()
    assert_same_bits(updated, PaddedKernel.from_dense(weight(18, 20, seed=1)))


def test_lists_frozen_dicts_and_boxes_stay():
    kernel = PaddedKernel.from_dense(weight(18, 20))
    boxed = PaddedKernel(
        nn.Partitioned(kernel.qvalue, ("o", "i")), nn.Partitioned(kernel.scale, ("o",)), 18, 20
    )
    params = {"layers": [nn.FrozenDict({"kernel": boxed}), {"bias": jnp.zeros(20)}]}
    structure, where = jax.tree.structure(params), addresses(params)
    with reload_stream(params) as stream:
        stream.put("layers/1/bias", weight(20))
        stream.put("layers/0/kernel", weight(18, 20, seed=2))
        updated = stream.finish()
    assert jax.tree.structure(updated) == structure and addresses(updated) == where
    np.testing.assert_array_equal(jnp.copy(updated["layers"][1]["bias"]), weight(20))


def test_the_padding_is_written_anew():
    kernel = PaddedKernel.from_dense(weight(18, 20, seed=3))
    qvalue = kernel.qvalue.at[20:].set(jnp.nan).at[:, 18:].set(jnp.nan)
    kernel = PaddedKernel(qvalue, kernel.scale.at[20:].set(jnp.nan), 18, 20)
    updated = streamed({"d": {"kernel": kernel}}, {"d": {"kernel": weight(18, 20)}}, ["d/kernel"])
    assert_padding_holds(updated["d"]["kernel"])


def test_partial_and_calibration_constants_keep_their_values():
    params = served_tree()
    params["Dense_0"]["x_scale"] = jnp.float32(0.25) + 0
    kept = params["Dense_1"]["kernel"].qvalue
    with reload_stream(params) as stream:
        stream.put("Dense_0/kernel", weight(64, 100))
        updated = stream.finish(partial=True)
    assert updated["Dense_1"]["kernel"].qvalue is kept and not kept.is_deleted()
    loaded = trainer_tree()
    updated = streamed(updated, loaded)  # Complete without x_scale.
    assert updated["Dense_0"]["x_scale"] == 0.25
    with reload_stream(updated) as stream:
        stream.put("Dense_0/x_scale", 0.5)
        updated = stream.finish(partial=True)
    assert updated["Dense_0"]["x_scale"] == 0.5


def test_ignored_paths_are_left_out():
    loaded = trainer_tree()
    with reload_stream(served_tree(), ignore=("value_head", "*/ema")) as stream:
        stream.put("value_head/kernel", np.full((2, 2), np.nan))
        stream.put_tree("Dense_0", {**loaded["Dense_0"], "ema": "nothing"})
        assert stream.updated == ("Dense_0/bias", "Dense_0/kernel")
        stream.finish(partial=True)


def test_allow_nonfinite():
    loaded = trainer_tree()
    loaded["Dense_0"]["kernel"][3, 5] = np.nan
    expected = reload_params(served_tree(), loaded, allow_nonfinite=True)
    assert_same_bits(streamed(served_tree(), loaded, allow_nonfinite=True), expected)


def test_host_arrays_may_be_overwritten_once_put_returns():
    size = 512
    memory = np.empty(size * size + 16, np.float32)
    start = (-memory.ctypes.data % 64) // 4  # XLA reads aligned memory where it lies.
    w = memory[start : start + size * size].reshape(size, size)
    fresh = PaddedKernel.from_dense(weight(size, size))
    params = {"kernel": jax.tree.map(jnp.copy, fresh), "plain": jnp.zeros((size, size))}
    params["qkv"] = {"kernel": jax.tree.map(jnp.copy, fresh)}
    for _ in range(5):
        with reload_stream(params, shards={"qkv": {"q": size - 8, "k": 8}}) as stream:
            for path in ("kernel", "plain"):
                w[:] = weight(size, size)
                stream.put(path, w)
                w[:] = np.nan
            w[:] = weight(size, size)
            stream.put("qkv/kernel", w[:, : size - 8], shard="q")
            stream.put("qkv/kernel", w[:, size - 8 :], shard="k")
            w[:] = np.nan
            params = stream.finish()
        assert_same_bits(params["kernel"], fresh)
        assert_same_bits(params["qkv"]["kernel"], fresh)
        assert not jnp.isnan(params["plain"]).any()


def test_one_host_array_is_alive_at_a_time():
    """A generator that makes weights on demand; each is gone when the next is asked for."""
    params = {f"d{i}": {"kernel": PaddedKernel.from_dense(weight(64, 48))} for i in range(6)}
    gc.collect()
    arrays = len(jax.live_arrays())  # Before `addresses`, which may make some of its own.
    where = addresses(params)
    alive = []

    class Weight(np.ndarray):
        pass

    def pairs():
        for i in range(6):
            gc.collect()
            alive.append(sum(isinstance(o, Weight) for o in gc.get_objects()))
            yield f"d{i}/kernel", weight(64, 48, seed=i).view(Weight)

    with reload_stream(params) as stream:
        stream.put_all(pairs())
        params = stream.finish()
    gc.collect()
    assert max(alive) <= 1 and len(jax.live_arrays()) <= arrays
    assert addresses(params) == where
    for i in range(6):
        assert_same_bits(params[f"d{i}"]["kernel"], PaddedKernel.from_dense(weight(64, 48, seed=i)))


def test_progress_is_told_in_bytes():
    seen: list[tuple[int, int]] = []
    params = served_tree()
    sizes = [sum(a.nbytes for a in jax.tree.leaves(leaf(params, path))) for path in PATHS]
    streamed(params, trainer_tree(), progress=lambda *args: seen.append(args))
    total = sum(sizes)
    assert seen == [(done, total) for done in itertools.accumulate(sizes)]


@pytest.mark.parametrize("rich", [True, False])
def test_the_bar(rich, capfd, monkeypatch):
    if not rich:
        monkeypatch.setitem(__import__("sys").modules, "rich", None)
    streamed(served_tree(), trainer_tree(), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "reload" in err
    assert ("10312 of 10312 bytes" in err) == (not rich), err


@pytest.mark.parametrize("spec", [("x", "y"), ("x", None), (None, "y"), (None, None)])
def test_sharded_and_committed_leaves(spec):
    """Trees over a mesh, and committed to another device; weights from anywhere."""
    mesh = Mesh(np.array(mesh_devices(4)).reshape(2, 2), ("x", "y"))
    place = PaddedKernel(PartitionSpec(*spec), PartitionSpec(spec[0]), 40, 52)
    kernel = PaddedKernel.from_dense(weight(40, 52))
    sharded = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), kernel, place)
    params = owned({"a": sharded, "b": jax.device_put(kernel, devices()[2])})
    where, what = addresses(params), identity_of(params)
    for seed, make in enumerate(
        (np.asarray, jnp.asarray, lambda w: jax.device_put(w, devices()[3])), start=1
    ):
        w = weight(40, 52, seed=seed)
        with jax.set_mesh(mesh), reload_stream(params) as stream:
            stream.put("b", make(w))
            stream.put("a", make(w))
            params = stream.finish()
        assert addresses(params) == where and identity_of(params) == what
        fresh = PaddedKernel.from_dense(w)
        for name in "ab":
            assert_same_bits(params[name], fresh)


def test_under_a_transfer_guard():
    params = streamed(served_tree(), trainer_tree())
    with jax.transfer_guard("disallow"):
        streamed(params, trainer_tree())


def test_buffers_that_the_weights_share_with_the_tree():
    """A tree put into itself, and two leaves exchanged in one call: nothing is lost."""
    params = served_tree()
    copy = jax.tree.map(jnp.copy, params)
    with reload_stream(params) as stream:
        stream.put_tree("", params)
        updated = stream.finish()
    assert_same_bits(updated, copy)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    x, y = jnp.asarray(weight(40)), jnp.asarray(weight(40, seed=1))
    with reload_stream({"a": x, "b": y, "c": jnp.zeros(40, jnp.int32)}) as stream:
        stream.put_tree("", {"a": y, "b": x, "c": np.arange(40, dtype=np.int32)})
        updated = stream.finish()
    expected = {"a": weight(40, seed=1), "b": weight(40), "c": np.arange(40)}
    jax.tree.map(np.testing.assert_array_equal, updated, expected)
