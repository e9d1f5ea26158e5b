"""What `reload_params` remembers of a pair of trees: its structure, never its arrays."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from update_cases import addresses, assert_same_bits, mesh_devices, weight

from jaxfp8 import DenseWeight, KernelShards, PaddedKernel, _plan
from jaxfp8.update import reload_params, update_params


@pytest.fixture(autouse=True)
def _nothing_remembered():
    _plan._plans.clear()
    yield
    _plan._plans.clear()


@pytest.fixture
def accounts(monkeypatch):
    """One entry for each time that two trees are paired."""
    calls, account = [], _plan.account

    def counted(*args, **kwargs):
        calls.append(args)
        return account(*args, **kwargs)

    monkeypatch.setattr(_plan, "account", counted)
    return calls


def served(dtype=jnp.float32):
    return {
        "a": {"kernel": PaddedKernel.from_dense(jnp.zeros((24, 40))), "bias": jnp.zeros(40, dtype)},
        "b": {"kernel": PaddedKernel.from_dense(jnp.zeros((24, 40)))},
        "c": jnp.zeros((3, 5), dtype),
    }


def trained(seed, dtype=jnp.float32):
    key = iter(range(10 * seed, 10 * seed + 10))
    return jax.tree.map(
        lambda shape: jnp.asarray(weight(*shape, seed=next(key)), dtype),
        {"a": {"kernel": (24, 40), "bias": (40,)}, "b": {"kernel": (24, 40)}, "c": (3, 5)},
        is_leaf=lambda node: isinstance(node, tuple),
    )


def test_the_same_trees_are_paired_once_and_get_each_time_the_new_values(accounts):
    params = served()
    where = addresses(params)
    for seed in range(4):
        loaded = trained(seed)
        params = reload_params(params, loaded)
        assert_same_bits(params, update_params(served(), loaded))
    assert len(accounts) == 1 and addresses(params) == where


def test_no_array_is_kept():
    params, loaded = served(), trained(1)
    arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves((params, loaded))]
    params = reload_params(params, loaded)
    del loaded
    arrays += [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    del params
    gc.collect()
    assert len(_plan._plans) == 1 and not [array for array in arrays if array() is not None]


def test_arrays_are_taken_from_their_own_paths(accounts):
    """One array at two paths, and then, with the same shapes, two."""
    tied = jnp.asarray(weight(24, 40))
    loaded = trained(1)
    loaded["a"]["kernel"] = loaded["b"]["kernel"] = tied
    params = reload_params(served(), loaded)
    loaded = trained(2)
    params = reload_params(params, loaded)
    assert_same_bits(params, update_params(served(), loaded))
    loaded["a"]["kernel"], loaded["b"]["kernel"] = loaded["b"]["kernel"], loaded["a"]["kernel"]
    params = reload_params(params, loaded)
    assert_same_bits(params, update_params(served(), loaded))
    assert len(accounts) == 1


@pytest.mark.parametrize("place", ["params", "loaded"])
@pytest.mark.parametrize("what", ["dtype", "shape", "weak type", "layout", "structure"])
def test_other_trees_are_paired_anew(accounts, place, what):
    params, loaded = served(), trained(1)
    params = reload_params(params, loaded)
    tree = params if place == "params" else loaded
    if what == "dtype":
        tree["c"] = jnp.ones((3, 5), jnp.float16)
    elif what == "shape":
        params["c"], loaded["c"] = jnp.ones((5, 3)), jnp.full((5, 3), 2.0)
    elif what == "weak type":
        tree["c"] = jnp.full((3, 5), 1.0)
        assert tree["c"].weak_type
    elif what == "layout":
        loaded["b"]["kernel"] = DenseWeight(loaded["b"]["kernel"].T, "out_in")
    else:
        params["d"], loaded["d"] = jnp.zeros(2), jnp.ones(2)
    dtypes = [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(params)]
    expected = update_params(params, loaded)
    updated = reload_params(params, loaded)
    assert_same_bits(updated, expected)
    assert [(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(updated)] == dtypes
    assert len(accounts) == 2


def test_other_options_are_another_plan(accounts):
    params, loaded = served(), trained(1)
    params = reload_params(params, loaded)
    broken = {**loaded, "c": jnp.full((3, 5), jnp.nan, jnp.float32)}
    with pytest.raises(ValueError, match="NaN or infinite"):
        reload_params(params, broken)
    params = reload_params(params, broken, allow_nonfinite=True)
    assert np.all(np.isnan(params["c"]))
    fewer = {"a": loaded["a"], "head": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"Missing in `loaded` \(2\).*\n.*head"):
        reload_params(params, fewer)
    for _ in range(2):
        params = reload_params(params, fewer, partial=True, ignore="head")
    with pytest.raises(ValueError, match="Missing"):
        reload_params(params, fewer, ignore="head")
    with pytest.raises(ValueError, match="Unexpected"):
        reload_params(params, fewer, partial=True)
    assert len(accounts) == 6


def test_deleted_arrays_are_still_named():
    first, loaded = served(), trained(1)
    params = reload_params(first, loaded)
    with pytest.raises(ValueError, match=r"c: the parameter in `params` is deleted"):
        reload_params(first, loaded)
    loaded["c"].delete()
    with pytest.raises(ValueError, match=r"c: the value is deleted"):
        reload_params(params, loaded)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_buffers_that_are_shared_only_the_second_time_are_refused():
    params, loaded = served(), trained(1)
    params["d"] = jnp.zeros((3, 5))
    loaded["d"] = jnp.ones((3, 5))
    params = reload_params(params, loaded)
    params["d"] = params["c"]
    with pytest.raises(ValueError, match="share a buffer.*c and d"):
        reload_params(params, loaded)
    assert not params["c"].is_deleted()


def test_placed_arrays_are_another_plan(accounts):
    mesh = jax.make_mesh((2,), ("x",), devices=mesh_devices(2), axis_types=(AxisType.Auto,))
    params, loaded = served(), trained(1)
    params = reload_params(params, loaded)
    spread = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, spread), served())
    for _ in range(2):
        placed = reload_params(placed, loaded)
    assert all(leaf.sharding == spread for leaf in jax.tree.leaves(placed))
    for device in mesh_devices(2):
        committed = jax.device_put(served(), device)
        for _ in range(2):
            committed = reload_params(committed, loaded)
        assert all(leaf.committed and leaf.device == device for leaf in jax.tree.leaves(committed))
        assert_same_bits(placed, committed)
    assert len(accounts) == 4


def test_trees_of_the_host_are_looked_at_each_time(accounts):
    params = served()
    for seed in range(2):
        loaded = jax.tree.map(np.asarray, trained(seed))
        params = reload_params(params, loaded)
        assert_same_bits(params, update_params(served(), loaded))
    assert len(accounts) == 2 and not _plan._plans


def test_fused_weights_are_remembered_too(accounts):
    def shards(seed):
        q, k = (jnp.asarray(weight(24, n, seed=seed + n)) for n in (21, 19))
        return {"qkv": KernelShards({"q": q, "k": k}, {"q": 21, "k": 19})}

    params = {"qkv": PaddedKernel.from_dense(jnp.zeros((24, 40)))}
    for seed in range(3):
        params = reload_params(params, shards(seed))
        assert_same_bits(params, update_params(params, shards(seed)))
    assert len(accounts) == 1


def test_only_so_many_are_remembered():
    for width in range(1, _plan.REMEMBERED + 4):
        reload_params({"w": jnp.zeros(width)}, {"w": jnp.ones(width)})
    assert len(_plan._plans) == _plan.REMEMBERED
    assert _plan._plans[0].params.avals[0].shape == (_plan.REMEMBERED + 3,)


def test_a_trace_is_refused_though_the_trees_are_known():
    params, loaded = served(), trained(1)
    params = reload_params(params, loaded)
    with pytest.raises(TypeError, match="is traced|cannot run under jit"):
        jax.jit(lambda tree: reload_params(params, tree))(loaded)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@jax.tree_util.register_pytree_node_class
class _Annotated:
    """A node whose metadata numpy refuses to call equal or not."""

    def __init__(self, value):
        self.value = value

    def tree_flatten(self):
        return (self.value,), np.arange(3)

    @classmethod
    def tree_unflatten(cls, metadata, children):
        return cls(*children)


def test_trees_that_cannot_be_compared_are_paired_each_time(accounts):
    params = {"a": _Annotated(jnp.zeros(3))}
    for value in (1.0, 2.0):
        params = reload_params(params, {"a": _Annotated(jnp.full(3, value, jnp.float32))})
        assert np.all(params["a"].value == value)
    assert len(accounts) == 2 and not _plan._plans


def test_the_plans_used_last_are_kept(accounts):
    """A model that is reloaded again and again stays, whatever else is reloaded beside it."""
    params = reload_params(served(), trained(0))
    for width in range(1, _plan.REMEMBERED + 4):
        reload_params({"w": jnp.zeros(width)}, {"w": jnp.ones(width)})
        params = reload_params(params, trained(width))
    assert len(accounts) == _plan.REMEMBERED + 4
    assert len(_plan._plans) == _plan.REMEMBERED
