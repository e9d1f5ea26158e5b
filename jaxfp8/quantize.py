"""e4m3 numerics: scales from absolute maxima, and saturating casts.

Both implementations of the layer use these constants; the CUDA quantize kernel repeats them
(`cuda/src/e4m3.cuh`), and a GPU test holds the two to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32


FP8_DTYPE = jnp.float8_e4m3fn
# Largest finite e4m3 value: S.1111.110 = 2^8 * 1.75 (Micikevicius et al. 2022, "FP8 formats for
# deep learning", table 1).
FP8_MAX = 448.0
# XLA turns a division by a constant into a multiplication by its rounded reciprocal. Writing the
# multiplication keeps op-by-op, jitted and CUDA results on the same bits.
INV_FP8_MAX = np.float32(1.0) / np.float32(FP8_MAX)
# Smallest normal float32. A smaller scale may be flushed to zero on its way, and 0/0 is NaN.
MIN_SCALE = np.float32(2.0**-126)


def dtype_of(x: object) -> Any:
    """The dtype of an array or a number, as JAX sees it; None for anything else."""
    # numpy would take these for the description of a dtype.
    if x is None or isinstance(x, tuple | str | bytes | type | np.dtype):
        return None
    try:
        return jnp.result_type(x)
    except TypeError:
        return None


def check_float(x: object, name: str) -> None:
    """Refuse what cannot be quantized: integers, complex numbers and 8-bit floats.

    Raises:
        TypeError: if `x` is not a real float of 16 bits or more.
    """
    dtype = dtype_of(x)
    if dtype is None:
        raise TypeError(
            f"`{name}` must be a real float array of 16 bits or more (bfloat16, float16, float32 "
            f"or float64), but it is a {type(x).__name__}."
        )
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise TypeError(
            f"`{name}` must be a real float array of 16 bits or more (bfloat16, float16, float32 "
            f"or float64), but it is {dtype}. Cast it first, for example "
            f"`{name}.astype(jnp.bfloat16)`; an already quantized array needs its scale: pass both "
            "to `fp8_dense` as `(qx, scale)`, to `scaled_matmul`, or as an `FP8Weight`."
        )


def absolute_maximum(
    x: Float32[Array, "*shape"], axis: int | Sequence[int]
) -> Float32[Array, "*reduced"]:
    """`max(abs(x), axis, keepdims=True)`, NaN if any element is.

    Taken over the bits, whose order as integers puts NaN above infinity and that above every
    number: XLA's float maximum loses the NaN on a CPU (jax 0.10.2: of 513 elements with one).
    """
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=True, initial=0), jnp.float32)


def reciprocal(scale: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """`1 / scale`, correctly rounded on every backend, as `__fdiv_rn` in the CUDA kernel.

    XLA divides with `div.full` on a GPU, which is off by one unit in the last place for 13 % of
    mantissas (H200, jax 0.11.2), and then one quantized value in a million differs. The residual
    2^47 - m(1/s)·m(s) of the 24-bit mantissas is below 2^27, so it is exact in wrapping 32-bit
    arithmetic and says which neighbour is nearest; a second step serves a result that crosses a
    power of two.
    """
    mantissa, hidden = jnp.uint32(0x7FFFFF), jnp.uint32(0x800000)
    s = lax.bitcast_convert_type(scale, jnp.uint32)
    s = (s & mantissa) | hidden
    approximate = 1.0 / scale
    r = lax.bitcast_convert_type(approximate, jnp.uint32)
    for _ in range(2):
        product = ((r & mantissa) | hidden) * s
        residual = lax.bitcast_convert_type(jnp.uint32(0) - product, jnp.int32)
        half = lax.bitcast_convert_type(s >> 1, jnp.int32)
        step = (residual > half).astype(jnp.uint32) - (residual < -half).astype(jnp.uint32)
        r = r + step
    # Powers of two divide exactly (and their product is 2^46); what has no normal reciprocal, and
    # NaN, stays as it is.
    normal = jnp.isfinite(approximate) & (approximate >= MIN_SCALE)
    exact = lax.bitcast_convert_type(r, jnp.float32)
    # The barrier keeps XLA from repeating all this for every element that is multiplied.
    return lax.optimization_barrier(jnp.where(normal & (s != hidden), exact, approximate))


def scale_from_amax(amax: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The multiplier that maps an absolute maximum onto e4m3's largest value.

    Equals `amax / 448`, and 1 where that is below 2^-126 (a row of zeros among them). NaN and
    infinity stay: such a row has no scale, and its results must say so.
    """
    scale = amax * INV_FP8_MAX
    scale = jnp.where(jnp.isnan(scale), jnp.nan, scale)  # one pattern everywhere
    return jnp.where(scale < MIN_SCALE, jnp.float32(1.0), scale)


