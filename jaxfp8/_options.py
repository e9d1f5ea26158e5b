"""The options that the operations share: implementation, precision, activation, output dtype."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfp8 import _xla
from jaxfp8.quantize import FP8_DTYPE, dtype_of, is_fp8


if TYPE_CHECKING:
    from jaxtyping import Float32


IMPLEMENTATIONS = (None, "cutlass", "xla")


def check_implementation(implementation: object) -> None:
    """Refuse an unknown implementation.

    Raises:
        ValueError: if it is not None, "cutlass" or "xla".
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f'`implementation` must be None, "cutlass" or "xla", but it is {implementation!r}.'
        )


def is_promoted(precision: Any) -> bool:
    """Whether partial sums are promoted to float32 registers (else: accumulated by the MMA).

    `None` follows `jax_default_matmul_precision`; DEFAULT is fast, HIGH and HIGHEST promoted, as
    in XLA's own FP8 dots; `DotAlgorithmPreset.ANY_F8_ANY_F8_F32` is promoted and its
    `_FAST_ACCUM` variant fast; a pair is promoted if either of its two is.

    Raises:
        ValueError: for any other algorithm preset or value.
    """
    name, remedy = "`precision`", ""
    if precision is None:
        name = "`jax_default_matmul_precision`, which `precision=None` follows,"
        remedy = " Give the layer a `precision` of its own."
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if isinstance(precision, tuple | list) and len(precision) == 2:
        return any(is_promoted(p) for p in precision)
    presets = {
        lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32: True,
        lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM: False,
    }
    for preset, promoted in presets.items():
        if precision in (preset, preset.name):
            return promoted
    try:
        return lax.Precision(precision) != lax.Precision.DEFAULT
    except ValueError:
        raise ValueError(
            f"{name} must be None, a `jax.lax.Precision` or its name, or "
            "`DotAlgorithmPreset.ANY_F8_ANY_F8_F32` with or without `_FAST_ACCUM`, but it is "
            f"{precision!r}.{remedy}"
        ) from None


def check_activation(activation: object) -> None:
    """Refuse an unknown activation.

    Raises:
        ValueError: naming the known ones.
    """
    if activation not in _xla.ACTIVATIONS:
        known = ", ".join(repr(a) for a in _xla.ACTIVATIONS)
        raise ValueError(
            f"`activation` must be one of {known}, but it is {activation!r}. Apply any other "
            "function to the result."
        )


def check_out_dtype(out_dtype: Any) -> Any:
    """The output dtype as a numpy dtype, if the epilogue can write it.

    Raises:
        ValueError: if it is not bfloat16, float16 or float32.
    """
    dtype = jnp.dtype(out_dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            f"`out_dtype` must be bfloat16, float16 or float32, but it is {dtype}. Cast the "
            "result to anything else."
        )
    return dtype


def check_result(out_dtype: Any, out_scale: Any) -> tuple[Any, Any, Any]:
    """The result's dtype, the one it is computed in, and the scale that quantizes it, if any.

    Raises:
        TypeError, ValueError: if the dtype cannot be written, or does not go with `out_scale`.
    """
    if out_scale is None:
        dtype = jnp.dtype(out_dtype)
        if is_fp8(dtype):
            raise ValueError(
                f"`out_dtype` must be a float of 16 bits or more, but it is {dtype}, which "
                "`fp8_dense` writes where it is given an `out_scale`: the static scale of the next "
                "layer's input."
            )
        return dtype, check_out_dtype(jnp.float32 if dtype == jnp.float64 else dtype), None
    if out_dtype is not None and not is_fp8(out_dtype):
        raise ValueError(
            f"`out_dtype` must be None or float8_e4m3fn with an `out_scale`, but it is "
            f"{jnp.dtype(out_dtype)}."
        )
    out_scale = check_vector(out_scale, "out_scale", ((),), "one static scale")
    return jnp.dtype(FP8_DTYPE), jnp.dtype(FP8_DTYPE), out_scale


def check_vector(a: Any, name: str, shapes: tuple, meaning: str) -> Float32[jax.Array, "..."]:
    """`a` as float32, if it is a float array of one of `shapes`.

    Raises:
        TypeError: if it is no float of 16 bits or more.
        ValueError: if its shape is none of `shapes`, whose `meaning` the message says.
    """
    dtype = dtype_of(a)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        came = f"a {type(a).__name__}" if dtype is None else dtype
        raise TypeError(f"`{name}` must be a float array, but it is {came}.")
    if jnp.shape(a) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"`{name}` must have shape {wanted} ({meaning}), but its shape is {jnp.shape(a)}."
        )
    return jnp.asarray(a).astype(jnp.float32)


def check_residual(residual: Any, shape: tuple, dtype: Any, out_scale: Any) -> jax.Array | None:
    """The residual as an array, if the result of this shape and dtype can have it added.

    Raises:
        TypeError: if its dtype is not the result's.
        ValueError: if its shape is not, or the result is quantized.
    """
    if residual is None:
        return None
    if out_scale is not None:
        raise ValueError(
            "`residual` must be None with an `out_scale`: a sum that later layers add to is not "
            "rounded to e4m3. Leave `out_scale` out; `quantize_input` rounds the sum for a layer."
        )
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if (came := dtype_of(residual)) is None:
        raise TypeError(
            f"`residual` must be an array of {dtype}, the dtype of the result, but it is a "
            f"{type(residual).__name__}. Convert it with `jnp.asarray`."
        )
    if came != dtype:
        raise TypeError(
            f"`residual` must have the dtype of the result, {dtype}, but it is {came}. Cast it, or "
            "set the result's dtype."
        )
    if jnp.shape(residual) != shape:
        raise ValueError(
            f"`residual` must have the shape of the result, {shape}, but its shape is "
            f"{jnp.shape(residual)}. Broadcast it with `jnp.broadcast_to`."
        )
    return jnp.asarray(residual)


def rows(lead: tuple) -> Any:
    """M, also where a leading size is symbolic."""
    return functools.reduce(lambda a, b: a * b, lead, 1)


def as_pairs(activation: Any, out_dtype: Any, precision: Any, implementation: Any) -> tuple:
    """The options of an operation, hashable."""
    return (
        ("activation", activation),
        ("out_dtype", out_dtype),
        ("precision", hashable(precision)),
        ("implementation", implementation),
    )


def hashable(precision: Any) -> Any:
    """A `precision`; a pair may come as a list."""
    return tuple(precision) if isinstance(precision, list) else precision
