"""Models written without FP8, for the tests of post-training quantization."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


KEY = jax.random.key(0)
WIDTH, HIDDEN, VOCABULARY = 36, 100, 53
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 7))


def inputs(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


class Mlp(nn.Module):
    """Two dense layers of unaligned sizes; `dense` is nn.Dense, or what stands in for it."""

    dense: Any = nn.Dense
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        h = self.dense(HIDDEN, dtype=self.dtype, name="up")(x)
        return self.dense(WIDTH, dtype=self.dtype, use_bias=False, name="down")(nn.gelu(h))


class Transformer(nn.Module):
    """Embedding, attention of DenseGeneral, LayerNorms, an MLP, and logits of odd width."""

    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        h = nn.LayerNorm(name="before_attention")(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(h)
        x = x + Mlp(self.dense, name="mlp")(nn.LayerNorm(name="before_mlp")(x))
        return self.dense(VOCABULARY, name="logits")(x)


class Block(nn.Module):
    """A residual MLP as `nn.scan` wants it: (carry, x) -> (carry, y)."""

    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x, _=None):
        return x + Mlp(self.dense, name="mlp")(x), None


def scanned(length: int = 3, axis: int = 0, block: Any = Block, **fields: Any) -> nn.Module:
    """A stack of blocks whose parameters are stacked along `axis`."""
    return nn.scan(
        block, variable_axes={"params": axis}, split_rngs={"params": True}, length=length
    )(**fields)


class Autoencoder(nn.Module):
    """Layers made in `setup`, reached by methods of their own."""

    def setup(self):
        self.down = nn.Dense(20)
        self.up = nn.Dense(33)

    def encode(self, x):
        return nn.relu(self.down(x))

    def decode(self, z):
        return self.up(z)

    def __call__(self, x):
        return self.decode(self.encode(x))