def cast_to_fp8(
    x: Float[Array, "*shape"], scale: Float32[Array, "*scale"]
) -> Float8e4m3fn[Array, "*shape"]:
    """Saturating cast of `x / scale`, `scale` broadcast against `x`.

    A finite value outside ±448 becomes ±448 (a plain JAX cast makes it NaN past 464). NaN and
    infinity in `x`, or a NaN scale, give NaN, never ±448. Under an infinite scale what is finite
    becomes 0: that slice is NaN once it is multiplied by its scale again.
    """
    x = x.astype(jnp.float32)
    scaled = x * reciprocal(scale)
    # One NaN pattern (0x7f) on every backend: x86 makes 0·inf a NaN with the sign bit set.
    valid = jnp.isfinite(x) & ~jnp.isnan(scaled)
    clipped = jnp.where(valid, jnp.clip(scaled, -FP8_MAX, FP8_MAX), jnp.nan)
    return round_to_odd(clipped).astype(FP8_DTYPE)


def round_to_odd(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Cut to the 8 significant bits of bfloat16, the last set if anything was cut off.

    The cast to e4m3 (4 significant bits) then rounds as it would from `x` itself, even where XLA
    makes it go through a 16-bit float, which rounds twice: jax 0.9.1 on a CPU, in a program fused
    with a product of one row, turned 183.97 into 184 and that into 192, not 176. (Rounding to odd
    before a narrower rounding: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded
    sums".)
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    lost = (bits & jnp.uint32(0xFFFF)) + jnp.uint32(0xFFFF)
    bits = (bits | (lost & jnp.uint32(0x10000))) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def quantize(
    x: Float[Array, "*shape"],
    *,
    axis: int | Sequence[int] | None = None,
    keepdims: bool = True,
) -> tuple[Float8e4m3fn[Array, "*shape"], Float32[Array, "*scale"]]:
    """Quantize to e4m3 with one scale for all of `x`, or one for each slice along `axis`.

    Equivalent JAX: `scale = max(abs(x), axis) / 448; qvalue = clip(x / scale, ±448).astype(e4m3)`,
    so that `qvalue * scale` approximates `x` to a relative 2^-4 (3 mantissa bits, rounded).

    Args:
        x: float array of 16 bits or more, any shape.
        axis: the axes that share a scale. `None`: one scale for the tensor. `-1`: one for each
            row (per token, or per channel of an `[N, K]` weight).
        keepdims: keep the reduced axes with size 1, so that the scale broadcasts against `x`.
            With `axis=None` the scale has shape `()` either way.

    Returns:
        `(qvalue, scale)`: e4m3 of x's shape, and float32. A NaN or an infinity in a slice makes
        that slice's scale NaN or infinite and its result NaN; other slices are not touched.

    Raises:
        TypeError: if `x` is an integer, complex or 8-bit float array.
    """
    check_float(x, "x")
    x32 = jnp.asarray(x).astype(jnp.float32)
    axes = tuple(range(x32.ndim)) if axis is None else axis
    scale = scale_from_amax(absolute_maximum(x32, axes))
    qvalue = cast_to_fp8(x32, scale)
    if axis is None:
        return qvalue, scale.reshape(())
    return qvalue, scale if keepdims else jnp.squeeze(scale, axes)


def is_fp8(dtype: object) -> bool:
    """Whether `dtype` is the one FP8 format of this package, e4m3fn."""
    return jax.dtypes.canonicalize_dtype(dtype) == jnp.dtype(FP8_DTYPE)
