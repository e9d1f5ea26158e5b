"""Reloads and rows on meshes of Explicit axes, under other default devices, and of odd sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from update_cases import addresses, assert_same_bits, devices, mesh_devices, owned, weight

from jaxfp8 import PaddedKernel, reload_params, reload_stream, update_rows
from jaxfp8._lazy import LazyArray


K, N = 64, 96
SHARDS = {"a": {"q": 40, "k": 56}}


def placed(kind, spec):
    mesh = jax.make_mesh((2,), ("x",), devices=mesh_devices(2), axis_types=(kind,))
    return mesh, lambda array, *names: jax.device_put(
        array, NamedSharding(mesh, PartitionSpec(*(names or spec)))
    )


def served(spec, kind, seed=0):
    mesh, put = placed(kind, spec)
    kernel = PaddedKernel.from_dense(weight(K, N, seed=seed))
    scale = put(kernel.scale, spec[0])
    return mesh, put, owned({"a": {"kernel": PaddedKernel(put(kernel.qvalue), scale, K, N)}})


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [(None, "x"), ("x", None), (None, None)])
def test_a_source_on_the_same_mesh(spec, kind):
    _, put, params = served(spec, kind)
    w = weight(K, N, seed=3)
    before = addresses(params)
    params = reload_params(params, {"a": {"kernel": put(w, None, "x")}})
    assert addresses(params) == before
    assert params["a"]["kernel"].qvalue.sharding.spec == PartitionSpec(*spec)
    assert_same_bits(
        jax.device_get(params["a"]["kernel"]), jax.device_get(PaddedKernel.from_dense(w))
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [(None, "x"), ("x", None)])
@pytest.mark.parametrize("in_place", [True, False])
def test_rows_of_a_kernel_on_a_mesh(spec, kind, in_place):
    _, put, params = served(spec, kind)
    w, rows = weight(K, N), weight(K, 56, seed=4)
    if in_place:
        with reload_stream(params, shards=SHARDS) as stream:
            stream.put("a/kernel", rows, shard="k")
            kernel = stream.finish(partial=True)["a"]["kernel"]
    else:
        kernel = update_rows(params["a"]["kernel"], 40, put(rows, "x", None))
    expected = PaddedKernel.from_dense(np.concatenate([w[:, :40], rows], axis=1))
    assert_same_bits(jax.device_get(kernel), jax.device_get(expected))


def test_weights_are_measured_where_they_lie():
    """Under another default device, too: uncommitted arrays would be copied there by `jit`."""
    first, second = devices()[:2]
    with jax.default_device(first):
        params = owned({"a": {"kernel": PaddedKernel.from_dense(weight(K, N))}})
        loaded = {"a": {"kernel": jnp.asarray(weight(K, N, seed=5)) + 0}}
    before = addresses(params)
    with jax.default_device(second):
        params = reload_params(params, loaded)
    assert addresses(params) == before
    assert all(leaf.devices() == {first} for leaf in jax.tree.leaves(params))
    assert_same_bits(params["a"]["kernel"], PaddedKernel.from_dense(loaded["a"]["kernel"]))


def test_rows_from_a_lazy_array():
    w, rows = weight(K, N), weight(K, 56, seed=4)
    kernel = update_rows(PaddedKernel.from_dense(w), 40, LazyArray(((rows[:30], rows[30:]),)))
    expected = PaddedKernel.from_dense(np.concatenate([w[:, :40], rows], axis=1))
    assert_same_bits(kernel, expected)


def test_two_leaves_of_one_path_are_refused():
    params = owned({"d": {"bias": jnp.zeros(3)}})
    with reload_stream(params) as stream:
        with pytest.raises(ValueError, match="two leaves of one path"):
            stream.put_tree("", {"d/bias": jnp.ones(3), "d": {"bias": jnp.ones(3)}})
        stream.finish(partial=True)
