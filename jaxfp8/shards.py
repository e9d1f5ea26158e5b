"""The named row blocks of a fused parameter, such as q, k and v of one `qkv` kernel."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class KernelShards:
    """A fused weight in its pieces, as a checkpoint without the fusion holds them.

    Equivalent JAX, for float shards in `[*stack, K, n]`: the one weight
    `jnp.concatenate([shards[name] for name in sizes], axis=-1)`; that array is never made. Each
    shard may be of its own kind, and have its own per-tensor scale, which becomes the per-channel
    scale of its rows without any rounding. Of a bias the shards are `[*stack, n]`.

    Attributes:
        shards: name to weight: a float array, a DenseWeight, an FP8Weight or a PaddedKernel of n
            output features. All of `sizes` must be there; to write some of them, see
            `reload_stream` and `update_rows`.
        sizes: name to n, in the order of the fused parameter's rows. Static.
    """

    shards: Mapping[str, Any]
    sizes: Mapping[str, int]


def bounds(sizes: Mapping[str, int], features: int) -> dict[str, tuple[int, int]]:
    """Start and stop of each shard's rows, in a parameter of `features` output features.

    Raises:
        TypeError: if `sizes` is not a mapping of names to ints.
        ValueError: if a size is below 1, or the sizes do not add up to `features`.
    """
    if not isinstance(sizes, Mapping) or not all(map(_is_size, sizes.values())):
        raise TypeError(
            "the sizes of shards must be a mapping of names to ints, such as "
            f'{{"q": 4096, "k": 1024, "v": 1024}}, but they are {sizes!r}.'
        )
    stops = list(itertools.accumulate(sizes.values(), initial=0))
    if any(n < 1 for n in sizes.values()) or stops[-1] != features:
        raise ValueError(
            f"the sizes of its shards are {dict(sizes)}, together {stops[-1]}, but it has "
            f"{features} output features. Give the logical number of rows of every shard, in "
            "their order."
        )
    return dict(zip(sizes, itertools.pairwise(stops), strict=True))


def _flatten_with_keys(node: KernelShards):
    return ((jax.tree_util.GetAttrKey("shards"), node.shards),), tuple(node.sizes.items())


def _flatten(node: KernelShards):
    return (node.shards,), tuple(node.sizes.items())


def _unflatten(sizes, children) -> KernelShards:
    return KernelShards(children[0], dict(sizes))


jax.tree_util.register_pytree_with_keys(KernelShards, _flatten_with_keys, _unflatten, _flatten)


def _is_size(size: object) -> bool:
    return isinstance(size, int | np.integer) and not isinstance(size, bool)
