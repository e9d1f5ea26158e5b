"""The recipes for Orbax: a served tree there and back, and a dense checkpoint into a padded model.

`test_serialization.py` holds what Orbax does with a PaddedKernel itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from update_cases import addresses, assert_padding_holds, assert_same_bits, owned

from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.update import reload_params, update_params


class Model(nn.Module):
    """Two layers of unaligned sizes and a norm; a scan over three more."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = PaddedFP8Dense(20, param_dtype=self.param_dtype, static_x_scale=True, name="up")(x)
        x = nn.LayerNorm(name="norm")(x)
        stacked = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = stacked(PaddedFP8Dense(20, param_dtype=self.param_dtype, name="h"), x, None)
        return PaddedFP8Dense(10, param_dtype=self.param_dtype, name="out")(x)


X = jnp.ones((2, 18), jnp.bfloat16)


def init(param_dtype: Any, seed: int) -> Any:
    return Model(param_dtype).init(jax.random.key(seed), X)


def save(path: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def restore(path: Path, abstract: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract)


def test_a_served_model_there_and_back(tmp_path):
    served = init(jnp.float8_e4m3fn, 0)
    path = save(tmp_path / "served", served)
    restored = restore(path, jax.eval_shape(lambda: init(jnp.float8_e4m3fn, 1)))
    assert_same_bits(restored, served)
    assert_padding_holds(restored["params"]["h"]["kernel"])
    y = Model(jnp.float8_e4m3fn).apply(restored, X)
    np.testing.assert_array_equal(y, Model(jnp.float8_e4m3fn).apply(served, X))


def test_what_was_restored_can_be_reloaded_in_place(tmp_path):
    served = init(jnp.float8_e4m3fn, 0)
    # Orbax's arrays may be numpy's memory on a CPU, whose donation is a copy.
    restored = owned(restore(save(tmp_path / "served", served), served))
    before = addresses(restored)
    trained = init(jnp.float32, 2)
    reloaded = reload_params(restored, trained)
    assert addresses(reloaded) == before
    assert_same_bits(reloaded, update_params(init(jnp.float8_e4m3fn, 0), trained))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["arrays", "abstract"])
def test_a_dense_checkpoint_into_a_padded_model(dtype, kind, tmp_path):
    # Restored as what it is, a float tree; `update_params` pads and quantizes.
    trained = init(dtype, 0)
    path = save(tmp_path / "trained", trained)
    float_tree = jax.eval_shape(lambda: init(dtype, 1))
    loaded = restore(path, float_tree)
    served = init(jnp.float8_e4m3fn, 1)
    if kind == "abstract":  # x_scale, which no trainer has, needs a value.
        x_scale = served["params"]["up"]["x_scale"]
        served = jax.eval_shape(lambda: served)
        served["params"]["up"]["x_scale"] = x_scale
    params = update_params(served, loaded)["params"]
    for name in ("up", "h", "out"):
        dense = trained["params"][name]["kernel"]
        assert_same_bits(params[name]["kernel"], PaddedKernel.from_dense(dense))
    np.testing.assert_array_equal(params["norm"]["scale"], trained["params"]["norm"]["scale"])
    assert float(params["up"]["x_scale"]) == 1


def test_a_dense_checkpoint_into_a_padded_template_is_refused_by_orbax(tmp_path):
    path = save(tmp_path / "trained", init(jnp.float32, 0))
    with pytest.raises(ValueError, match="kernel"):
        restore(path, init(jnp.float8_e4m3fn, 1))
