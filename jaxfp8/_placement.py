"""Where arrays lie: on one device or over a mesh, committed there or not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxfp8._explicit import typed_like
from jaxfp8._send import in_host_memory, put, unpinned


@dataclasses.dataclass(frozen=True)
class Spec:
    """All of an array that a compiled program depends on."""

    shape: tuple[int, ...]
    dtype: Any
    weak_type: bool
    committed: bool
    sharding: Sharding

    @staticmethod
    def of(array: jax.Array) -> Spec:
        aval = jax.typeof(array)
        return Spec(array.shape, array.dtype, aval.weak_type, array.committed, array.sharding)

    def abstract(self) -> jax.ShapeDtypeStruct:
        # A sharding given here commits the program's results, so an uncommitted array goes
        # without and the program is compiled for the device that it is on.
        return jax.ShapeDtypeStruct(
            self.shape,
            self.dtype,
            weak_type=self.weak_type,
            sharding=self.sharding if self.committed else None,
        )


@contextlib.contextmanager
def no_mesh() -> Iterator[None]:
    """Leave the mesh of `jax.set_mesh`, so that work is done where the arrays lie.

    Inside it, `jit` would compile for all devices of the mesh: it refuses an array that is on one
    of them, and commits results that were not committed.
    """
    with contextlib.ExitStack() as stack:
        if not jax.sharding.get_abstract_mesh().empty:
            # Under a trace JAX refuses; the mesh is then the concern of the function around.
            with contextlib.suppress(ValueError):
                stack.enter_context(jax.set_mesh(Mesh(np.empty((), object), ())))
        yield


def bring(array: Any, sharding: Sharding) -> jax.Array:
    """`device_put`, which takes ten times as long to find that nothing is to be done."""
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    return put(array, sharding)


def together(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays for one program: what is committed to other devices than the first is taken there."""
    if len(arrays) < 2:
        return tuple(arrays)
    placed = [a for a in arrays if isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer)]
    placed = [a for a in placed if a.committed]
    if len({_devices(a.sharding) for a in placed}) < 2:
        return tuple(arrays)
    where = placed[0].sharding
    return tuple(
        a
        if isinstance(a, jax.core.Tracer) or _devices(a.sharding) == _devices(where)
        else bring(a, replicated(where))
        for a in arrays
    )


def _devices(sharding: Sharding) -> tuple[Any, ...]:
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    return tuple(sharding.device_set)


def place_like(fresh: Any, target: Any) -> Any:
    """Bring a new array to where a parameter is committed, or where its abstract form says.

    Under a trace the places are not known, but those that Explicit axes put into its type.
    """
    if isinstance(fresh, jax.core.Tracer) or isinstance(target, jax.core.Tracer):
        return typed_like(fresh, target) if isinstance(target, jax.Array) else fresh
    sharding = getattr(target, "sharding", None)
    committed = not isinstance(target, jax.Array) or target.committed
    on_devices = not isinstance(getattr(sharding, "mesh", None), AbstractMesh)
    if sharding is None or not (committed and on_devices):
        return fresh
    return jax.device_put(fresh, sharding)


def devices_key(sharding: Sharding) -> Any:
    """Equal for arrays that one program can hold."""
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    return frozenset(sharding.device_set)


def is_explicit(sharding: Sharding) -> bool:
    """Whether an array's mesh has Explicit axes: then operations must say where results lie."""
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def replicated(sharding: Sharding) -> Sharding:
    """The whole array on each device of `sharding`."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def element_sharding(sharding: Sharding, leading: int) -> Sharding:
    """Where one element of a stack lies, whose first `leading` axes are those of the stack."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[leading:]))
    return sharding


def source_sharding(
    source: Any, target_sharding: Sharding, target_ndim: int, *, transposes: bool
) -> Sharding:
    """Where a loaded array has to be for the program that writes a parameter.

    On the parameter's own mesh it stays as it is. From elsewhere each device gets the part that it
    writes, or all of it where the mesh does not divide the logical size as it does the padded one.
    """
    if not isinstance(target_sharding, NamedSharding):
        return target_sharding
    mesh = target_sharding.mesh
    if isinstance(source, jax.Array) and isinstance(source.sharding, NamedSharding):
        if source.sharding.mesh == mesh:
            return unpinned(source.sharding) if in_host_memory(source) else source.sharding
    if source.ndim != target_ndim:
        return replicated(target_sharding)
    axes = [*target_sharding.spec, *[None] * (target_ndim - len(target_sharding.spec))]
    if transposes and target_ndim >= 2:
        axes[-2:] = axes[:-3:-1]
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    try:
        sharding.shard_shape(tuple(source.shape))
    except ValueError:
        return replicated(target_sharding)
    return sharding
