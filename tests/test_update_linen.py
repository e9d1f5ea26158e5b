"""One model class trains and serves: the trainer's variables go into the served ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import addresses, assert_same_bits, weight

from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.quantize import FP8_DTYPE
from jaxfp8.update import dequantize_params, reload_params, trainable_mask, update_params


BOXED = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))


class Model(nn.Module):
    """A dense layer, a LayerNorm, and a stack of two scanned layers."""

    param_dtype: jnp.dtype = FP8_DTYPE
    static_x_scale: bool = False
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = BOXED if self.boxed else nn.initializers.lecun_normal()

        def dense(features, name=None):
            return PaddedFP8Dense(
                features,
                param_dtype=self.param_dtype,
                static_x_scale=self.static_x_scale,
                kernel_init=init,
                name=name,
            )

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + dense(x.shape[-1], name="dense")(x), None

        x = nn.LayerNorm()(dense(20, name="first")(x))
        scan = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return dense(7, name="head")(scan(name="blocks")(x, None)[0])


def variables(seed: int, **options):
    return Model(**options).init(jax.random.key(seed), jnp.ones((3, 18)))


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("static_x_scale", [False, True])
def test_trained_variables_into_served_ones(boxed, static_x_scale):
    """From one key both modes start from the same weights, so the update must give the init."""
    trained = variables(0, param_dtype=jnp.float32, boxed=boxed)
    served = variables(1, boxed=boxed, static_x_scale=static_x_scale)
    served = jax.tree.map(lambda a: a + 1 if a.ndim < 2 else a, served)
    updated = update_params(served, trained)
    stacked = nn.unbox(updated["params"]["blocks"]["dense"]["kernel"])
    assert isinstance(stacked, PaddedKernel) and stacked.stack == (2,)
    # `dequantize_params` leaves x_scale out; that one was 1 at init, and is kept.
    expected = dequantize_params(variables(0, boxed=boxed))
    assert_same_bits(dequantize_params(updated), expected)
    assert static_x_scale is ("x_scale" in updated["params"]["head"])
    if static_x_scale:
        assert updated["params"]["head"]["x_scale"] == 2.0
    where = addresses(updated)
    reloaded = reload_params(updated, nn.unbox(trained))
    assert addresses(reloaded) == where
    assert_same_bits(dequantize_params(reloaded), expected)


def test_abstract_variables():
    trained = variables(0, param_dtype=jnp.float32)
    assert_same_bits(update_params(jax.eval_shape(lambda: variables(1)), trained), variables(0))


@pytest.mark.parametrize("boxed", [False, True])
def test_dequantized_variables_run_in_the_trainer(boxed):
    served = variables(0, boxed=boxed)
    floats = dequantize_params(served)
    shapes = jax.eval_shape(lambda: variables(0, param_dtype=jnp.float32, boxed=boxed))
    assert jax.tree.structure(floats) == jax.tree.structure(shapes)
    assert jax.tree.map(jnp.shape, floats) == jax.tree.map(jnp.shape, shapes)
    x = weight(5, 18)
    # The float weights quantize to what they came from, up to the rounding of their scale.
    np.testing.assert_allclose(
        Model(param_dtype=jnp.float32, boxed=boxed).apply(floats, x),
        Model(boxed=boxed).apply(served, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_mask_of_a_model():
    mask = trainable_mask(variables(0, static_x_scale=True))["params"]
    assert mask["LayerNorm_0"] == {"scale": True, "bias": True}
    for layer in (mask["first"], mask["head"], mask["blocks"]["dense"]):
        assert layer["bias"] is True and layer["x_scale"] is False
        assert jax.tree.leaves(layer["kernel"]) == [False, False]
