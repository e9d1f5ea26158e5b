"""How the content of one parameter is made from one loaded leaf: measure, then convert.

Each conversion is a small hashable description (static under `jit`), so leaves that look alike
share a compiled program. `measure` reads the loaded arrays once, for the value checks and the
scale; `convert` reads them a second time and writes the content. Nothing is kept in between but
the scale, so a reload can check the whole tree before it overwrites the first leaf.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfp8.padded import Layout, pad_quantized
from jaxfp8.quantize import MIN_SCALE, absolute_maximum, cast_to_fp8, scale_from_amax


if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float8e4m3fn, Float32, Shaped

# The scale that `measure` computed, or nothing where the content needs none.
Carry: TypeAlias = tuple[Any, ...]


def _flags(finite: Any, scales_valid: Any = True) -> Bool[Array, " flags"]:
    return jnp.stack([jnp.asarray(finite), jnp.asarray(scales_valid)])


def _all_finite(x: Shaped[Array, "*shape"]) -> Bool[Array, ""]:
    # Not wider dtypes: what float64 and complex numbers hold may be infinite in float32.
    return jnp.all(jnp.isfinite(x.astype(jnp.float32) if x.dtype.itemsize < 4 else x))


def _rounded(x: Shaped[Array, "*shape"], dtype: Any) -> Shaped[Array, "*shape"]:
    """`x.astype(dtype)`, so that what overflows float16 or bfloat16 is infinite in any program.

    XLA leaves out the rounding where it computes with the result in float32, on a GPU in that of
    `_all_finite` (xla_allow_excess_precision); not this one.
    """
    if dtype in (jnp.float16, jnp.bfloat16) and x.dtype != dtype:
        info = jnp.finfo(dtype)
        x = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
        x = lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)


def _valid_scale(scale: Float32[Array, "*s"]) -> Bool[Array, ""]:
    # Not `> 0`: whether a subnormal passes that depends on the backend's flushing, and the layer
    # would divide by it.
    return jnp.all(jnp.isfinite(scale) & (scale >= MIN_SCALE))


@dataclasses.dataclass(frozen=True)
class Quantize:
    """A float weight into a padded kernel; the scale is computed from the weight.

    Attributes:
        layout: the orientation of the loaded weight.
        per_channel: as in the padded kernel.
    """

    layout: Layout
    per_channel: bool

    @property
    def transposes(self) -> bool:
        """Whether the loaded matrix is turned on its way."""
        return self.layout == "in_out"

    def measure(self, weight: Float[Array, "*stack A B"]) -> tuple[Carry, Bool[Array, " flags"]]:
        """The scale, and whether the weight is finite: the maximum of |w| tells both."""
        in_axis = -2 if self.layout == "in_out" else -1
        axes = (in_axis,) if self.per_channel else (-2, -1)
        amax = jnp.squeeze(absolute_maximum(weight.astype(jnp.float32), axes), axes)
        return (scale_from_amax(amax),), _flags(_all_finite(amax))

    def convert(self, carry: Carry, weight: Float[Array, "*stack A B"]) -> tuple[Any, ...]:
        """The padded qvalue and scale, bit for bit those of `PaddedKernel.from_dense`."""
        (scale,) = carry
        if self.layout == "in_out":
            weight = jnp.swapaxes(weight, -1, -2)
        out_features, in_features = weight.shape[-2:]
        column = scale[..., None] if self.per_channel else scale[..., None, None]
        kernel = pad_quantized(
            cast_to_fp8(weight, column), scale, in_features=in_features, out_features=out_features
        )
        return kernel.qvalue, kernel.scale


@dataclasses.dataclass(frozen=True)
class Pad:
    """An already quantized weight, of logical or padded size, into a padded kernel."""

    layout: Layout
    in_features: int
    out_features: int
    per_channel: bool

    @property
    def transposes(self) -> bool:
        """Whether the loaded matrix is turned on its way."""
        return self.layout == "in_out"

    def measure(
        self, value: Float8e4m3fn[Array, "*stack A B"], scale: Float[Array, "*s"]
    ) -> tuple[Carry, Bool[Array, " flags"]]:
        """Whether the logical part is finite and its scales are valid; padding is not read."""
        value, scale = self._logical(value, scale)
        return (), _flags(_all_finite(value), _valid_scale(scale))

    def convert(
        self, carry: Carry, value: Float8e4m3fn[Array, "*stack A B"], scale: Float[Array, "*s"]
    ) -> tuple[Any, ...]:
        """The logical part with fresh padding; a per-tensor scale is repeated per channel."""
        value, scale = self._logical(value, scale)
        stack = value.shape[:-2]
        if scale.ndim < value.ndim - 1:
            if self.per_channel:
                scale = jnp.broadcast_to(
                    scale.reshape(scale.shape + (1,) * (value.ndim - 1 - scale.ndim)),
                    (*stack, self.out_features),
                )
            else:
                scale = jnp.broadcast_to(scale, stack)
        kernel = pad_quantized(
            value, scale, in_features=self.in_features, out_features=self.out_features
        )
        return kernel.qvalue, kernel.scale

    def _logical(self, value: Any, scale: Any) -> tuple[Any, Any]:
        if self.layout == "in_out":
            value = jnp.swapaxes(value, -1, -2)
        value = value[..., : self.out_features, : self.in_features]
        if scale.ndim == value.ndim - 1:
            scale = scale[..., : self.out_features]
        return value, scale.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A parameter that is not ours: cast between floats, else copied."""

    dtype: np.dtype
    transposes: bool = False
    # A calibration constant like `x_scale`, which must be a valid scale.
    is_scale: bool = False

    def measure(self, x: Shaped[Array, "*shape"]) -> tuple[Carry, Bool[Array, " flags"]]:
        """Whether the values are finite in the parameter's own dtype."""
        if not jnp.issubdtype(self.dtype, jnp.inexact):
            return (), _flags(True)
        x = _rounded(x, self.dtype)
        if self.is_scale:
            return (), _flags(True, _valid_scale(x.astype(jnp.float32)))
        return (), _flags(_all_finite(x))

    def convert(self, carry: Carry, x: Shaped[Array, "*shape"]) -> tuple[Any, ...]:
        """The values in the parameter's dtype."""
        x = jnp.swapaxes(x, -1, -2) if self.transposes else x
        return (x.astype(self.dtype),)


Conversion: TypeAlias = Quantize | Pad | Copy


@functools.partial(jax.jit, static_argnums=0)
def convert(conversion: Conversion, carry: Carry, *sources: Any) -> tuple[Any, ...]:
    """`conversion.convert`, compiled, into new buffers.

    The copy is for `jax.disable_jit`: an operation with nothing to do hands its input back, and
    the result would share the trainer's buffer, which the next donation would delete.
    """
    return tuple(jnp.copy(leaf) for leaf in conversion.convert(carry, *sources))
