"""Which memory arrays have, and whether it can be overwritten without harm to others."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxfp8._accounting import Write, entries, path_name


Buffer = tuple[int, int]


@functools.cache
def _is_extended(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


@functools.cache
def _is_concrete(kind: Any) -> bool:
    return issubclass(kind, jax.Array) and not issubclass(kind, jax.core.Tracer)


def addresses(*leaves: Any) -> list[Buffer]:
    """Device and address of each buffer of some arrays; none of what has none to overwrite."""
    found = []
    for leaf in leaves:
        kind: Any = type(leaf)
        if (
            not _is_concrete(kind)
            or _is_extended(leaf.dtype)
            or leaf.is_deleted()
            or 0 in leaf.shape
        ):
            continue
        sharding = leaf.sharding
        if isinstance(sharding, SingleDeviceSharding):  # The same, at a third of the time.
            device: Any = next(iter(sharding.device_set))
            found.append((device.id, leaf.unsafe_buffer_pointer()))
            continue
        shards = (shard.data for shard in leaf.addressable_shards)
        found += [(shard.device.id, shard.unsafe_buffer_pointer()) for shard in shards]
    return found


def check_writable(writes: Sequence[Write]) -> None:
    """Check that the arrays to be written are of a kind that can be overwritten.

    Raises:
        TypeError: if one is traced, abstract or a numpy array.
        ValueError: if its sharding is not supported.
    """
    for write in writes:
        for target in write.targets:
            _check_buffer(write.name, target)


def check_unshared(params: Any, writes: Iterable[Write]) -> set[Buffer]:
    """Check that writing harms no other leaf of `params`, and give the buffers of them all.

    Args:
        params: the tree.
        writes: what is to be overwritten.

    Raises:
        ValueError: if one of them shares a buffer with another leaf.
    """
    held = addresses(*jax.tree.leaves(params))
    if len(distinct := set(held)) == len(held):
        return distinct
    owners: dict[Buffer, list[tuple[int, str]]] = {}
    for path, entry in entries(params).items():
        for leaf in jax.tree.leaves(entry.node):
            for buffer in addresses(leaf):
                owners.setdefault(buffer, []).append((entry.slots.start, path_name(path)))
    written = {write.slots.start for write in writes}
    tied = {
        tuple(name for _, name in owning)
        for owning in owners.values()
        if len(owning) > 1 and any(start in written for start, _ in owning)
    }
    if tied:
        listed = "; ".join(" and ".join(names) for names in sorted(tied))
        raise ValueError(
            f"leaves of `params` share a buffer, and nothing has been changed: {listed}. Writing "
            "one would delete the other. Give each its own, for example with "
            "`jax.tree.map(jnp.copy, params)`, or use `update_params`."
        )
    return distinct


def _check_buffer(name: str, target: Any) -> None:
    if isinstance(target, jax.core.Tracer):
        raise TypeError(
            f"{name} of `params` is traced: `reload_params` overwrites buffers and cannot run "
            "under jit, vmap or grad. Use `update_params` there, with `donate_argnums` on your "
            "jit if memory is short."
        )
    if not isinstance(target, jax.Array):
        raise TypeError(
            f"{name} of `params` is a {type(target).__name__}, so there is no device buffer to "
            "write into. Make the tree once with `update_params` or `jax.device_put`, then "
            "reload it."
        )
    if not _is_extended(target.dtype):
        dtype = jax.dtypes.canonicalize_dtype(target.dtype)
        if dtype != target.dtype:
            raise TypeError(
                f"{name} of `params` is {target.dtype}, but jax_enable_x64 is off, so no program "
                f"can write more than {dtype}. Reload it within `jax.enable_x64(True)`."
            )
    if not isinstance(target.sharding, SingleDeviceSharding | NamedSharding):
        raise ValueError(
            f"{name} of `params` has a {type(target.sharding).__name__}, but `reload_params` "
            "keeps only single-device and named shardings. Place it with "
            "`jax.device_put(leaf, NamedSharding(mesh, spec))`, or use `update_params`."
        )
