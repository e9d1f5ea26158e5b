"""The options that the operations share: implementation, precision, activation, output dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfp8 import _xla


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
    if precision is None:
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
            "`precision` must be None, a `jax.lax.Precision` or its name, or "
            "`DotAlgorithmPreset.ANY_F8_ANY_F8_F32` with or without `_FAST_ACCUM`, but it is "
            f"{precision!r}."
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
