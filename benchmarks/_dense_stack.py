"""A stack of dense layers, one after another: in FP8, and as nn.Dense has it in bfloat16."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import _mlp
from jaxfp8.linen import PaddedFP8Dense


class DenseStack(nn.Module):
    """`x[M, widths[0]] -> [M, widths[-1]]`, a dense layer with a bias for each pair of neighbours.

    Attributes:
        widths: the features before, between and after the layers.
        kind: "fp8" is PaddedFP8Dense, "bf16" nn.Dense.
    """

    widths: tuple[int, ...]
    kind: str

    @nn.compact
    def __call__(self, x):
        for index, features in enumerate(self.widths[1:]):
            name = f"dense_{index}"
            if self.kind == "fp8":
                x = PaddedFP8Dense(features, name=name)(x)
            else:
                x = nn.Dense(features, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, name=name)(x)
        return x


def widths(sizes: tuple[int, int], layers: int) -> tuple[int, ...]:
    """The widths of a stack of `layers`, of which every other one is of each of two `sizes`."""
    return tuple(sizes[i % 2] for i in range(layers + 1))


def dense_params(sizes: tuple[int, ...]) -> dict[str, Any]:
    """The tree of a bfloat16 stack of these widths; `_mlp.fp8_layers` gives that of an FP8 one."""
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    make = jax.jit(_mlp.dense_layer, static_argnums=(1, 2))
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return {f"dense_{i}": make(key, k, n) for i, (key, k, n) in enumerate(pairs)}
