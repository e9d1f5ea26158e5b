"""Corners of updates: paths of one name, arrays apart, and who may write to what when."""

from collections import OrderedDict, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec
from update_cases import assert_same_bits, devices, mesh_devices, weight

import jaxfp8._donate
from jaxfp8 import (
    DenseWeight,
    FP8Weight,
    KernelShards,
    PaddedKernel,
    ReloadError,
    _lazy,
    dequantize_params,
    update_rows,
)
from jaxfp8.calibrate import with_x_scales
from jaxfp8.stream import reload_stream
from jaxfp8.update import reload_params, update_params


def on_host(array):
    """A copy that XLA on a CPU reads where it lies."""
    copy = _lazy._aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def test_an_ignored_leaf_of_the_same_name_is_never_taken():
    """`a/b` and b within a have one name; the plan must not take one for the other."""
    params, tied = {"a": {"b": jnp.zeros(3)}}, jnp.ones(3)
    params = reload_params(params, {"a": {"b": tied}, "a/b": tied}, ignore="a/b")
    params = reload_params(params, {"a": {"b": tied + 1}, "a/b": tied + 8}, ignore="a/b")
    assert np.all(params["a"]["b"] == 2)


def test_a_stream_refuses_params_with_two_leaves_of_one_path():
    params = {"a": {"b": jnp.zeros(3)}, "a/b": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"two leaves of one path, a/b"):
        reload_stream(params)


def test_host_arrays_may_be_overwritten_once_update_rows_returns():
    w = on_host(weight(2048, 1024))
    kernel = PaddedKernel.from_dense(jnp.zeros(w.shape))
    expected = update_rows(kernel, 0, jnp.array(w))
    updated = update_rows(kernel, 0, DenseWeight(w))
    w[:] = 7
    assert_same_bits(updated, expected)


def test_static_scales_are_no_view_of_the_hosts():
    kernel, scale = PaddedKernel.from_dense(weight(32, 5, 7)), on_host(np.ones(32, np.float32))
    params = with_x_scales({"kernel": kernel}, {"x_scale": scale})
    scale[:] = 9
    assert np.all(params["x_scale"] == 1)
    given = jnp.ones(32)
    params = with_x_scales({"kernel": kernel}, {"x_scale": given})
    assert params["x_scale"].unsafe_buffer_pointer() != given.unsafe_buffer_pointer()


def test_with_x_scales_reaches_into_lists():
    layer = {"kernel": PaddedKernel.from_dense(weight(5, 7))}
    scale = {"x_scale": jnp.float32(2)}
    for params in ([layer, layer], {"l": (layer, layer)}):
        scales = [scale, scale] if isinstance(params, list) else {"l": [scale, scale]}
        merged = with_x_scales(params, scales)
        layers = merged if isinstance(params, list) else merged["l"]
        assert type(layers) is type(params if isinstance(params, list) else params["l"])
        assert all(float(one["x_scale"]) == 2 for one in layers)


@pytest.mark.parametrize(
    "kind", [OrderedDict, FrozenDict, lambda items: defaultdict(list, items), nnx.State]
)
def test_a_mapping_keeps_its_type(kind):
    layer = kind({"kernel": PaddedKernel.from_dense(weight(5, 7)), "x_scale": jnp.float32(1)})
    static = with_x_scales(layer, {"x_scale": jnp.float32(2)})
    assert jax.tree.structure(static) == jax.tree.structure(layer)
    assert float(static["x_scale"]) == 2
    dense = dequantize_params(layer)
    assert type(dense) is type(layer) and set(dense) == {"kernel"}


@pytest.mark.parametrize("write", [update_params, reload_params])
def test_pieces_of_one_parameter_on_several_devices(write):
    w = weight(24, 40)
    mesh = jax.sharding.Mesh(np.array(mesh_devices(2)), ("x",))
    places = [*devices()[1:3], NamedSharding(mesh, PartitionSpec())]
    for first, second in ((0, 1), (0, 2), (2, 0)):
        q, k = (
            jax.device_put(part, places[i]) for part, i in ((w[:, :21], first), (w[:, 21:], second))
        )
        fresh = PaddedKernel.from_dense(w)
        fp8 = FP8Weight(
            jax.device_put(fresh.qvalue[:40, :24], places[first]),
            jax.device_put(fresh.scale[:40], places[second]),
            "out_in",
        )
        for loaded in (KernelShards({"q": q, "k": k}, {"q": 21, "k": 19}), fp8):
            params = {"kernel": PaddedKernel.from_dense(jnp.zeros((24, 40)))}
            assert_same_bits(write(params, {"kernel": loaded}), {"kernel": fresh})


