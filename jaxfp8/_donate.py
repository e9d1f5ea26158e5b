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
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from jaxfp8._accounting import Write, entries, path_name
from jaxfp8._convert import Carry, Conversion
from jaxfp8._placement import bring, devices_key, replicated, source_sharding


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


Program = Callable[[tuple[jax.Array, ...], Carry, tuple[jax.Array, ...]], tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled write.

    Attributes:
        write: the parameter that it belongs to.
        slots: where its arrays lie in the flattened `params`.
        program: `(buffers, carry, sources) -> buffers`, the first donated.
        carry: what `measure` computed.
        carry_shardings, source_shardings: where the program wants these.
    """

    write: Write
    slots: tuple[int, ...]
    program: Program
    carry: Carry
    carry_shardings: tuple[Sharding, ...]
    source_shardings: tuple[Sharding, ...]

    def run(self, buffers: tuple[jax.Array, ...], shared: set[Buffer]) -> tuple[jax.Array, ...]:
        """Write the new content; buffers in `shared` are replaced instead of overwritten."""
        buffers = tuple(b.copy() if addresses(b) & shared else b for b in buffers)
        carry = tuple(map(bring, self.carry, self.carry_shardings))
        sources = tuple(map(bring, self.write.sources, self.source_shardings))
        with jax.disable_jit(False):  # JAX refuses to run compiled programs under disable_jit.
            return self.program(buffers, carry, sources)


def steps(write: Write, carry: Carry) -> list[Step]:
    """Compile the writes of one parameter: one program, or more if its arrays lie apart."""
    groups: dict[Any, list[int]] = {}
    specs = [Spec.of(target) for target in write.targets]
    for index, spec in enumerate(specs):
        groups.setdefault((spec.committed, devices_key(spec.sharding)), []).append(index)
    result = []
    for wanted in map(tuple, groups.values()):
        targets = tuple(specs[index] for index in wanted)
        where, ndim = targets[0].sharding, len(targets[0].shape)
        carry_shardings = tuple(replicated(where) for _ in carry)
        source_shardings = tuple(
            source_sharding(source, where, ndim, transposes=write.conversion.transposes)
            for source in write.sources
        )
        program = _compile(
            write.conversion,
            wanted,
            targets,
            _input_specs(carry, carry_shardings, targets[0].committed),
            _input_specs(write.sources, source_shardings, targets[0].committed),
        )
        slots = tuple(write.slots.start + index for index in wanted)
        result.append(Step(write, slots, program, carry, carry_shardings, source_shardings))
    return result


@functools.cache
def _compile(
    conversion: Conversion,
    wanted: tuple[int, ...],
    targets: tuple[Spec, ...],
    carry: tuple[Spec, ...],
    sources: tuple[Spec, ...],
) -> Program:
    def write(buffers: Any, carry: Carry, sources: Any) -> tuple[jax.Array, ...]:
        fresh = conversion.convert(carry, *sources)
        # Written into the buffer, not returned in its place: that keeps a weak type weak.
        return tuple(b.at[...].set(fresh[i]) for b, i in zip(buffers, wanted, strict=True))

    arguments = [tuple(spec.abstract() for spec in group) for group in (targets, carry, sources)]
    if targets[0].committed:
        out_shardings = tuple(spec.sharding for spec in targets)
        jitted = jax.jit(write, donate_argnums=0, keep_unused=True, out_shardings=out_shardings)
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
