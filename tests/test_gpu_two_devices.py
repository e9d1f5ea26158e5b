"""Two GPUs in one process: a call runs on the device of its operands, and on its stream."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import addresses, assert_same_bits

from jaxfp8 import PaddedKernel, fp8_dense, quantize_input, reload_params, update_params


pytestmark = pytest.mark.gpu(count=2)
# One K-major kernel of every kind of result and store: aligned, and stored by classes of rows.
SIZES = [(256, 512), (250, 3420)]


def inputs(k, n, seed=0):
    x = jax.random.normal(jax.random.key(seed), (300, k), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(seed + 1), (k, n), jnp.float32)
    return x, w, jnp.arange(n, dtype=jnp.float32)


def on(device, tree):
    return jax.device_put(tree, device)


@jax.jit
def layer(x, kernel, bias):
    return fp8_dense(quantize_input(x), kernel, bias, activation="gelu", out_dtype=x.dtype)


@jax.jit
def dense(x, kernel, bias):
    return fp8_dense(x, kernel, bias, activation="silu", implementation="cutlass")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", [layer, dense])
def test_each_device_gives_the_same_bits(size, function):
    """The second device first, so that nothing was prepared on it by the first."""
    x, w, bias = inputs(*size)
    results = {}
    for device in reversed(jax.devices("cuda")[:2]):
        arguments = on(device, (x, PaddedKernel.from_dense(w), bias))
        results[device] = function(*arguments)
        assert results[device].devices() == {device}
    first, second = (np.asarray(y) for y in results.values())
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


def test_threads_on_two_devices_do_not_meet():
    """Each thread checks each of its results; streams and per-device state are its device's own."""
    x, w, bias = inputs(*SIZES[1])
    expected = np.asarray(dense(*on(jax.devices("cuda")[0], (x, PaddedKernel.from_dense(w), bias))))
    wrong = []

    def run(device):
        arguments = on(device, (x, PaddedKernel.from_dense(w), bias))
        for _ in range(200):
            y = dense(*arguments)
            if y.devices() != {device} or not np.array_equal(np.asarray(y), expected):
                wrong.append(device)

    threads = [threading.Thread(target=run, args=(d,)) for d in jax.devices("cuda")[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_reload_stays_on_the_second_device():
    first, second = jax.devices("cuda")[:2]
    _, w, bias = inputs(*SIZES[1])
    params = on(second, {"kernel": PaddedKernel.from_dense(w), "bias": bias})
    params = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(params)
    before = addresses(params)
    fresh = {"kernel": w * 2 + 1, "bias": bias + 1}
    expected = update_params(on(first, params), on(first, fresh))
    for source in (on(second, fresh), on(first, fresh), jax.tree.map(np.asarray, fresh)):
        params = reload_params(params, source)
        assert all(leaf.devices() == {second} for leaf in jax.tree.leaves(params))
        assert addresses(params) == before
        assert_same_bits(on(first, params), expected)


def test_a_mesh_of_two_under_shard_map():
    """Each device multiplies its own rows."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices("cuda")[:2], axis_types=auto)
    spec = jax.sharding.PartitionSpec
    x, w, bias = inputs(*SIZES[1])
    kernel = PaddedKernel.from_dense(w)
    sharded = jax.jit(
        jax.shard_map(
            lambda x, kernel, bias: fp8_dense(x, kernel, bias),
            mesh=mesh,
            in_specs=(spec("data"), spec(), spec()),
            out_specs=spec("data"),
        )
    )
    y = sharded(x, kernel, bias)
    assert len(y.devices()) == 2
    alone = jax.jit(fp8_dense)(x, kernel, bias)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(alone, np.float32))
