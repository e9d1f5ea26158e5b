"""New content written into the buffers of the old, by programs compiled ahead of time.

Plain `jit` does not keep a served function from recompiling: a committed input commits the result,
and arrays that pass through move. A program compiled from shapes, with donation and
`keep_unused=True`, keeps shape, dtype, weak type, sharding, committed-ness and address.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Sharding, auto_axes

from jaxfp8._buffers import Buffer, addresses
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

    @property
    def wanted(self) -> list[tuple[Any, Sharding]]:
        """The sources that are to be brought to where the program reads them, and where that is."""
        if self.prepared.settled:
            return []
        where = self.prepared.source_shardings
        return [
            pair for write in self.bundle.writes for pair in zip(write.sources, where, strict=True)
        ]

    def run(self, leaves: list[Any], shared: set[Buffer], arrived: Iterator[jax.Array]) -> None:
        """Write the new content into `leaves`; buffers in `shared` are replaced instead.

        Args:
            leaves: of the flattened `params`.
            shared: buffers that others hold too.
            arrived: gives what `wanted` names, there; other steps' may come after it.
        """
        here = self.prepared
        buffers = tuple(tuple(_own(leaves[i], shared) for i in slots) for slots in here.slots)
        carry = tuple(map(bring, self.carry, here.carry_shardings))
        sources = tuple(write.sources for write in self.bundle.writes)
        if not here.settled:
            sources = tuple(tuple(next(arrived) for _ in arrays) for arrays in sources)
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
