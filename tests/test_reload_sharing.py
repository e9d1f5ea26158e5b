"""reload_params and memory that more than one tree holds; and errors half way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import (
    addresses,
    assert_same_bits,
    host_bits,
    served_tree,
    trainer_tree,
    weight,
)

import jaxfp8._donate
from jaxfp8.padded import PaddedKernel
from jaxfp8.update import ReloadError, reload_params, update_params


def snapshot(tree):
    return jax.tree.structure(tree), addresses(tree), host_bits(tree)


def assert_untouched(tree, before) -> None:
    """Alive, where it was, with the bits it had."""
    structure, where, bits = before
    assert jax.tree.structure(tree) == structure
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))
    assert addresses(tree) == where
    for now, then in zip(host_bits(tree), bits, strict=True):
        np.testing.assert_array_equal(now, then)


def on_device(tree):
    return jax.tree.map(jnp.array, tree)


def test_tied_leaves_of_the_trainer_stay_tied_and_alive():
    table = jnp.asarray(weight(30, 8))
    loaded = {"embed": table, "head": table, "norm": jnp.ones(8)}
    before = snapshot(loaded)
    params = {"embed": jnp.zeros((30, 8)), "head": jnp.zeros((30, 8)), "norm": jnp.zeros(8)}
    where = addresses(params)
    for _ in range(3):
        params = reload_params(params, loaded)
        assert_untouched(loaded, before)
        assert loaded["embed"] is loaded["head"]
    assert addresses(params) == where
    assert_same_bits(params, loaded)


def test_tied_leaves_of_params_are_refused_with_both_paths():
    table = jnp.zeros((30, 8))
    params = {"embed": table, "head": table, "norm": jnp.zeros(8)}
    before = snapshot(params)
    loaded = {"embed": weight(30, 8), "head": weight(30, 8, seed=1), "norm": weight(8)}
    with pytest.raises(ValueError, match=r"share a buffer.*embed and head.*jnp\.copy"):
        reload_params(params, loaded)
    with pytest.raises(ValueError, match="embed and head"):  # The kept one would be deleted.
        reload_params(params, {"embed": weight(30, 8)}, partial=True)
    assert_untouched(params, before)
    updated = reload_params(params, {"norm": weight(8)}, partial=True)
    assert updated["embed"] is updated["head"]
    separate = reload_params(jax.tree.map(jnp.copy, updated), loaded)
    np.testing.assert_array_equal(separate["head"], loaded["head"])


def test_two_arrays_over_one_buffer_are_tied_too():
    table = jnp.zeros((30, 8)) + 0
    other = jax.device_put(table, table.sharding, may_alias=True)
    assert other is not table and addresses(other) == addresses(table)
    with pytest.raises(ValueError, match="a and b"):
        reload_params({"a": table, "b": other}, {"a": weight(30, 8), "b": weight(30, 8)})


def test_a_tree_reloaded_with_itself():
    params = served_tree()
    before = snapshot(params)
    updated = reload_params(params, params)
    assert_untouched(params, before)
    assert_same_bits(updated, params)
    assert not set(addresses(updated)) & set(addresses(params))


def test_leaves_that_params_took_from_the_trainer_are_given_back():
    """A served tree built with the trainer's own LayerNorm: it moves once, and then stays."""
    loaded = on_device(trainer_tree())
    params = served_tree()
    params["LayerNorm_0"] = dict(loaded["LayerNorm_0"])
    before = snapshot(loaded)
    where = addresses({k: params[k] for k in ("Dense_0", "Dense_1")})
    params = reload_params(params, loaded)
    assert_untouched(loaded, before)
    assert addresses({k: params[k] for k in ("Dense_0", "Dense_1")}) == where
    assert not set(addresses(params)) & set(addresses(loaded))
    where = addresses(params)
    params = reload_params(params, loaded)
    assert addresses(params) == where
    assert_untouched(loaded, before)


def test_buffers_shared_across_different_paths():
    """`a` of params is `b` of loaded and the reverse: written in turn, one would be lost."""
    x, y = jnp.asarray(weight(40)), jnp.asarray(weight(40, seed=1))
    updated = reload_params({"a": x, "b": y}, {"a": y, "b": x})
    np.testing.assert_array_equal(updated["a"], weight(40, seed=1))
    np.testing.assert_array_equal(updated["b"], weight(40))
    assert not x.is_deleted() and not y.is_deleted()


