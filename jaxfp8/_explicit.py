"""Operands on a mesh of Explicit axes: each device works on the rows and features that it has.

There an array's type says how it is split (`jax.typeof(a).sharding`), and every operation has to
say it of its result. A custom call cannot, so it runs on each device's own part, in a `shard_map`
that follows from the types: nothing is gathered but what a `jnp.dot` of the same types would.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


# The mesh axes that split an axis of an array.
Axes: TypeAlias = str | tuple[str, ...] | None


def axes_of(array: Any) -> tuple[Axes, ...]:
    """The Explicit mesh axes that split each axis of an array; all None on any other mesh."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (jnp.ndim(array) - len(spec))


@dataclasses.dataclass(frozen=True)
class Split:
    """How a product is divided among devices, by rows and by output features.

    Attributes:
        mesh: with Explicit axes, and perhaps others, which are left alone.
        lead: what splits each leading axis of x.
        features: what splits the output features.
    """

    mesh: AbstractMesh
    lead: tuple[Axes, ...]
    features: Axes

    @property
    def result(self) -> PartitionSpec:
        """Of a result with a row for each of x."""
        return PartitionSpec(*self.lead, self.features)

    def of_rows(self, a: Any) -> PartitionSpec:
        """Of x, whose features are whole on each device, and of its scales; of a scalar."""
        return PartitionSpec(*self.lead, None) if jnp.ndim(a) else PartitionSpec()

    def of_features(self, a: Any) -> PartitionSpec:
        """Of what has an output feature for each element of its first axis; of a scalar."""
        return PartitionSpec(self.features, *(None,) * (a.ndim - 1)) if a.ndim else PartitionSpec()

    def run(self, f: Callable, args: tuple, specs: tuple, out_specs: Any) -> Any:
        """`f(*args)` of each device's part, brought there first where it lies otherwise."""
        args = jax.tree.map(self.bring, specs, args, is_leaf=_is_spec)
        used = _names((*self.lead, self.features))
        if not used:
            return f(*args)
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=specs, out_specs=out_specs, axis_names=frozenset(used)
        )(*args)

    def bring(self, spec: PartitionSpec, tree: Any) -> Any:
        """The arrays of a tree, split so; brought there where they lie otherwise."""

        def one(a: Any) -> Any:
            if axes_of(a) == tuple(spec):
                return a
            return jax.reshard(a, NamedSharding(self.mesh, spec))

        return jax.tree.map(one, tree)


def split_of(x: Any, weight: Any = None, *, name: str = "", features_axis: int = 0) -> Split | None:
    """How the types of `x` `[*lead, K]` and a weight divide their product; None: not at all.

    As `jnp.dot` has it: rows as x is split, output features as the weight is, and K of the one
    operand is gathered where only the other's is whole.

    Args:
        x: `[*lead, K]`.
        weight: `[N, K]`, or `[K, N]`; or None, where x alone is quantized.
        name: the weight's, for messages.
        features_axis: which of its axes is N.

    Raises:
        ValueError: if K is split in both, or one mesh axis is to split rows and features.
    """
    if not jnp.ndim(x):  # the operation refuses it
        return None
    *lead, own = axes_of(x)
    features, contracted = None, None
    if weight is not None:
        axes = axes_of(weight)
        features, contracted = axes[features_axis], axes[1 - features_axis]
    if own is not None and contracted is not None:
        raise ValueError(
            f"The input features must be whole in `x` or in `{name}`, but the mesh axes {own!r} "
            f"split them in x, and {contracted!r} in `{name}`: partial products would have to be "
            "summed over devices. Gather one of the two with `jax.reshard`, or call the layer "
            "inside `jax.shard_map` and sum its results with `jax.lax.psum`."
        )
    split = (*lead, features)
    used = _names(split)
    if len(set(used)) < len(used):
        raise ValueError(
            f"The result of `x` and `{name}` would be split by {PartitionSpec(*split)}, but a mesh "
            f"axis can split only one of its axes. Reshard `{name}` or `x` with `jax.reshard`."
        )
    if not used and own is None and contracted is None:
        return None
    meshes = (jax.typeof(a).sharding.mesh for a in (x, weight) if a is not None)
    return Split(next(mesh for mesh in meshes if not mesh.empty), tuple(lead), features)


