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


class ScannedDenseStack(nn.Module):
    """The same in FP8 as an unrolled `nn.scan` over pairs of layers: few arrays, one for many.

    XLA gives the custom call the place of a layer in the stack, and copies none of the weights.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        pairs = len(self.widths) // 2
        scan = nn.scan(
            lambda pair, x, _: (pair(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=pairs,
            unroll=pairs,
        )
        x, _ = scan(DenseStack(self.widths[:3], "fp8", name="pairs"), x, None)
        return x


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """The tree of a DenseStack as a ScannedDenseStack has it."""
    each = [(params[f"dense_{i}"], params[f"dense_{i + 1}"]) for i in range(0, len(params), 2)]
    first, second = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return {"pairs": {"dense_0": first, "dense_1": second}}


def widths(sizes: tuple[int, int], layers: int) -> tuple[int, ...]:
    """The widths of a stack of `layers`, of which every other one is of each of two `sizes`."""
    return tuple(sizes[i % 2] for i in range(layers + 1))


def dense_params(sizes: tuple[int, ...]) -> dict[str, Any]:
    """The tree of a bfloat16 stack of these widths; `_mlp.fp8_layers` gives that of an FP8 one."""
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    make = jax.jit(_mlp.dense_layer, static_argnums=(1, 2))
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return {f"dense_{i}": make(key, k, n) for i, (key, k, n) in enumerate(pairs)}
