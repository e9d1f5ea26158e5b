"""Parameters that are alike, measured and written together; dense weights by the plugin's kernels.

Of Llama-3-8B's 225 dense layers in `[N, K]`, XLA and a call for each took 16.5 ms of the device and
54 by the host's clock; a kernel for each 10.6, one for up to 32 alike 9.2 (H200, 2026-11-23).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from jaxfp8 import _cutlass, _weights
from jaxfp8._accounting import Write
from jaxfp8._convert import Carry, Conversion, Copy, Quantize
from jaxfp8._devices import cuda_device, device_of, source_device, where_they_lie
from jaxfp8._placement import Spec, together
from jaxfp8.padded import Layout


if TYPE_CHECKING:
    from jaxtyping import Array, Bool

Arrays: TypeAlias = tuple[Any, ...]
Wanted: TypeAlias = tuple[int, ...]  # which arrays of a parameter
KERNEL_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


class Method(Protocol):
    """How parameters alike are measured and written; it is compiled in, so it can be hashed."""

    def __hash__(self) -> int: ...

    @property
    def transposes(self) -> bool:
        """Whether the loaded matrices are turned on their way."""

    @property
    def leading(self) -> int:
        """How many axes the parameter has before those that its sources have too."""

    @property
    def unchecked(self) -> bool:
        """Whether `measure` reads nothing."""

    def measure(self, sources: Sequence[Arrays]) -> tuple[Carry, Bool[Array, "parameters flags"]]:
        """What `write` needs to know of all sources, and for each the flags.

        These are [weights finite, scales valid].
        """

    def write(
        self, buffers: Sequence[Arrays], wanted: Wanted, carry: Carry, sources: Sequence[Arrays]
    ) -> tuple[Arrays, ...]:
        """The new content of each parameter's `buffers`, which are its arrays `wanted`."""


