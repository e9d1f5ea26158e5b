"""The NNX models that the tests of jaxfp8.nnx share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from update_cases import weight

from jaxfp8.nnx import PaddedFP8Linear


class Block(nnx.Module):
    """Two dense layers of unaligned width and a LayerNorm; `linear` makes the layers."""

    def __init__(self, linear: Any, rngs: nnx.Rngs):
        self.up = linear(20, 30, rngs=rngs)
        self.norm = nnx.LayerNorm(30, rngs=rngs)
        self.down = linear(30, 20, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(self.norm(self.up(x)))


class Net(nnx.Module):
    """Two blocks in a list, a BatchNorm and a Dropout: Variables of every kind."""

    def __init__(self, linear: Any = nnx.Linear, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([Block(linear, rngs) for _ in range(2)])
        self.batch = nnx.BatchNorm(20, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return self.drop(self.batch(x))


def served(seed: int = 0) -> Net:
    """A Net whose dense layers are in FP8."""
    return Net(PaddedFP8Linear, seed)


def inputs(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Normals, of which no two rows agree."""
    return jnp.asarray(weight(*shape, seed=9)).astype(dtype)
