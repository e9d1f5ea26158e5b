"""A fused parameter, or some rows of it, from the weights of its shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from jaxfp8._convert import Carry, Conversion, Quantize
from jaxfp8._leaf import plan_leaf
from jaxfp8.padded import PaddedKernel, padded_size
from jaxfp8.shards import KernelShards, bounds


if TYPE_CHECKING:
    from jaxtyping import Array, Bool


@dataclasses.dataclass(frozen=True)
class Fused:
    """The shards of one parameter, each converted by itself and set one after another.

    Attributes:
        parts: the conversion of each shard.
        arrays: how many arrays each of them reads.
        rows: how many output features each of them has.
        is_kernel: whether the parameter is a PaddedKernel.
    """

    parts: tuple[Conversion, ...]
    arrays: tuple[int, ...]
    rows: tuple[int, ...]
    is_kernel: bool

    @property
    def transposes(self) -> bool:
        """Whether every loaded matrix is turned on its way."""
        return all(part.transposes for part in self.parts)

    def measure(self, *sources: Any) -> tuple[Carry, Bool[Array, " flags"]]:
        """What each shard's conversion measures, and the flags of all of them."""
        measured = [
            part.measure(*arrays)
            for part, arrays in zip(self.parts, self._split(sources), strict=True)
        ]
        flags = jnp.all(jnp.stack([flags for _, flags in measured]), axis=0)
        return tuple(array for carry, _ in measured for array in carry), flags

    def convert(self, carry: Carry, *sources: Any) -> tuple[Any, ...]:
        """The parameter's arrays, whole, padding included."""
        scales = iter(carry)
        fresh = []
        for part, arrays, rows in zip(self.parts, self._split(sources), self.rows, strict=True):
            own = (next(scales),) if isinstance(part, Quantize) else ()
            fresh.append(logical_rows(part.convert(own, *arrays), rows, is_kernel=self.is_kernel))
        if not self.is_kernel:
            return (jnp.concatenate([x for (x,) in fresh], axis=-1),)
        n = sum(self.rows)
        qvalue = jnp.concatenate([q for q, _ in fresh], axis=-2)
        scale = jnp.concatenate([s for _, s in fresh], axis=-1)
        tail = [(0, 0)] * (scale.ndim - 1) + [(0, padded_size(n) - n)]
        return jnp.pad(qvalue, [*tail, (0, 0)]), jnp.pad(scale, tail, constant_values=1.0)

    def _split(self, sources: Sequence[Any]) -> list[Sequence[Any]]:
        rest = iter(sources)
        return [[next(rest) for _ in range(count)] for count in self.arrays]


def logical_rows(fresh: tuple[Any, ...], rows: int, *, is_kernel: bool) -> tuple[Any, ...]:
    """The first `rows` output features of what a conversion made: without the padded ones."""
    if not is_kernel:
        return fresh
    qvalue, scale = fresh
    return qvalue[..., :rows, :], scale[..., :rows]


def plan(target: Any, loaded: Any, *, is_scale: bool) -> tuple[Conversion, tuple[Any, ...]]:
    """`plan_leaf`, and the same for a fused weight in its pieces.

    Raises:
        TypeError, ValueError: as `plan_leaf`; and if shards are missing or unknown, their sizes do
            not add up, or the kernel has one scale per tensor.
    """
    if not isinstance(loaded, KernelShards):
        return plan_leaf(target, loaded, is_scale=is_scale)
    shards = bounds(loaded.sizes, features_of(target))
    if loaded.shards.keys() != shards.keys():
        raise ValueError(
            f"the shards of the KernelShards are {sorted(loaded.shards)}, but its sizes name "
            f"{list(shards)}. Give them all, or write some of them with "
            "`reload_stream(...).put(path, weight, shard=name)` or `update_rows`."
        )
    planned = []
    for name, (start, stop) in shards.items():
        try:
            planned.append(plan_rows(target, stop - start, loaded.shards[name]))
        except (TypeError, ValueError) as error:
            raise type(error)(f"shard {name!r}: {error}") from error
    fused = Fused(
        tuple(conversion for conversion, _ in planned),
        tuple(len(sources) for _, sources in planned),
        tuple(stop - start for start, stop in shards.values()),
        isinstance(target, PaddedKernel),
    )
    # It has what callers of a Conversion use; the union lies below, beside what it is made of.
    return cast("Conversion", fused), tuple(s for _, sources in planned for s in sources)


def plan_rows(target: Any, rows: int, loaded: Any) -> tuple[Conversion, tuple[Any, ...]]:
    """`plan_leaf` into a parameter like `target`, but of `rows` output features.

    Raises:
        TypeError, ValueError: as `plan_leaf`, and if a kernel has one scale per tensor.
    """
    if isinstance(target, PaddedKernel) and not target.per_channel:
        raise ValueError(
            "this kernel has one scale per tensor, and rows with a scale of their own would change "
            "the meaning of all others. Initialise the layer with per_channel=True, or load the "
            "whole weight."
        )
    part: Any
    if isinstance(target, PaddedKernel):
        scale = (*target.stack, padded_size(rows))
        qvalue = (*scale, padded_size(target.in_features))
        part = PaddedKernel(
            jax.ShapeDtypeStruct(qvalue, target.qvalue.dtype),
            jax.ShapeDtypeStruct(scale, target.scale.dtype),
            target.in_features,
            rows,
        )
    else:
        part = jax.ShapeDtypeStruct((*target.shape[:-1], rows), target.dtype)
    return plan_leaf(part, loaded, is_scale=False)


def rows_of(weight: Any) -> int | None:
    """How many output features a loaded weight has; None for what is no weight at all."""
    if isinstance(weight, PaddedKernel):
        return weight.out_features
    value = getattr(weight, "value", weight)
    shape = getattr(value, "shape", ())
    axis = -2 if getattr(weight, "layout", "in_out") == "out_in" else -1
    return shape[axis] if len(shape) >= -axis else None


def features_of(target: Any) -> int:
    """N of a parameter: a kernel's logical size, or the last axis of another array.

    Raises:
        ValueError: if it is a scalar.
    """
    if isinstance(target, PaddedKernel):
        return target.out_features
    if not target.shape:
        raise ValueError("the parameter in `params` is a scalar and has no rows to divide.")
    return target.shape[-1]
