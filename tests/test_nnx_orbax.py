"""An nnx.State of padded layers goes through Orbax, and not into one of another logical size."""

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from nnx_cases import inputs, served
from update_cases import assert_same_bits

from jaxfp8.nnx import WEIGHTS, PaddedFP8Linear, reload_model
from jaxfp8.padded import PaddedKernel


def checkpoint(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def restore(path, template):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, template)


def test_orbax_saves_and_restores_a_state(tmp_path):
    model = served()
    state = nnx.state(model, WEIGHTS)
    checkpoint(tmp_path / "state", state)
    template = nnx.eval_shape(lambda: served(1))
    restored = restore(tmp_path / "state", nnx.state(template, WEIGHTS))
    assert_same_bits(restored, state)
    other = served(1)
    nnx.update(other, restored)
    assert_same_bits(other(inputs(2, 20)), model(inputs(2, 20)))


def test_orbax_refuses_a_state_of_another_logical_size(tmp_path):
    """18 and 20 both pad to 32: the padded shapes agree."""
    state = nnx.state(PaddedFP8Linear(20, 30, use_bias=False, rngs=nnx.Rngs(0)))
    checkpoint(tmp_path / "state", state)
    other = nnx.state(PaddedFP8Linear(18, 30, use_bias=False, rngs=nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, jax.tree.leaves(state)) == jax.tree.map(
        jnp.shape, jax.tree.leaves(other)
    )
    with pytest.raises(ValueError, match="20x30|18x30"):
        restore(tmp_path / "state", other)


def test_a_state_restored_without_its_types_is_explained(tmp_path):
    dense = nnx.Linear(20, 30, rngs=nnx.Rngs(0))
    checkpoint(tmp_path / "state", nnx.state(dense))
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(tmp_path / "state")
    model = PaddedFP8Linear(20, 30, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"end in 'value'.*nnx\.eval_shape"):
        reload_model(model, plain)
    restored = restore(
        tmp_path / "state", nnx.state(nnx.eval_shape(lambda: nnx.Linear(20, 30, rngs=nnx.Rngs(2))))
    )
    reload_model(model, restored)
    want = PaddedKernel.from_dense(dense.kernel.get_value())
    assert_same_bits(nnx.state(model, WEIGHTS)["kernel"].get_value(), want)
