"""New content written into the buffers of the old, by programs compiled ahead of time.

Plain `jit` does not keep a served function from recompiling: a committed input commits the result,
and arrays that pass through move. A program compiled from shapes, with donation and
`keep_unused=True`, keeps shape, dtype, weak type, sharding, committed-ness and address.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding, auto_axes

from jaxfp8._accounting import Write, entries, path_name
from jaxfp8._bundles import Bundle, Method
from jaxfp8._convert import Carry
from jaxfp8._placement import (
    Spec,
    bring,
    devices_key,
    is_explicit,
    replicated,
    source_sharding,
)


Arrays = tuple[jax.Array, ...]
# (buffers of each parameter, carry, sources of each) -> buffers of each; the first donated.
Program = Callable[[tuple[Arrays, ...], Carry, tuple[Arrays, ...]], tuple[Arrays, ...]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled write, of one parameter or of several alike.

    Attributes:
        bundle: the parameters.
        slots: where the arrays of each lie in the flattened `params`.
        program: what writes them.
        carry: what `measure` computed.
        carry_shardings, source_shardings: where the program wants these; the latter of each.
    """

    bundle: Bundle
    slots: tuple[tuple[int, ...], ...]
    program: Program
    carry: Carry
    carry_shardings: tuple[Sharding, ...]
    source_shardings: tuple[Sharding, ...]

    def run(self, leaves: list[Any], shared: set[Buffer]) -> None:
        """Write the new content into `leaves`; buffers in `shared` are replaced instead."""
        buffers = tuple(tuple(_own(leaves[i], shared) for i in slots) for slots in self.slots)
        carry = tuple(map(bring, self.carry, self.carry_shardings))
        sources = tuple(
            tuple(map(bring, write.sources, self.source_shardings)) for write in self.bundle.writes
        )
        with jax.disable_jit(False):  # JAX refuses to run compiled programs under disable_jit.
            fresh = self.program(buffers, carry, sources)
        for slots, arrays in zip(self.slots, fresh, strict=True):
            for slot, array in zip(slots, arrays, strict=True):
                leaves[slot] = array


def _own(leaf: jax.Array, shared: set[Buffer]) -> jax.Array:
    return leaf.copy() if addresses(leaf) & shared else leaf


def steps(bundle: Bundle, carry: Carry) -> list[Step]:
    """Compile a bundle: one program, or more if the arrays of a parameter lie apart."""
    first = bundle.writes[0]
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
            source_sharding(source, where, ndim, transposes=bundle.method.transposes)
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
        result.append(Step(bundle, slots, program, carry, carry_shardings, source_shardings))
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


def addresses(leaf: Any) -> set[Buffer]:
    """Device and address of each buffer of an array; empty for what has none to overwrite."""
    if (
        not isinstance(leaf, jax.Array)
        or isinstance(leaf, jax.core.Tracer)
        or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        or leaf.is_deleted()
        or leaf.size == 0
    ):
        return set()
    if isinstance(leaf.sharding, SingleDeviceSharding):  # The same, at a third of the time.
        device: Any = next(iter(leaf.sharding.device_set))
        return {(device.id, leaf.unsafe_buffer_pointer())}
    shards = (shard.data for shard in leaf.addressable_shards)
    return {(shard.device.id, shard.unsafe_buffer_pointer()) for shard in shards}


def check_donatable(params: Any, writes: Sequence[Write]) -> None:
    """Check that the arrays to be written can be overwritten, and harm no other leaf.

    Raises:
        TypeError: if one is traced, abstract or a numpy array.
        ValueError: if it shares a buffer with another leaf, or its sharding is not supported.
    """
    for write in writes:
        for target in write.targets:
            _check_buffer(write.name, target)
    held = [buffer for leaf in jax.tree.leaves(params) for buffer in addresses(leaf)]
    if len(set(held)) == len(held):
        return
    owners: dict[Buffer, list[str]] = {}
    for path, entry in entries(params).items():
        for leaf in jax.tree.leaves(entry.node):
            for buffer in addresses(leaf):
                owners.setdefault(buffer, []).append(path_name(path))
    written = {write.name for write in writes}
    tied = {tuple(names) for names in owners.values() if len(names) > 1 and written & {*names}}
    if tied:
        listed = "; ".join(" and ".join(names) for names in sorted(tied))
        raise ValueError(
            f"leaves of `params` share a buffer, and nothing has been changed: {listed}. Writing "
            "one would delete the other. Give each its own, for example with "
            "`jax.tree.map(jnp.copy, params)`, or use `update_params`."
        )


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
    if not isinstance(target.sharding, SingleDeviceSharding | NamedSharding):
        raise ValueError(
            f"{name} of `params` has a {type(target.sharding).__name__}, but `reload_params` "
            "keeps only single-device and named shardings. Place it with "
            "`jax.device_put(leaf, NamedSharding(mesh, spec))`, or use `update_params`."
        )
