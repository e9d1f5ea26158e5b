"""New content written into the buffers of the old, by programs compiled ahead of time.

Plain `jit` does not keep a served function from recompiling: a committed input commits the result,
and arrays that pass through move. A program compiled from shapes, with donation and
`keep_unused=True`, keeps shape, dtype, weak type, sharding, committed-ness and address.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding, auto_axes

from jaxfp8._accounting import Write, entries, path_name
from jaxfp8._bundles import Bundle, Facts, Method
from jaxfp8._convert import Carry
from jaxfp8._placement import (
    Spec,
    bring,
    devices_key,
    element_sharding,
    is_explicit,
    replicated,
    source_sharding,
)


Arrays = tuple[jax.Array, ...]
# (buffers of each parameter, carry, sources of each) -> buffers of each; the first donated.
Program = Callable[[tuple[Arrays, ...], Carry, tuple[Arrays, ...]], tuple[Arrays, ...]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What of a Step follows from shapes and places.

    Attributes:
        slots: where the arrays of each parameter lie in the flattened `params`.
        program: what writes them.
        carry_shardings, source_shardings: where the program wants these; the latter of each.
        settled: whether the sources are there.
    """

    slots: tuple[tuple[int, ...], ...]
    program: Program
    carry_shardings: tuple[Sharding, ...]
    source_shardings: tuple[Sharding, ...]
    settled: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled write, of one parameter or of several alike.

    Attributes:
        bundle: the parameters.
        carry: what `measure` computed.
        prepared: all else.
    """

    bundle: Bundle
    carry: Carry
    prepared: Prepared

    @property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Where the arrays of each parameter lie in the flattened `params`."""
        return self.prepared.slots

    @property
    def program(self) -> Program:
        """What writes them."""
        return self.prepared.program

    def run(self, leaves: list[Any], shared: set[Buffer]) -> None:
        """Write the new content into `leaves`; buffers in `shared` are replaced instead."""
        here = self.prepared
        buffers = tuple(tuple(_own(leaves[i], shared) for i in slots) for slots in here.slots)
        carry = tuple(map(bring, self.carry, here.carry_shardings))
        sources = tuple(write.sources for write in self.bundle.writes)
        if not here.settled:
            sources = tuple(tuple(map(bring, arrays, here.source_shardings)) for arrays in sources)
        with jax.disable_jit(False):  # JAX refuses to run compiled programs under disable_jit.
            fresh = self.program(buffers, carry, sources)
        for slots, arrays in zip(here.slots, fresh, strict=True):
            for slot, array in zip(slots, arrays, strict=True):
                leaves[slot] = array


def _own(leaf: jax.Array, shared: set[Buffer]) -> jax.Array:
    return leaf.copy() if shared and not shared.isdisjoint(addresses(leaf)) else leaf


def steps(bundle: Bundle, carry: Carry) -> list[Step]:
    """Compile a bundle: one program, or more if the arrays of a parameter lie apart.

    Args:
        bundle: the parameters.
        carry: what `bundle.measure` gave.
    """
    carry = (*bundle.place, *carry)
    found = None if bundle.facts is None else _prepared.get(bundle.facts)
    if found is None:
        found = _prepare(bundle, carry)
        if bundle.facts is not None:
            _prepared[bundle.facts] = found
    return [Step(bundle, carry, prepared) for prepared in found]


# Of bundles whose facts are remembered, with a plan.
_prepared: weakref.WeakKeyDictionary[Facts, list[Prepared]] = weakref.WeakKeyDictionary()


def _prepare(bundle: Bundle, carry: Carry) -> list[Prepared]:
    first, leading = bundle.writes[0], bundle.method.leading
    groups: dict[Any, list[int]] = {}
    specs = [Spec.of(target) for target in first.targets]
    for index, spec in enumerate(specs):
        groups.setdefault((spec.committed, devices_key(spec.sharding)), []).append(index)
    result = []
    for wanted in map(tuple, groups.values()):
        targets = tuple(specs[index] for index in wanted)
        where, ndim = targets[0].sharding, len(targets[0].shape)
        carry_shardings = tuple(replicated(where) for _ in carry)
        source_shardings = tuple(
            source_sharding(
                source,
                element_sharding(where, leading),
                ndim - leading,
                transposes=bundle.method.transposes,
            )
            for source in first.sources
        )
        program = _compile(
            bundle.method,
            len(bundle.writes),
            wanted,
            targets,
            _input_specs(carry, carry_shardings, targets[0].committed),
            _input_specs(first.sources, source_shardings, targets[0].committed),
        )
        slots = tuple(tuple(w.slots.start + index for index in wanted) for w in bundle.writes)
        settled = bundle.known.device is not None and all(
            source.sharding == sharding
            for write in bundle.writes
            for source, sharding in zip(write.sources, source_shardings, strict=True)
        )
        result.append(Prepared(slots, program, carry_shardings, source_shardings, settled))
    return result


@functools.cache
def _compile(
    method: Method,
    count: int,
    wanted: tuple[int, ...],
    targets: tuple[Spec, ...],
    carry: tuple[Spec, ...],
    sources: tuple[Spec, ...],
) -> Program:
    def write(buffers: Any, carry: Carry, sources: Any) -> tuple[Arrays, ...]:
        return method.write(buffers, wanted, carry, sources)

    def abstract(specs: tuple[Spec, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(spec.abstract() for spec in specs)

    arguments: Any = ((abstract(targets),) * count, abstract(carry), (abstract(sources),) * count)
    if targets[0].committed:
        out_shardings = (tuple(spec.sharding for spec in targets),) * count
        # Explicit axes would have every operation named where its result lies.
        placed = (
            auto_axes(write, out_sharding=out_shardings)
            if is_explicit(targets[0].sharding)
            else write
        )
        jitted = jax.jit(placed, donate_argnums=0, keep_unused=True, out_shardings=out_shardings)
        return jitted.lower(*arguments).compile()
    # Given shardings commit the results, so uncommitted arrays must go without.
    with jax.default_device(next(iter(targets[0].sharding.device_set))):
        return jax.jit(write, donate_argnums=0, keep_unused=True).lower(*arguments).compile()


def _input_specs(
    arrays: tuple[Any, ...], shardings: tuple[Sharding, ...], committed: bool
) -> tuple[Spec, ...]:
    return tuple(
        Spec(tuple(a.shape), jax.dtypes.canonicalize_dtype(a.dtype), False, committed, sharding)
        for a, sharding in zip(arrays, shardings, strict=True)
    )


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