def replace(buffers: Sequence[Arrays], wanted: Wanted, fresh: Sequence[Arrays]) -> Any:
    """Whole buffers, written over with all arrays of each parameter."""
    # Written into the buffer, not returned in its place: that keeps a weak type weak.
    return tuple(
        tuple(b.at[...].set(new[i]) for b, i in zip(own, wanted, strict=True))
        for own, new in zip(buffers, fresh, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """Parameters that are converted in the same way, each by XLA."""

    conversion: Conversion
    leading = 0
    unchecked = False

    @property
    def transposes(self) -> bool:
        """Whether the loaded matrices are turned on their way."""
        return self.conversion.transposes

    def measure(self, sources: Sequence[Arrays]) -> tuple[Carry, Bool[Array, "parameters flags"]]:
        """The carries, one after another, and the flags of each."""
        results = [self.conversion.measure(*arrays) for arrays in sources]
        return sum((carry for carry, _ in results), ()), jnp.stack([flags for _, flags in results])

    def write(
        self, buffers: Sequence[Arrays], wanted: Wanted, carry: Carry, sources: Sequence[Arrays]
    ) -> tuple[Arrays, ...]:
        """The arrays `wanted` of each."""
        size = len(carry) // len(sources)
        fresh = [
            self.conversion.convert(carry[i * size : (i + 1) * size], *arrays)
            for i, arrays in enumerate(sources)
        ]
        return replace(buffers, wanted, fresh)


@dataclasses.dataclass(frozen=True)
class ByKernel:
    """`Quantize`, per channel, of several weights by one kernel each time, to the same bits.

    Attributes:
        layout: the orientation of the weights.
        unchecked: leave measuring to `convert`, which then needs no second read of the weights.
    """

    layout: Layout
    unchecked: bool
    leading = 0

    @property
    def transposes(self) -> bool:
        """Whether the loaded matrices are turned on their way."""
        return self.layout == "in_out"

    def measure(self, sources: Sequence[Arrays]) -> tuple[Carry, Bool[Array, "parameters flags"]]:
        """The scales of all weights, and whether each is finite: its scales tell."""
        if self.unchecked:
            return (), jnp.ones((len(sources), 2), bool)
        scale = _weights.weight_scale([w for (w,) in sources], layout=self.layout)
        finite = jnp.all(jnp.isfinite(scale), axis=tuple(range(1, scale.ndim)))
        return (scale,), jnp.stack([finite, jnp.ones_like(finite)], axis=-1)

    def write(
        self, buffers: Sequence[Arrays], wanted: Wanted, carry: Carry, sources: Sequence[Arrays]
    ) -> tuple[Arrays, ...]:
        """The arrays `wanted` of the padded qvalue and scale of each."""
        fresh = _weights.pad_weight([w for (w,) in sources], *carry, layout=self.layout)
        return replace(buffers, wanted, fresh)


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """What of the arrays that parameters are made from follows from their shapes and places.

    Attributes:
        nbytes: their bytes.
        device: the one device that programs read them on; None where they lie apart, or are still
            to be sent.
    """

    nbytes: int
    device: jax.Device | None


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Writes that one program does, and how; all have the shapes and placement of the first.

    Attributes:
        writes: the parameters.
        method: how they are measured and written.
        place: what `method.write` is told besides what was measured: where in the parameter.
        facts: what `known` gives, if it was found before.
    """

    writes: tuple[Write, ...]
    method: Method
    place: Carry = ()
    facts: Facts | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the parameters."""
        return tuple(write.name for write in self.writes)

    @property
    def sources(self) -> list[Any]:
        """The loaded arrays of all parameters."""
        return [source for write in self.writes for source in write.sources]

    @functools.cached_property
    def known(self) -> Facts:
        """What follows from their shapes and places."""
        if self.facts is not None:
            return self.facts
        devices = set(map(device_of, self.sources))
        device = devices.pop() if len(devices) == 1 else None
        return Facts(sum(source.nbytes for source in self.sources), device)

    @property
    def nbytes(self) -> int:
        """The bytes of these."""
        return self.known.nbytes

    @property
    def coming(self) -> list[Any]:
        """Of these, what may still have to be sent."""
        return self.sources if self.known.device is None else []

    @property
    def read(self) -> list[Any]:
        """Of these, what `measure` wants to have on a device."""
        return [] if self.method.unchecked else self.coming

    def measure(
        self, arrived: Iterator[jax.Array]
    ) -> tuple[Carry, Bool[Array, "parameters flags"]]:
        """The carry, and for each parameter the flags [weights finite, scales valid].

        Args:
            arrived: gives what `read` names, on devices; other bundles' may come after it.
        """
        if self.method.unchecked:
            return measure(self.method, ((),) * len(self.writes))
        if self.known.device is not None:
            with jax.default_device(self.known.device):
                return measure(self.method, tuple(write.sources for write in self.writes))
        sources = tuple(
            together(tuple(next(arrived) for _ in write.sources)) for write in self.writes
        )
        with where_they_lie([array for arrays in sources for array in arrays]):
            return measure(self.method, sources)


def bundles(writes: Sequence[Write], *, unchecked: bool = False) -> Iterator[Bundle]:
    """All writes, in the order in which each kind comes first.

    Args:
        unchecked: do not look for NaN and infinity where that saves a read of the weight.
    """
    kinds: dict[Any, list[Write]] = {}
    for index, write in enumerate(writes):
        method = _method(write, unchecked=unchecked)
        arrays = write.targets + write.sources
        together = _is_small(method) and cuda_device(arrays) is not None
        kind = tuple(map(Spec.of, arrays)) if together else index
        kinds.setdefault((method, kind), []).append(write)
    for (method, _), alike in kinds.items():
        for start in range(0, len(alike), _weights.MAX_WEIGHTS):
            yield Bundle(tuple(alike[start : start + _weights.MAX_WEIGHTS]), method)


def _method(write: Write, *, unchecked: bool) -> OneByOne | ByKernel:
    conversion = write.conversion
    if not (isinstance(conversion, Quantize) and conversion.per_channel):
        return OneByOne(conversion)
    (source,) = write.sources
    device = cuda_device(write.targets)
    if (
        device is None
        or source_device(source) != device
        or jax.dtypes.canonicalize_dtype(source.dtype) not in KERNEL_DTYPES
        or 0 in source.shape
        or math.prod(source.shape[:-2]) > _weights.MAX_STACK
        or _cutlass.problem() is not None
    ):
        return OneByOne(conversion)
    return ByKernel(conversion.layout, unchecked)


def _is_small(method: OneByOne | ByKernel) -> bool:
    # XLA's own programs for weights may want memory of the size of one.
    return isinstance(method, ByKernel) or isinstance(method.conversion, Copy)


@functools.partial(jax.jit, static_argnums=0)
def measure(
    method: Method, sources: Sequence[Arrays]
) -> tuple[Carry, Bool[Array, "parameters flags"]]:
    """`method.measure`, compiled."""
    return method.measure(sources)
