"""What a load holds on the host: one layer at a time, and nothing before it is written."""

from __future__ import annotations

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import BF16, bits, write_sharded
from update_cases import addresses, assert_same_bits, mesh_devices

from jaxfp8 import _send
from jaxfp8._lazy import LazyArray
from jaxfp8.checkpoint import load_safetensors
from jaxfp8.padded import PaddedKernel, padded_size
from jaxfp8.update import reload_params, update_params


LAYERS, WIDTH, HIDDEN = 6, 1024, 1100  # 64 MB: a layer's gate and up are 4.5, its q, k and v 6.3
FUSE = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
SIZES = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "gate": HIDDEN, "up": HIDDEN}
FUSED = {"qkv": 3 * WIDTH, "gate_up": 2 * HIDDEN}
LARGEST = 2 * WIDTH * FUSED["qkv"]
NAMES = {
    "branches": [(r"h\.(\d)\.(\w+)\.weight", r"h_\1/\2/kernel")],
    "stacked": [(r"h\.(\d)\.(\w+)\.weight", r"h/\2/kernel[\1]")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    shards = {
        f"model-{i}.safetensors": {
            f"h.{i}.{name}.weight": rng.integers(-9, 9, (n, WIDTH)).astype(BF16)
            for name, n in SIZES.items()
        }
        for i in range(LAYERS)
    }
    return write_sharded(tmp_path_factory.mktemp("sharded"), shards)


def served(tree: str):
    def layer(*stack: int):
        return {
            name: {
                "kernel": PaddedKernel(
                    jnp.zeros((*stack, padded_size(n), WIDTH), jnp.float8_e4m3fn),
                    jnp.ones((*stack, padded_size(n))),
                    WIDTH,
                    n,
                )
            }
            for name, n in FUSED.items()
        }

    if tree == "stacked":
        return {"h": layer(LAYERS)}
    return {f"h_{i}": layer() for i in range(LAYERS)}


@pytest.mark.parametrize("change", [update_params, reload_params])
@pytest.mark.parametrize("tree", NAMES)
def test_the_host_holds_the_largest_layer_and_no_more(tree, change, folder):
    # Python's and numpy's allocations; a device's are its own, on a CPU too.
    params = change(served(tree), load_safetensors(folder, names=NAMES[tree], fuse=FUSE))
    tracemalloc.start()
    try:
        loaded = load_safetensors(folder, names=NAMES[tree], fuse=FUSE)
        _, opening = tracemalloc.get_traced_memory()
        change(params, loaded)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert opening < 0.1 * LARGEST, "values were read by the load itself"
    assert 0.9 * LARGEST < peak < 1.1 * LARGEST, peak / LARGEST


def test_both_trees_are_right_and_no_buffer_moves(folder):
    trees = {}
    for tree, names in NAMES.items():
        params = jax.block_until_ready(served(tree))
        before = addresses(params)
        params = reload_params(params, load_safetensors(folder, names=names, fuse=FUSE))
        assert addresses(params) == before
        trees[tree] = params
    for name in FUSED:
        for i in range(LAYERS):
            own = trees["branches"][f"h_{i}"][name]["kernel"]
            stacked = jax.tree.map(lambda a, i=i: a[i], trees["stacked"]["h"][name]["kernel"])
            assert_same_bits(own, stacked)
    kernel = load_safetensors(folder, names=NAMES["branches"], fuse=FUSE)["h_3"]["qkv"]["kernel"]
    dense = PaddedKernel.from_dense(jnp.asarray(np.asarray(kernel.value).T))
    assert_same_bits(trees["branches"]["h_3"]["qkv"]["kernel"], dense)


def lazy(*stack: int) -> LazyArray:
    count = int(np.prod(stack, dtype=int))
    arrays = [np.arange(15, dtype=np.float32).reshape(5, 3) + 100 * i for i in range(count)]
    return LazyArray(tuple((a[:2], a[2:]) for a in arrays), stack)


@pytest.mark.parametrize("stack", [(), (3,), (2, 2)], ids=str)
def test_a_lazy_array_is_numpy_when_asked(stack):
    array = lazy(*stack)
    wanted = np.stack([np.arange(15, dtype="f4").reshape(5, 3) + 100 * i for i in range(4)])
    wanted = wanted[: int(np.prod(stack, dtype=int))].reshape(*stack, 5, 3)
    assert (array.shape, array.dtype, array.ndim) == (wanted.shape, wanted.dtype, wanted.ndim)
    assert (array.size, array.nbytes) == (wanted.size, wanted.nbytes)
    np.testing.assert_array_equal(np.asarray(array), wanted)
    np.testing.assert_array_equal(np.asarray(array, np.float64), wanted)
    np.testing.assert_array_equal(jnp.asarray(array), wanted)
    np.testing.assert_array_equal(np.array(array) + 1, wanted + 1)
    with pytest.raises(ValueError, match="`copy` must not be False"):
        np.array(array, copy=False)
    put = _send.put(array)
    assert bits(put) == wanted.tobytes() and not put.committed


@pytest.mark.parametrize("stack", [(), (3,)], ids=str)
def test_it_goes_where_it_is_wanted(stack):
    device = mesh_devices(2)[1]
    single = jax.sharding.SingleDeviceSharding(device)
    assert _send.put(lazy(*stack), single).sharding == single
    mesh = jax.sharding.Mesh(np.array(mesh_devices(2)), "x")
    spec = jax.sharding.PartitionSpec()
    named = jax.sharding.NamedSharding(mesh, spec)
    put = _send.put(lazy(*stack), named)
    assert put.sharding == named and bits(put) == bits(np.asarray(lazy(*stack)))


@pytest.mark.parametrize("change", [update_params, reload_params])
def test_a_sharded_tree_takes_lazy_leaves(change, folder):
    mesh = jax.sharding.Mesh(np.array(mesh_devices(2)), "x")
    specs = [jax.sharding.PartitionSpec(*axes) for axes in ((), ("x",), (None, "x"), ("x",))]
    shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
    for tree in NAMES:
        loaded = load_safetensors(folder, names=NAMES[tree], fuse=FUSE)
        plain = update_params(served(tree), loaded)
        placed = jax.tree.map(lambda a: jax.device_put(a, shardings[a.ndim]), served(tree))
        assert_same_bits(change(placed, loaded), plain)


def test_disabled_jit_is_no_other_result(folder):
    loaded = load_safetensors(folder, names=NAMES["stacked"], fuse=FUSE)
    with jax.disable_jit():
        array = _send.put(loaded["h"]["gate_up"]["kernel"].value)
    assert bits(array) == bits(np.asarray(loaded["h"]["gate_up"]["kernel"].value))
