"""Checkpoints of a padded tree: what comes back, and that other logical sizes never do."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.core import FrozenDict, freeze

from jaxfp8.padded import PaddedKernel


# The PyTree checkpointer takes no shardings from its template and says that reading them costs.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


def tree(k: int, n: int, *, stack: tuple = (), per_channel: bool = True, seed: int = 0) -> dict:
    w = np.random.default_rng(seed).normal(size=(*stack, k, n)).astype(np.float32)
    kernel = PaddedKernel.from_dense(w, per_channel=per_channel)
    bias = jnp.arange(float(n)) * jnp.ones((*stack, 1))
    return {"params": {"Dense_0": {"kernel": kernel, "bias": bias}}, "step": jnp.int32(seed)}


def assert_same(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def msgpack(saved, template, path):
    return serialization.from_bytes(template, serialization.to_bytes(saved))


def state_dict(saved, template, path):
    return serialization.from_state_dict(template, serialization.to_state_dict(saved))


def orbax_standard(saved, template, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "standard", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "standard", template)


def orbax_pytree(saved, template, path):
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(path / "pytree", saved)
    return checkpointer.restore(path / "pytree", item=template)


WAYS = pytest.mark.parametrize("restore", [msgpack, state_dict, orbax_standard, orbax_pytree])


@WAYS
@pytest.mark.parametrize(
    "options",
    [{}, {"per_channel": False}, {"stack": (3,)}, {"stack": (3,), "per_channel": False}],
    ids=["one", "per tensor", "stack", "stack per tensor"],
)
def test_round_trip_is_bit_for_bit(restore, options, tmp_path):
    saved = tree(18, 20, **options)
    template = tree(18, 20, seed=1, **options)
    assert_same(restore(saved, template, tmp_path), saved)


@WAYS
@pytest.mark.parametrize(("k", "n"), [(20, 20), (18, 18), (20, 18)], ids=str)
def test_other_logical_sizes_are_refused_with_both_named(restore, k, n, tmp_path):
    # All of these have qvalue [32, 32] and scale [32]: only the logical sizes differ.
    saved, template = tree(18, 20), tree(k, n)
    template["params"]["Dense_0"]["bias"] = saved["params"]["Dense_0"]["bias"]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(t)] for t in (saved, template)]
    assert shapes[0] == shapes[1]
    before = jax.device_get(jax.tree.leaves(template))
    with pytest.raises(ValueError) as caught:
        restore(saved, template, tmp_path)
    message = str(caught.value)
    if restore in (msgpack, state_dict):
        assert "in_features=18, out_features=20" in message
        assert f"in_features={k}, out_features={n}" in message
    else:  # Orbax's own error; the sizes are in the names of the leaves
        assert "qvalue_18x20" in message and f"qvalue_{k}x{n}" in message
    for a, b in zip(before, jax.device_get(jax.tree.leaves(template)), strict=True):
        assert a.tobytes() == b.tobytes()


def test_an_abstract_template_is_enough_for_orbax(tmp_path):
    saved = tree(18, 20)
    abstract = jax.eval_shape(lambda: saved)
    assert_same(orbax_standard(saved, abstract, tmp_path), saved)
    with pytest.raises(ValueError, match="qvalue_20x20.*qvalue_18x20"):
        orbax_standard(saved, jax.eval_shape(lambda: tree(20, 20)), tmp_path / "other")


def test_flax_messages_carry_the_sizes_without_a_template():
    state = serialization.msgpack_restore(serialization.to_bytes(tree(18, 20)))
    kernel = state["params"]["Dense_0"]["kernel"]
    assert (kernel["format_version"], kernel["in_features"], kernel["out_features"]) == (1, 18, 20)
    assert kernel["qvalue"].dtype == jnp.float8_e4m3fn and kernel["qvalue"].shape == (32, 32)


def test_frozen_dicts_round_trip():
    saved = freeze(tree(18, 20))
    restored = msgpack(saved, freeze(tree(18, 20, seed=1)), None)
    assert isinstance(restored, FrozenDict)
    assert_same(restored, saved)


def test_another_format_version_is_refused():
    state = serialization.to_state_dict(tree(18, 20))
    state["params"]["Dense_0"]["kernel"]["format_version"] = 2
    with pytest.raises(ValueError, match="format version 2, but this jaxfp8 reads version 1"):
        serialization.from_state_dict(tree(18, 20), state)


def test_a_dense_checkpoint_is_refused_with_the_remedy():
    # What a trainer saved: a float kernel where the served tree has a padded one.
    dense = {"params": {"Dense_0": {"kernel": np.ones((18, 20)), "bias": np.ones(20)}}, "step": 0}
    with pytest.raises(ValueError, match=r"it is ndarray.*`update_params\(params, loaded\)`"):
        serialization.from_bytes(tree(18, 20), serialization.to_bytes(dense))


@pytest.mark.parametrize(
    ("options", "leaf", "shapes"),
    [
        ({"per_channel": False}, "scale", r"\(\), but the target's has \(32,\)"),
        ({"stack": (2,)}, "qvalue", r"\(2, 32, 32\), but the target's has \(32, 32\)"),
    ],
    ids=["per tensor", "stack"],
)
def test_another_scale_kind_or_stack_is_refused(options, leaf, shapes):
    saved = tree(18, 20, **options)
    with pytest.raises(ValueError, match=f"whose `.{leaf}_18x20` has shape {shapes}"):
        serialization.from_bytes(tree(18, 20), serialization.to_bytes(saved))