def check_divides(a: Any, axis: int, size: int, name: str) -> None:
    """Refuse to cut or pad an axis to a size that the Explicit axes which split it do not divide.

    Raises:
        ValueError: if they do not.
    """
    axes = axes_of(a)[axis]
    devices = _count(jax.typeof(a).sharding.mesh, axes)
    if size % devices:
        raise ValueError(
            f"`{name}` is split over {devices} devices by the mesh axes {axes!r}, which divide "
            f"the {a.shape[axis]} features that it has but not the {size} of the result, and with "
            "Explicit axes a type cannot say that. Gather it with `jax.reshard`, make the axes "
            "Auto with `jax.sharding.auto_axes`, or work on each device's part in `jax.shard_map`."
        )


def first(a: Any, size: int, axis: int, name: str) -> jax.Array:
    """The first `size` along an axis, split as before.

    Raises:
        ValueError: if that cannot be.
    """
    check_divides(a, axis, size, name)
    return lax.slice_in_dim(a, 0, size, axis=axis % a.ndim)


def whole_features(a: Any) -> Any:
    """`a` with its last axis whole on each device."""
    axes = axes_of(a)
    if not axes or axes[-1] is None:
        return a
    mesh = jax.typeof(a).sharding.mesh
    return jax.reshard(a, NamedSharding(mesh, PartitionSpec(*axes[:-1], None)))


def whole(a: Any) -> Any:
    """`a`, which may be None, with every axis whole: beside operands that nothing splits."""
    if a is None or not any(axes_of(a)):
        return a
    return jax.reshard(a, NamedSharding(jax.typeof(a).sharding.mesh, PartitionSpec()))


def typed_like(a: Any, like: Any) -> Any:
    """`a` split as the type of `like` says, if that is of Explicit axes."""
    axes = axes_of(like)
    if axes == axes_of(a):
        return a
    sharding = jax.typeof(like).sharding
    return a if sharding.mesh.empty else jax.reshard(a, sharding)


def over_batch(f: Callable, axis_size: int, in_batched: list, args: tuple) -> Any:
    """`f(axis_size, in_batched, *args)` of each device's part of a batch that Explicit axes split.

    `f` returns arrays whose first axis is the batch's. None where nothing splits it.
    """
    flags, leaves = jax.tree.leaves(in_batched), jax.tree.leaves(args)
    split = [a for a, batched in zip(leaves, flags, strict=True) if batched and axes_of(a)[0]]
    if not split:
        return None
    batch, mesh = axes_of(split[0])[0], jax.typeof(split[0]).sharding.mesh
    here = axis_size // _count(mesh, batch)
    structure = jax.tree.structure(args)
    specs = [
        PartitionSpec(*((batch if batched else None,) + (None,) * jnp.ndim(a))[: jnp.ndim(a)])
        for a, batched in zip(leaves, flags, strict=True)
    ]

    def local(*leaves: Any) -> Any:
        return f(here, in_batched, *jax.tree.unflatten(structure, leaves))

    by_batch = Split(mesh, (batch,), None)
    return by_batch.run(local, tuple(leaves), tuple(specs), PartitionSpec(batch))


def _count(mesh: AbstractMesh, axes: Axes) -> int:
    """The number of parts."""
    return math.prod(mesh.shape[name] for name in _names((axes,)))


def _names(axes: tuple[Axes, ...]) -> list[str]:
    """The mesh axes that occur."""
    return [
        name
        for entry in axes
        if entry is not None
        for name in ((entry,) if isinstance(entry, str) else entry)
    ]


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
