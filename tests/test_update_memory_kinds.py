"""Weights that lie in the host's pinned memory, where programs cannot compute, or not on the device
that programs run on by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from update_cases import assert_same_bits, devices, weight

from jaxfp8 import PaddedKernel, reload_params, reload_stream, update_params, update_rows


K, N = 24, 40


def streamed(params, loaded):
    with reload_stream(params) as stream:
        stream.put_tree("", loaded)
        return stream.finish()


writers = pytest.mark.parametrize("write", [update_params, reload_params, streamed])


def served(where=None):
    params = {"w": PaddedKernel.from_dense(jnp.zeros((K, N))), "b": jnp.zeros(7)}
    return params if where is None else jax.device_put(params, where)


def trained():
    return {"w": weight(K, N), "b": weight(7)}


@writers
@pytest.mark.parametrize("committed", [True, False])
def test_weights_in_pinned_memory(write, committed):
    device = jax.devices()[0]
    pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
    loaded = jax.device_put(trained(), pinned)
    params = write(served(device if committed else None), loaded)
    assert_same_bits(params, update_params(served(), trained()))
    assert all(leaf.sharding.memory_kind != "pinned_host" for leaf in jax.tree.leaves(params))


@writers
def test_weights_in_pinned_memory_of_a_mesh(write):
    mesh = jax.sharding.Mesh(np.array(devices()[-2:]), ("a",))
    there = NamedSharding(mesh, PartitionSpec())
    loaded = jax.device_put(trained(), there.with_memory_kind("pinned_host"))
    params = write(served(there), loaded)
    assert_same_bits(jax.device_get(params), jax.device_get(update_params(served(), trained())))


def test_rows_in_pinned_memory():
    pinned = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    kernel = update_rows(served()["w"], 0, jax.device_put(weight(K, N), pinned))
    assert_same_bits(kernel, PaddedKernel.from_dense(weight(K, N)))


@writers
def test_uncommitted_weights_of_another_device_go_nowhere_unsaid(write):
    with jax.default_device(devices()[1]):
        loaded = jax.tree.map(jnp.array, trained())
    with jax.transfer_guard("disallow"):
        params = write(served_quietly(), loaded)
    assert_same_bits(jax.device_get(params), jax.device_get(update_params(served(), trained())))


def served_quietly():
    with jax.transfer_guard("allow"):
        return served()