@pytest.mark.parametrize("write", [update_params, reload_params])
@pytest.mark.parametrize("bad", [np.nan, 1j * np.inf])
def test_nan_and_infinity_in_complex_leaves(write, bad):
    params = {"a": jnp.zeros(2, jnp.complex64)}
    with pytest.raises(ValueError, match="a: a weight is NaN or infinite"):
        write(params, {"a": np.array([1, bad], np.complex64)})


@pytest.mark.parametrize("write", [update_params, reload_params])
def test_a_float64_leaf_may_be_large(write):
    with jax.enable_x64(True):
        params = write({"a": jnp.zeros(2, jnp.float64)}, {"a": np.array([1e300, -1e-300])})
        np.testing.assert_array_equal(params["a"], [1e300, -1e-300])


def test_the_elements_of_a_lost_stack_are_all_lost(monkeypatch):
    """A write that failed may take its buffers along, and with them what was written before."""
    params = {"w": PaddedKernel.from_dense(jnp.zeros((4, 5, 7))), "b": jnp.zeros(3)}
    run, runs = jaxfp8._donate.Step.run, []

    def fail(self, leaves, shared, arrived):
        runs.append(self)
        if len(runs) == 4:
            for i in self.slots[0]:
                leaves[i].delete()
            raise RuntimeError("out of memory")
        run(self, leaves, shared, arrived)

    monkeypatch.setattr(jaxfp8._donate.Step, "run", fail)
    kernels = weight(4, 5, 7)
    with pytest.raises(ReloadError) as caught:
        reload_params(jax.tree.map(jnp.copy, params), {"w": kernels, "b": jnp.ones(3)})
    assert caught.value.failed == ("w[0]", "w[1]", "w[2]", "w[3]")
    assert caught.value.updated == ("b",) and "Still old: nothing" in str(caught.value)
    runs.clear()
    with pytest.raises(ReloadError) as caught, reload_stream(params) as stream:
        stream.put("b", np.ones(3, np.float32))
        for i, kernel in enumerate(kernels):
            stream.put(f"w[{i}]", kernel)
    assert caught.value.failed == ("w",) and caught.value.updated == ("b",)
    assert "Still old: nothing" in str(caught.value)


def test_a_path_that_is_no_string():
    with reload_stream({"a": jnp.zeros(3)}) as stream:
        with pytest.raises(TypeError, match="`path` must be a str .* it is a int"):
            stream.put(3, np.zeros(3, np.float32))
        with pytest.raises(TypeError, match="`path` must be a str .* it is a NoneType"):
            stream.put_tree(None, {})
        stream.finish(partial=True)


def test_a_progress_that_raises_is_no_failure_of_the_device():
    def progress(done, total):
        if done > total // 2:
            raise RuntimeError("the user's")

    params = {"b": jnp.zeros(3), "c": jnp.zeros(4)}
    with pytest.raises(
        ReloadError, match=r"stopped by `progress`: the user's.*new: b\..*old: c\."
    ) as e:
        reload_params(params, {"b": jnp.ones(3), "c": jnp.ones(4)}, progress=progress)
    assert e.value.updated == ("b",) and e.value.failed == ()
    assert np.all(e.value.params["b"] == 1) and np.all(e.value.params["c"] == 0)


def test_a_float64_leaf_is_refused_before_anything_is_written_once_x64_is_off():
    with jax.enable_x64(True):
        wide = jnp.zeros(3, jnp.float64)
    for write in (reload_params, lambda params, loaded: reload_stream(params)):
        params = {"a": jnp.zeros(3), "d": wide}
        with pytest.raises(TypeError, match=r"d of `params` is float64, but jax_enable_x64 is off"):
            write(params, {"a": np.ones(3), "d": np.ones(3)})
        assert not params["a"].is_deleted() and np.all(params["a"] == 0)


@pytest.mark.parametrize("write", [update_params, reload_params])
def test_the_other_byte_order_is_refused_by_path(write):
    params = {"m": {"kernel": PaddedKernel.from_dense(weight(5, 7)), "b": jnp.zeros(3)}}
    loaded = {"m": {"kernel": weight(5, 7).astype(">f4"), "b": np.ones(3, ">f4")}}
    with pytest.raises(TypeError, match="(?s)m/b: .*byte order.*m/kernel: .*byte order"):
        write(params, loaded)
