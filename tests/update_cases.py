"""Trees and comparisons that the tests of updates and reloads share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8.padded import PaddedKernel


def devices() -> list[jax.Device]:
    """At least four: the default backend's, or on a machine of fewer GPUs the CPU's beside them."""
    own = jax.devices()
    return own if len(own) >= 4 else [*own, *jax.devices("cpu")]


def mesh_devices(count: int) -> list[jax.Device]:
    """So many of one kind: GPUs where there are enough, else the CPU's."""
    own = jax.devices()
    return (own if len(own) >= count else jax.devices("cpu"))[:count]


def owned(tree: Any) -> Any:
    """The same arrays, placed as they were, in buffers that XLA allocated.

    What `device_put` leaves on a CPU may be a view of host memory, whose donation is a copy (seen
    beside a GPU).
    """
    return jax.tree.map(lambda leaf: jax.jit(jnp.copy, out_shardings=leaf.sharding)(leaf), tree)


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 normals; no two seeds, and no matrix and its transpose, agree."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def trainer_tree(seed: int = 1) -> dict[str, Any]:
    """What a trainer has: two dense layers and a LayerNorm, numpy float32."""
    return {
        "Dense_0": {"kernel": weight(64, 100, seed=seed), "bias": weight(100, seed=seed)},
        "Dense_1": {"kernel": weight(100, 10, seed=seed), "bias": weight(10, seed=seed)},
        "LayerNorm_0": {"scale": weight(100, seed=seed), "bias": weight(100, seed=seed + 50)},
    }


def served_tree(seed: int = 0, *, per_channel: bool = True) -> dict[str, Any]:
    """The served form of `trainer_tree`, of other weights; the LayerNorm is bfloat16."""
    tree = jax.tree.map(jnp.array, trainer_tree(seed))
    for name in ("Dense_0", "Dense_1"):
        kernel = PaddedKernel.from_dense(tree[name]["kernel"], per_channel=per_channel)
        tree[name]["kernel"] = kernel
    tree["LayerNorm_0"] = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree["LayerNorm_0"])
    return tree


def host_bits(tree: Any) -> list[np.ndarray]:
    """The bytes of every leaf, copied, without leaving a numpy view on any buffer."""
    return [np.array(jnp.copy(leaf)).reshape(-1).view(np.uint8) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(left: Any, right: Any) -> None:
    """Same structure (logical sizes included), shapes, dtypes and bytes."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    for a, b in zip(host_bits(left), host_bits(right), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_padding_holds(kernel: PaddedKernel) -> None:
    """Invariant 1: outside the logical size, qvalue is +0 and the scale is 1."""
    k, n = kernel.in_features, kernel.out_features
    codes = np.array(jnp.copy(kernel.qvalue)).view(np.uint8)
    assert not codes[..., n:, :].any() and not codes[..., :, k:].any()
    if kernel.per_channel:
        np.testing.assert_array_equal(np.array(jnp.copy(kernel.scale))[..., n:], 1.0)


def addresses(tree: Any) -> list[int]:
    """Where every buffer lies, shard by shard."""
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    ]
