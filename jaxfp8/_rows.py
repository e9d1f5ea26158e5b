"""Some rows of a parameter written, and the rest left as it is, to the bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import auto_axes

from jaxfp8._accounting import unbox
from jaxfp8._bundles import Arrays, OneByOne, Wanted, measure
from jaxfp8._convert import Carry, Conversion
from jaxfp8._leaf import check_target
from jaxfp8._placement import (
    bring,
    is_explicit,
    no_mesh,
    place_like,
    source_sharding,
)
from jaxfp8._send import put
from jaxfp8._shards import logical_rows, plan_rows, rows_of
from jaxfp8.padded import PaddedKernel


if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32


@no_mesh()
def update_rows(kernel: PaddedKernel, start: int, weight: Any) -> PaddedKernel:
    """`kernel` with new weights for `rows` of its output features, from `start` on.

    Equivalent JAX, for a float weight `[*stack, K, rows]`, were kernels not padded:
    `w.at[..., start : start + rows].set(weight)` and `PaddedKernel.from_dense(w)`. The rows' scales
    are computed from `weight`; other rows keep their bits, and the padding is written anew. Pure
    and traceable; in place it is `reload_stream(...).put(path, weight, shard=name)`.

    Args:
        kernel: per channel; one layer's or a stack.
        start: the first row, of N. Any, aligned or not.
        weight: what `update_params` takes for a kernel of `rows` output features: a float array
            `[*stack, K, rows]`, a DenseWeight, an FP8Weight (either layout) or a PaddedKernel.

    Raises:
        TypeError: if `weight` cannot be a weight, or `start` is not an int.
        ValueError: if it does not fit, reaches past N, holds a NaN or an infinity (where concrete)
            or a scale that is not positive; or if `kernel` has one scale per tensor.
    """
    weight = unbox(weight)
    if not isinstance(kernel, PaddedKernel):
        raise TypeError(f"`kernel` must be a PaddedKernel, but it is a {type(kernel).__name__}.")
    if not isinstance(start, int | np.integer):
        raise TypeError(f"`start` must be an int, but it is a {type(start).__name__}.")
    check_target(kernel)
    rows, n = rows_of(weight), kernel.out_features
    conversion, sources = plan_rows(kernel, n if rows is None else rows, weight)
    if rows is None or rows < 1 or start < 0 or start + rows > n:
        raise ValueError(
            f"`weight` has {rows} rows and `start` is {start}, but the kernel has rows 0 to {n}. "
            "Give a start from 0 on, and rows that end within the kernel."
        )
    old = (kernel.qvalue, kernel.scale)
    # What comes from the host or another device is put here outright, for `jax.transfer_guard`.
    place, *arrived = (_brought(s, kernel.qvalue, conversion) for s in (np.int32(start), *sources))
    sources = tuple(arrived)
    carry, flags = measure(OneByOne(conversion), [sources])
    if not isinstance(flags, jax.core.Tracer) and not jax.device_get(flags).all():
        raise ValueError(
            "`weight` holds a NaN or an infinity, or a scale that is not positive, finite and at "
            "least 2^-126. Look for a diverged training step or a damaged checkpoint."
        )
    write: Any = functools.partial(_write, conversion, (0, 1), rows, n)
    if _is_committed(kernel.qvalue) and is_explicit(kernel.qvalue.sharding):
        write = auto_axes(write, out_sharding=tuple(a.sharding for a in old))
        fresh = jax.jit(write)(old, (place, *carry), sources)
    else:
        fresh = _update(conversion, (0, 1), rows, n, old, (place, *carry), sources)
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(weight)):
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in fresh):
            jax.block_until_ready(fresh)  # Then the host's array may be overwritten.
    qvalue, scale = map(place_like, fresh, old)
    return PaddedKernel(qvalue, scale, kernel.in_features, n)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a parameter, as a method of `_bundles`.

    Where they begin is the first array of `write`'s carry, so that shards of one size share a
    program; `measure` does not give it.

    Attributes:
        conversion: how the rows are made.
        rows: how many.
        features: the logical rows of the parameter.
    """

    conversion: Conversion
    rows: int
    features: int
    leading = 0
    unchecked = False

    @property
    def transposes(self) -> bool:
        """Whether the loaded matrix is turned on its way."""
        return self.conversion.transposes

    def measure(self, sources: Sequence[Arrays]) -> tuple[Carry, Bool[Array, "parameters flags"]]:
        """Of the rows alone."""
        return OneByOne(self.conversion).measure(sources)

    def write(
        self, buffers: Sequence[Arrays], wanted: Wanted, carry: Carry, sources: Sequence[Arrays]
    ) -> tuple[Arrays, ...]:
        """The parameter with its rows from `carry[0]` on written."""
        ((own,), (arrays,)) = (buffers, sources)
        return (_write(self.conversion, wanted, self.rows, self.features, own, carry, arrays),)


def _write(
    conversion: Conversion,
    wanted: tuple[int, ...],
    rows: int,
    features: int,
    buffers: tuple[Array, ...],
    carry: tuple[Int32[Array, ""], ...],
    sources: tuple[Array, ...],
) -> tuple[Array, ...]:
    """The arrays `wanted` of a parameter with its rows from `carry[0]` on written."""
    start, *scales = carry
    converted = conversion.convert(tuple(scales), *sources)
    is_kernel = len(converted) == 2
    fresh = logical_rows(converted, rows, is_kernel=is_kernel)
    result = []
    for buffer, index in zip(buffers, wanted, strict=True):
        # Rows are the last axis, but of a qvalue [*stack, N_pad, K_pad] the last but one.
        axis = buffer.ndim - (2 if is_kernel and index == 0 else 1)
        new = lax.dynamic_update_slice_in_dim(buffer, fresh[index], start, axis)
        if is_kernel and features < buffer.shape[axis]:
            shape = list(buffer.shape)
            shape[axis] -= features
            padding = jnp.full(shape, index, buffer.dtype)  # 0 in the qvalue, 1 in the scale.
            new = lax.dynamic_update_slice_in_dim(new, padding, features, axis)
        # Written into the buffer, not returned in its place: that keeps a weak type weak.
        result.append(buffer.at[...].set(new))
    return tuple(result)


_update = jax.jit(_write, static_argnums=(0, 1, 2, 3))


def _brought(source: Any, kernel: Any, conversion: Conversion) -> Any:
    """A source where the program that writes the kernel wants it."""
    if isinstance(source, jax.core.Tracer):
        return source
    if _is_committed(kernel):
        turned = conversion.transposes
        return bring(
            source, source_sharding(source, kernel.sharding, kernel.ndim, transposes=turned)
        )
    concrete = isinstance(kernel, jax.Array) and not isinstance(kernel, jax.core.Tracer)
    if isinstance(source, jax.Array) and source.committed and concrete:
        return bring(source, kernel.sharding)
    return put(source)


def _is_committed(array: jax.Array) -> bool:
    return (
        isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.committed
    )