def test_an_ignored_leaf_of_the_trainer_is_not_destroyed():
    shared = jnp.ones(40)
    updated = reload_params({"a": shared}, {"a": weight(40), "ema": {"a": shared}}, ignore=("ema",))
    np.testing.assert_array_equal(updated["a"], weight(40))
    np.testing.assert_array_equal(shared, np.ones(40))


def test_a_numpy_view_of_a_served_buffer_keeps_its_values():
    """On CPU `np.asarray` is a view. XLA then writes elsewhere: right values, another address."""
    params = {"a": jnp.zeros(4096), "b": jnp.zeros(4096)}
    where = addresses(params)
    view = np.asarray(params["a"])
    updated = reload_params(params, {"a": weight(4096), "b": weight(4096, seed=1)})
    assert not view.any()
    np.testing.assert_array_equal(jnp.copy(updated["a"]), weight(4096))
    assert addresses(updated["b"]) == where[1:]


def test_numpy_arrays_may_be_overwritten_after_the_call():
    size = 512
    memory = np.empty(size * size + 16, np.float32)
    start = (-memory.ctypes.data % 64) // 4  # XLA reads aligned memory where it lies.
    w = memory[start : start + size * size].reshape(size, size)
    fresh = PaddedKernel.from_dense(weight(size, size))
    params = jax.tree.map(jnp.copy, {"kernel": fresh, "plain": jnp.zeros((size, size))})
    for _ in range(5):
        w[:] = weight(size, size)
        params = reload_params(params, {"kernel": w, "plain": w})
        w[:] = np.nan
        assert_same_bits(params["kernel"], fresh)
        assert not jnp.isnan(params["plain"]).any()


def test_a_deleted_tree_is_named():
    params, loaded = served_tree(), on_device(trainer_tree())
    current = reload_params(params, loaded)
    for function in (reload_params, update_params):
        with pytest.raises(
            ValueError,
            match=r"(?s)Dense_0/kernel: the parameter in `params` is "
            r"deleted.*Use the tree which that call returned",
        ):
            function(params, loaded)
    before = snapshot(current)
    loaded["Dense_1"]["bias"].delete()
    for function in (reload_params, update_params):
        with pytest.raises(ValueError, match="Dense_1/bias: the value is deleted"):
            function(current, loaded)
    assert_untouched(current, before)


class DeviceFailure(RuntimeError):
    """Stands for what XLA raises when memory runs out."""


def failing_from(count: int):
    """`jaxfp8._donate._compile` whose programs fail from the `count`-th run on."""
    compile_write, runs = jaxfp8._donate._compile, []

    def compile_failing(*key):
        program = compile_write(*key)

        def run(*arguments):
            runs.append(key)
            if len(runs) > count:
                raise DeviceFailure("RESOURCE_EXHAUSTED: out of memory")
            return program(*arguments)

        return run

    return compile_failing


@pytest.mark.usefixtures("no_plans")
def test_a_device_error_names_the_leaves_already_new(monkeypatch):
    params, loaded = served_tree(), on_device(trainer_tree())
    expected, before = update_params(params, loaded), snapshot(loaded)
    monkeypatch.setattr(jaxfp8._donate, "_compile", failing_from(3))
    with pytest.raises(ReloadError, match="RESOURCE_EXHAUSTED") as caught:
        reload_params(params, loaded)
    error = caught.value
    assert error.updated == ("Dense_0/bias", "Dense_0/kernel", "Dense_1/bias")
    assert error.failed == ("Dense_1/kernel",)
    assert "Already new: Dense_0/bias, Dense_0/kernel, Dense_1/bias." in str(error)
    assert "Still old: LayerNorm_0/bias, LayerNorm_0/scale." in str(error)
    assert isinstance(error.__cause__, DeviceFailure)
    assert_untouched(loaded, before)
    # Nothing is lost: the tree in the error is half new, and reloading it completes it.
    assert_same_bits(error.params["Dense_0"], expected["Dense_0"])
    assert error.params["LayerNorm_0"]["bias"] is params["LayerNorm_0"]["bias"]
    monkeypatch.undo()
    assert_same_bits(reload_params(error.params, loaded), expected)


@pytest.mark.usefixtures("no_plans")
def test_an_error_while_compiling_changes_nothing(monkeypatch):
    params = served_tree()
    before = snapshot(params)

    def broken(*key):
        raise DeviceFailure("no compiler")

    monkeypatch.setattr(jaxfp8._donate, "_compile", broken)
    with pytest.raises(DeviceFailure):
        reload_params(params, trainer_tree())
    assert_untouched(params, before)
